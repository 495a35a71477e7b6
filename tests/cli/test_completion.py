"""What a shell completes."""

from __future__ import annotations

import pytest
from click.shell_completion import ShellComplete

from compressor.cli.main import cli


def completed(*words: str) -> list[str]:
    """Returns what the last word is completed to; the type in place of a path."""
    found = ShellComplete(cli, {}, "compress", "_COMPRESS_COMPLETE").get_completions([*words[:-1]], words[-1])
    return [item.value if item.type == "plain" else item.type for item in found]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("insp",), ["inspect"]),
        (("resnet34", "--codew"), ["--codewords"]),
        (("resnet34", "--scheme", "kmea"), ["kmeans"]),
        (("resnet34", "--codec", "au"), ["auto"]),
        (("resnet34", "--recipe", "deep-"), ["deep-compression"]),
        (("resnet34", "--recipe", "own.to"), ["file"]),
        (("test_resnet", "--teacher", "resnet34_"), []),
        (("inspect", "zoo:resnet18-"), ["zoo:resnet18-balanced", "zoo:resnet18-tiny"]),
        (("diff", "a.safetensors", "b.sa"), ["file"]),
        (("pack", "test_resn"), ["test_resnet"]),
        (("help", "pac"), ["pack"]),
    ],
)
def test_a_word_is_completed(words: tuple[str, ...], expected: list[str]) -> None:
    assert completed(*words) == expected


def test_a_word_that_begins_no_command_is_a_model() -> None:
    assert {"resnet34", "resnet34d"} <= set(completed("resnet34"))
