"""push, and hf-hub: names as the FILE of commands, as a user types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from compressor.cli.main import cli
from compressor.formats.io.hub import PACKED
from compressor.model_zoo import checkpoint, packed_path
from tests.helpers.file_commands import Ran, type_
from tests.helpers.hub_server import TOKEN, FakeHub, Repository, hub

__all__ = ["hub", "type_"]  # the fixtures

pytestmark = pytest.mark.usefixtures("own_folder")
NAME = "hf-hub:you/small"
FILE = packed_path("zoo:test_resnet-tiny")
TINY = checkpoint("test_resnet-tiny").bytes


@pytest.fixture
def pinned(hub: FakeHub) -> str:
    """The name of a file that is on the hub, with its commit."""
    hub.repositories["you/small"] = found = Repository()
    return f"{NAME}@{found.commit({PACKED: FILE.read_bytes()})}"


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # by the hub's client itself
def test_push_says_what_it_has_done(hub: FakeHub, type_: Callable[..., Ran]) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra hub")
    code, out, _ = type_("push", "zoo:test_resnet-tiny", "me/small")
    assert code == 0
    commit = hub.repositories["me/small"].refs["main"]
    first, *files, how = out.splitlines()
    assert first == f"{hub.endpoint}/me/small  4 files, pushed and compared"
    assert files[0].split() == [PACKED, f"{TINY:,}", "bytes"]
    assert how == f"load it with: compressor.load('hf-hub:me/small@{commit}')"
    code, out, _ = type_("push", "zoo:test_resnet-tiny", "me/small", "--folder", "out", "--json")
    found = json.loads(out)
    assert (code, found["name"], found["place"]) == (0, str(Path("out", PACKED)), "out")
    assert found["files"][0] == {"name": PACKED, "bytes": TINY}
    assert found["units"]["files.bytes"] == "bytes"


@pytest.mark.parametrize(
    ("words", "expected", "message"),
    [
        (("me/small", "--private", "--folder", "out"), 2, "error: a folder is not private"),
        (("small",), 2, "error: 'small' is no name of a repository: expected OWNER/NAME"),
        (("me/small", "--base-model", "foo"), 2, "error: 'foo' is no name of a base model: expected OWNER/NAME"),
        (("me/small",), 6, "error: hf-hub:me/small: no token is set: set HF_TOKEN, or run 'hf auth login'"),
    ],
)
def test_push_is_refused(
    hub: FakeHub,
    type_: Callable[..., Ran],
    words: tuple[str, ...],
    expected: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    code, out, err = type_("push", "zoo:test_resnet-tiny", *words)
    assert (code, out, len(err)) == (expected, "", 1)
    assert err[0].startswith(message)


def test_no_output_has_the_token(
    hub: FakeHub, pinned: str, type_: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\x01")  # which the client quotes, since no request may hold it
    for words in (("push", str(FILE), "me/small"), ("inspect", NAME), ("inspect", "hf-hub:you/none")):
        code, out, err = type_(*words)
        assert (code, out) == (6, "")
        assert TOKEN not in "".join(err)
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}x")
    code, out, err = type_("inspect", NAME)
    assert code == 6
    assert TOKEN not in "".join(err)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("inspect", NAME), "fetched   {pinned}"),
        (("verify", NAME), f"{{pinned}}: good, {TINY:,} bytes"),
        (("diff", NAME, "zoo:test_resnet-tiny"), "identical content"),
        (("unpack", NAME, "-o", "dense.safetensors"), "dense.safetensors  "),
        (("export", NAME, "--to", "reader", "-o", "own.py"), "own.py  "),
        (("report", NAME, "--format", "csv"), "you/small@{short},"),
        (("pack", "test_resnet", "--checkpoint-path", NAME, "--num-classes", "10", "--in-chans", "1"), "whole file"),
        (("test_resnet", "--dataset", "digits", "--recipe", NAME, "--dry-run"), "layer1.0.conv1.weight"),
    ],
)
def test_commands_take_a_file_of_the_hub(
    pinned: str, words: tuple[str, ...], shown: str, type_: Callable[..., Ran]
) -> None:
    code, out, err = type_(*words)
    assert code == 0, err
    assert shown.format(pinned=pinned, short=pinned[-40:-32]) in out
    assert "--recipe" in words or err[0] == f"{pinned}  {TINY:,} bytes"
    assert not [path for path in Path().iterdir() if path.name.startswith("hf-hub")]


@pytest.mark.usefixtures("pinned")
def test_nothing_is_written_into_the_cache(tmp_path: Path, type_: Callable[..., Ran]) -> None:
    assert type_("export", NAME, "--to", "reader")[0] == 0
    assert Path("packed_reader.py").is_file()
    assert not [*(tmp_path / "hub").rglob("*.py")]


def test_json_has_the_commit(pinned: str, type_: Callable[..., Ran]) -> None:
    for command in ("inspect", "verify"):
        assert json.loads(type_(command, NAME, "--json")[1])["hub"] == pinned
        assert json.loads(type_(command, "zoo:test_resnet-tiny", "--json")[1])["hub"] is None


def test_a_shell_that_completes_asks_no_hub(pinned: str, hub: FakeHub) -> None:
    found = ShellComplete(cli, {}, "compress", "_COMPRESS_COMPLETE").get_completions(["inspect", NAME], "--j")
    assert [item.value for item in found] == ["--json"]
    assert not hub.requests
