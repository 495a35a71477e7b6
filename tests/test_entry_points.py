"""Schemes and codecs of other packages: found by entry points, and one clear line where they are broken or missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import compressor

ROOT = Path(compressor.__file__).resolve().parent.parent

SCHEME = '''
from typing import ClassVar

from pydantic.dataclasses import dataclass

from compressor.schemes.kmeans import KMeans
from compressor.sharing.registry import register


@register
@dataclass(frozen=True)
class Foreign(KMeans):
    """Clusters as kmeans does, in another package."""

    id: ClassVar[str] = "foreign"
'''
CODEC = '''
from dataclasses import dataclass
from typing import ClassVar

from compressor.formats.codecs.bits import Bits
from compressor.formats.codecs.registry import register


@register
@dataclass(frozen=True)
class Inverted(Bits):
    """Codes as bits does, every byte inverted."""

    id: ClassVar[str] = "inverted"

    def encode(self, indices, stream):
        return bytes(255 - byte for byte in super().encode(indices, stream))

    def decode(self, data, stream):
        return super().decode(memoryview(bytes(255 - byte for byte in data)), stream)

    def lookup(self, data, stream, values):
        return super().lookup(memoryview(bytes(255 - byte for byte in data)), stream, values)
'''
TRAIN = """
import torch
from torch import nn

from compressor import Compressor, Policy, Recipe, Rule

torch.manual_seed(0)
job = Compressor(nn.Linear(16, 8), Policy([Rule("*", scheme="foreign", bits=2)]), teacher=None).prepare()
optimizer = torch.optim.SGD(job.param_groups(lr=0.1), lr=0.1)
job.attach(optimizer, 2)
for _ in range(2):
    optimizer.zero_grad()
    job.model(torch.randn(4, 16)).square().mean().backward()
    optimizer.step()
packed = job.finish()
packed.save("foreign.safetensors", codec="inverted")
packed.save("auto.safetensors")
torch.save(job.model.state_dict(), "evaluated.pt")
recipe = Recipe.from_dict({"stage": [{"rule": [{"match": "*", "scheme": "foreign"}]}]})
print(recipe.stages[0].policy.rules[0].scheme)
"""
LOAD = """
import torch
from torch import nn

import compressor

