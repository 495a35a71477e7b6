"""Misspelt names are answered at once: torch and timm take seconds to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm

from compressor import SCHEMES
from compressor.cache import cache_dir
from compressor.cli.spelling import scheme_names
from compressor.models.known_names import check_kept, keep_names, kept_names

TYPED = (
    "import sys; from compressor.cli.main import run; code = run(sys.argv[1:]);"
    "sys.exit(code + 100 * ('torch' in sys.modules or 'timm' in sys.modules))"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIMM_COMPRESSOR_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("resnet43",), 4, f"timm {timm.__version__} has no model 'resnet43'. Did you mean 'resnet34'?"),
        (("resnet18", "--teacher", "resnet43"), 4, "has no model 'resnet43'. Did you mean 'resnet34'?"),
        (("resnet18.none", "--scheme", "lernt"), 2, "no scheme 'lernt'. Did you mean 'learnt'? Known schemes: dense, "),
        (("resnet18", "--codec", "zip"), 2, "--codec zip: no such codec. Known: auto (the smallest), ans, bits, "),
        (("resnet18", "--codec", "hufman"), 2, "--codec hufman: no such codec. Did you mean 'huffman'? Known: auto "),
        (("resnet18", "--recipe", "mixd3"), 4, "no recipe 'mixd3'. Did you mean 'mixed3'? Shipped recipes: "),
        (("resnet18", "--recipe", "zoo:resnet18-tny"), 4, "Did you mean 'resnet18-tiny'?"),
        (("resnet18", "--dataset", "digts"), 4, "no data set 'digts'. Did you mean 'digits'?"),
        (("resnet18", "--crop-mode", "centre"), 2, "expected center, squash or border. Did you mean 'center'?"),
        (("resnet18", "--untouched", "f8"), 2, "Invalid value for '--untouched': 'f8', expected f32 or f16."),
        (("resnet18", "--log", "tensorbord"), 2, "expected tensorboard. Did you mean 'tensorboard'?"),
        (("resnet18", "--bits", "four"), 2, "'--bits': 'four', expected a whole number at least 1"),
        (("resnet18", "--lr", "fast"), 2, "'--lr': 'fast', expected a number at least 0"),
        (("resnet18", "--sparsity", "1"), 2, "'--sparsity': '1', expected a number at least 0 and below 1"),
        (("report", "a", "--format", "htm"), 2, "expected html, markdown, latex, csv or json. Did you mean 'html'?"),
    ],
)
def test_a_misspelt_name_is_answered_without_torch(words: tuple[str, ...], code: int, said: str) -> None:
    keep_names(["resnet18", "resnet34"])
    ran = subprocess.run([sys.executable, "-c", TYPED, *words], capture_output=True, text=True, check=False)
    assert ran.returncode == code, ran.stderr
    assert said in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


def test_the_names_of_schemes_are_those_of_the_registry() -> None:
    assert scheme_names() == sorted(SCHEMES)


def test_only_a_list_of_the_installed_timm_counts() -> None:
    assert kept_names() is None
    check_kept("resnet43")  # nothing is known yet
    keep_names(["resnet18"])
    assert kept_names() == ["resnet18"]
    check_kept("hf-hub:me/resnet43")
    check_kept("resnet18.any_tag")
    (path,) = cache_dir().iterdir()
    keep_names(["resnet34"])
    assert kept_names() == ["resnet18"], "it is made once"
    path.write_text("[1]")
    assert kept_names() is None
    path.write_text("[")
    assert kept_names() is None
    path.rename(path.with_name("timm-0.9-1.json"))
    assert kept_names() is None
    keep_names(["resnet34"])
    assert [one.name for one in cache_dir().iterdir()] == [path.name], "lists of others are deleted"


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TIMM_COMPRESSOR_CACHE", str(tmp_path / "file" / "cache"))
    keep_names(["resnet18"])
    assert kept_names() is None
