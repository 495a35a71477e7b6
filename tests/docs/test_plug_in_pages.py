"""The pages on plug-ins: what they write, installed as the package of their own page, keeps the contracts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
TESTS = ROOT / "tests"
NAMES = "write-a-scheme", "write-a-codec", "write-a-target", "plug-in-package"
PAGE = "\n".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in NAMES)
FILES = dict(re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))

USE = """
import numpy as np
import torch
from torch import nn

import compressor
from compressor import Compressor, Policy, Rule
from compressor.formats.codecs.base import Stream
from compressor.formats.codecs.registry import CODECS

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
job = Compressor(model, Policy([Rule("*", scheme="pow2", bits=3, commitment=0.1, sparsity=0.25)]), teacher=None)
job.prepare()
optimizer = torch.optim.AdamW(job.param_groups(lr=0.01))
job.attach(optimizer, 10)
inputs = torch.randn(8, 32)
for _ in range(10):
    optimizer.zero_grad()
    penalty = job.penalty()
    assert penalty > 0
    (job.model(inputs).square().mean() + penalty).backward()
    optimizer.step()
scales = [float(group.codebook().detach()) for group in job.groups]
job.model.eval()
computed = job.model(inputs)
job.finish().save("shifts.safetensors", codec="rice")
loaded = compressor.load("shifts.safetensors", model=nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)))
assert torch.equal(loaded(inputs), computed)
for layer, scale in ((loaded[0], scales[0]), (loaded[2], scales[1])):
    levels = (layer.weight.detach() / scale).unique()
    assert {*levels.abs().tolist()} <= {0.0, 1.0, 0.5, 0.25, 0.125}

sizes = {}
for count in (64, 128, 256, 512, 1024):
    weights = np.random.default_rng(count).laplace(size=(20, count))
    indices = np.clip(np.round(weights * 1.5 + 8), 0, 15).astype(np.uint8)
    for name in ("bits", "huffman", "ans", "rice"):
        codec, stream = CODECS[name](), Stream("fc.weight", count, 16)
        sizes[count, name] = sum(len(codec.encode(row, stream)) for row in indices)
    assert min(sizes[count, name] for name in ("bits", "huffman", "ans")) > sizes[count, "rice"], sizes
"""


def environment(*places: Path) -> dict[str, str]:
    """The environment of a process that finds the packages of these folders, and no settings of this pytest."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return {**kept, "PYTHONPATH": os.pathsep.join(map(str, places))}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of the page, installed into a folder by pip, without network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name, text in FILES.items():
        (source / name).write_text(text, encoding="utf-8")
    options = "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    return target


def test_the_pages_have_the_files_of_a_package() -> None:
    assert list(FILES) == ["powers_of_two.py", "rice.py", "npz_target.py", "pyproject.toml"]


@pytest.mark.slow
def test_the_example_trains_packs_and_loads(package: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", USE], env=environment(ROOT, package), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


CONTRACTS = {
    "pow2": ["schemes/test_contract.py", "schemes/test_contract_values.py"],
    "rice": ["formats/codecs/test_contract.py", "formats/file/test_invalid_files.py"],
    "npz": ["deployment/test_contract.py"],
}
LEAST = {"pow2": 60, "rice": 60, "npz": 5}  # tests that must run


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTRACTS)
def test_the_contract_tests_hold_it(name: str, package: Path) -> None:
    """They find it in the registry, as they find every plug-in of an installed package."""
    paths = [str(TESTS / test) for test in CONTRACTS[name]]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        *paths,
        "-k",
        name,
    ]
    done = subprocess.run(command, env=environment(ROOT, package), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) >= LEAST[name]


def test_its_own_example_runs(package: Path) -> None:
    """In a process of its own: importing the module registers the codec."""
    code = "import doctest, rice; result = doctest.testmod(rice); print(result.attempted, result.failed)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(ROOT, package), capture_output=True, text=True, check=True
    )
    assert done.stdout == "1 0\n"


def test_the_target_exports_a_file(package: Path, tmp_path: Path) -> None:
    export = [sys.executable, "-m", "compressor.cli", "export", "zoo:test_resnet-tiny", "--to", "npz"]
    done = subprocess.run(export, env=environment(ROOT, package), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("test_resnet-tiny.npz  ")
    assert "run and compared: equal bit for bit" in done.stdout


def test_options_of_the_commands_exist() -> None:
    from compressor.cli.main import cli

    lines = [line.partition("#")[0].split() for line in re.findall(r"^compress .*", PAGE, re.MULTILINE)]
    assert len(lines) == 5
    for words in lines:
        command = cli.commands.get(words[1], cli.commands["run"])
        assert {word for word in words if word.startswith("-")} <= {o for p in command.params for o in p.opts}


def test_the_scripts_it_names_exist() -> None:
    for name in set(re.findall(r"scripts/[\w-]+", PAGE)):
        assert (ROOT / name).is_file()