model = compressor.load("foreign.safetensors", model=nn.Linear(16, 8))
packed = compressor.load("foreign.safetensors", model=nn.Linear(16, 8), weights="packed")
inputs = torch.randn(2, 16)
evaluated = torch.load("evaluated.pt", weights_only=True)
assert all(torch.equal(tensor, evaluated[name]) for name, tensor in model.state_dict().items())
assert torch.equal(model(inputs), packed(inputs))
"""


def installed(folder: Path, name: str, schemes: Mapping[str, str], codecs: Mapping[str, str], **modules: str) -> Path:
    """Writes a package as an installer leaves it: modules, and metadata with entry points by id."""
    metadata = folder / f"{name}-0.1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    lines: list[str] = []
    for kind, entries in (("schemes", schemes), ("codecs", codecs)):
        lines += [f"[timm_compressor.{kind}]", *(f"{entry} = {value}" for entry, value in entries.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)
    return folder


def python(*arguments: str, path: Path | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the interpreter, with the packages of a folder as if they were installed."""
    places = [str(ROOT), *([str(path)] if path else [])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    return subprocess.run([sys.executable, *arguments], env=env, cwd=cwd, capture_output=True, text=True, check=False)


def run(*arguments: str, **places: Any) -> str:
    """Runs the interpreter, which must succeed, and returns what it prints on stdout."""
    done = python(*arguments, **places)
    assert done.returncode == 0, done.stderr
    return done.stdout


def command(*arguments: str, **places: Any) -> str:
    """Runs the command, which must succeed, and returns what it prints on stdout."""
    return run("-m", "compressor.cli", *arguments, **places)


def refused(*arguments: str, code: int, **places: Any) -> str:
    """Runs the command, which must exit with ``code`` and one line, and returns that line."""
    done = python("-m", "compressor.cli", *arguments, **places)
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of one scheme and one codec."""
    entries = {"foreign": "foreign_scheme"}, {"inverted": "foreign_codec:Inverted"}
    folder = tmp_path_factory.mktemp("foreign")
    return installed(folder, "foreign-sharing", *entries, foreign_scheme=SCHEME, foreign_codec=CODEC)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, foreign: Path) -> Path:
    """A folder with a network trained under the package's scheme and packed by its codec."""
    folder = tmp_path_factory.mktemp("trained")
    assert run("-c", TRAIN, path=foreign, cwd=folder) == "foreign\n"
    return folder


def test_another_process_loads_what_was_evaluated(foreign: Path, trained: Path) -> None:
    run("-c", LOAD, path=foreign, cwd=trained)
    assert "inverted" in run(
        "-m", "compressor.cli", "inspect", "foreign.safetensors", "--json", path=foreign, cwd=trained
    )
    command("verify", "foreign.safetensors", path=foreign, cwd=trained)


def test_without_the_package_one_line_says_which_codec_is_missing(trained: Path) -> None:
    line = refused("inspect", "foreign.safetensors", cwd=trained, code=3)
    assert "needs the codec 'inverted', unknown to this release" in line
    assert "install the package that this codec comes from" in line


def test_auto_considers_built_in_codecs_only(trained: Path) -> None:
    """A file packed with ``auto`` is the same on every machine, and loads on every one."""
    command("verify", "auto.safetensors", cwd=trained)


COMMANDS = """
import safetensors.torch
import timm

from compressor.cli.main import run

safetensors.torch.save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), "dense.safetensors")
pack = "pack", "test_resnet", "--checkpoint-path", "dense.safetensors", "--num-classes", "10", "--codec", "inverted"
for options in (["--scheme", "foreign", "--bits", "2"], ["--recipe", "recipe.toml"]):
    assert run([*pack, *options, "-o", "packed.safetensors", "--force"]) == 0
    assert run(["inspect", "packed.safetensors", "--json"]) == 0
assert run(["schemes"]) == 0
"""


@pytest.mark.slow
def test_the_command_finds_scheme_and_codec(foreign: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('[[stage]]\nepochs = 0\n[[stage.rule]]\nmatch = "*"\nscheme = "foreign"\n')
    printed = run("-c", COMMANDS, path=foreign, cwd=tmp_path)
    assert "foreign: Clusters as kmeans does" in printed
    assert printed.count('"codec": "inverted"') > 2


BROKEN = {
    "an import that fails": ("import absent_module", "ModuleNotFoundError: No module named 'absent_module'"),
    "an error of two lines": ("raise RuntimeError('one\\ntwo')", "RuntimeError: one two"),
    "an error after its class": (
        CODEC.replace('"inverted"', '"broken"') + "raise ValueError('late')",
        "ValueError: late",
    ),
    "no class": ("", "registers no class of this id"),
    "a taken id": (CODEC.replace('"inverted"', '"ans"'), "codec id 'ans' is taken by compressor.formats.codecs.ans"),
    "a reserved id": (CODEC.replace('"inverted"', '"auto"'), "codec id 'auto' of broken cannot be used"),
    "an unusable id": (CODEC.replace('"inverted"', '"Two Words"'), "codec id 'Two Words' of broken cannot be used"),
    "no functions": (
        CODEC.replace("codecs.bits import Bits", "codecs.base import Codec as Bits"),
        "code_lengths, max_count",
    ),
}
FIND = """
from compressor.formats.codecs.registry import CODECS
from compressor.formats.errors import UsageError

assert "broken" in CODECS and CODECS["bits"]
for _ in range(2):
    try:
        CODECS["broken"]
    except UsageError as error:
        print(error)
assert {*CODECS} == {*CODECS.built_in(), "broken"}
"""


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_package_is_one_line_and_hinders_nothing_else(fault: str, tmp_path: Path) -> None:
    text, reason = BROKEN[fault]
    path = installed(tmp_path, "broken-codec", {}, {"broken": "broken"}, broken=text)
    one, two = run("-c", FIND, path=path).splitlines()
    assert one == two
    assert one.startswith("codec 'broken' of package 'broken-codec' cannot be used (")
    assert reason in one
    assert one.endswith("): repair or uninstall that package")


def test_the_list_of_schemes_goes_on_after_a_broken_package(tmp_path: Path) -> None:
    path = installed(tmp_path, "broken-sharing", {"broken": "broken"}, {}, broken="raise ValueError('reason')")
    done = python("-m", "compressor.cli", "schemes", path=path)
    assert done.returncode == 0
    assert "ttq: " in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: scheme 'broken' of package 'broken-sharing' cannot be used (ValueError: reason)")


@pytest.mark.parametrize("taken", ["bits", "inverted"])
def test_two_of_one_id_are_one_line(taken: str, tmp_path: Path) -> None:
    path = installed(tmp_path, "first", {}, {"inverted": "one"}, one=CODEC)
    installed(tmp_path, "second", {}, {taken: "two"}, two=CODEC)
    done = python("-c", "from compressor.formats.codecs.registry import CODECS\nCODECS['inverted']", path=path)
    line = done.stderr.strip().splitlines()[-1]
    assert f"UsageError: codec id '{taken}', offered by package " in line
    assert ("is built in" if taken == "bits" else "too") in line
    assert line.endswith("uninstall one of them")


def test_a_class_registered_before_all_others_takes_no_id(tmp_path: Path) -> None:
    """It is imported by a program, before any built-in codec was asked for."""
    text = CODEC.replace('"inverted"', '"huffman"').replace(
        "codecs.bits import", "codecs.hashed import Hashed as Bits #"
    )
    (tmp_path / "early.py").write_text(text)
    done = python("-c", "import early", path=tmp_path)
    assert "codec id 'huffman' is taken by compressor.formats.codecs.huffman" in done.stderr


REGISTRIES = [
    "compressor.formats.codecs.registry import CODECS",
    "compressor.sharing.registry import SCHEMES",
    "compressor.deployment.registry import TARGETS",
]


@pytest.mark.parametrize("registry", REGISTRIES)
def test_a_built_in_id_searches_no_packages(registry: str) -> None:
    code = (
        "import importlib.metadata as metadata\n"
        "search = metadata.entry_points\n"
        "def watched(**selected):\n"
        "    assert not selected.get('group', '').startswith('timm_compressor')\n"
        "    return search(**selected)\n"
        "metadata.entry_points = watched\n"
        f"from {registry} as ALL\n"
        "print([ALL.find(name).id for name in sorted(ALL.built_in())] == sorted(ALL.built_in()))"
    )
    assert run("-c", code) == "True\n"


def test_inspecting_a_foreign_file_needs_no_torch(foreign: Path, trained: Path) -> None:
    code = (
        "import sys\n"
        "from compressor.cli.main import run\n"
        "assert run(['inspect', 'foreign.safetensors']) == 0\n"
        "print('torch' in sys.modules)"
    )
    assert run("-c", code, path=foreign, cwd=trained).endswith("False\n")
