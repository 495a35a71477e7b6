"""What every export target keeps to, whichever there are: none is named here."""

from __future__ import annotations

from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compressor.deployment.estimate import estimate
from compressor.deployment.export import Exported, export
from compressor.deployment.registry import TARGETS, describe, make_target
from compressor.deployment.target import Target
from compressor.formats.errors import IntegrityError, UsageError
from tests.helpers.file_commands import pack_module


def installed(name: str) -> bool:
    return all(find_spec(package) is not None for package in TARGETS[name].packages)


def parameters(writes: bool) -> list[Any]:
    """Returns the targets that write files, or those that do not; those that are not installed are skipped."""
    return [
        pytest.param(name, marks=() if installed(name) else pytest.mark.skip(f"needs {TARGETS[name].install}"))
        for name in sorted(TARGETS)
        if TARGETS[name].writes == writes
    ]


every_target = pytest.mark.parametrize("name", parameters(writes=True))


def net() -> nn.Module:
    """Returns a small network with a convolution, its norm and a linear layer."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
    )
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def packed_net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the network as a packed file."""
    path = tmp_path_factory.mktemp("packed") / "net.safetensors"
    pack_module(path, net(), 3)
    return path


def export_net(packed: Path, name: str, output: Path) -> Exported:
    images = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    return export(packed, name, output, model=net(), inputs=images)


@pytest.fixture(scope="module")
def exported(packed_net: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Returns what each target has written, as it is asked for."""
    folder = tmp_path_factory.mktemp("exported")

    class Written(dict[str, Exported]):
        def __missing__(self, name: str) -> Exported:
            self[name] = export_net(packed_net, name, folder / make_target(name, {}).file_name("net"))
            return self[name]

    return Written()


def within(path: Path) -> list[Path]:
    """Returns a file, or the files of a folder."""
    return sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]


@every_target
def test_it_is_written_run_and_compared(name: str, exported: dict[str, Exported], packed_net: Path) -> None:
    done, target = exported[name], TARGETS[name]()
    assert done.path.suffix == target.suffix
    files = [done.path, *map(done.path.with_suffix, target.companions)]
    assert done.path.is_dir() == target.folder
    assert done.exported == sum(path.stat().st_size for file in files for path in within(file)) > 0
    assert done.run == target.runs
    assert {*done.path.parent.glob(f"{done.path.stem}.*")} >= {*files}
    assert (done.target, done.packed) == (name, packed_net.stat().st_size)
    assert 0 <= done.difference <= target.tolerance <= 1e-3
    assert done.packed < done.dense
    assert str(done.path) in done.usage


@every_target
def test_it_is_the_same_again(name: str, exported: dict[str, Exported], packed_net: Path, tmp_path: Path) -> None:
    again = export_net(packed_net, name, tmp_path / f"again{TARGETS[name].suffix}")
    for ending in (TARGETS[name].suffix, *TARGETS[name].companions):
        written = within(again.path.with_suffix(ending)), within(exported[name].path.with_suffix(ending))
        assert [path.read_bytes() for path in written[0]] == [path.read_bytes() for path in written[1]]


@every_target
def test_it_says_nothing_of_this_machine(name: str, exported: dict[str, Exported]) -> None:
    data = b"".join(path.read_bytes() for path in within(exported[name].path))
    for path in (Path(__file__).resolve().parents[2], Path(np.__file__).parent):
        assert str(path).encode() not in data


@every_target
def test_what_computes_something_else_is_not_written(
    name: str, exported: dict[str, Exported], packed_net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = within(exported[name].path)[0].read_bytes()
    endings = TARGETS[name].suffix, *TARGETS[name].companions
    monkeypatch.setattr(TARGETS[name], "build", lambda self, model: dict.fromkeys(endings, data))
    monkeypatch.setattr(TARGETS[name], "difference", lambda self, written, model: float("nan"))
    with pytest.raises(IntegrityError, match="differs by nan"):
        export_net(packed_net, name, tmp_path / f"out{TARGETS[name].suffix}")
    assert not list(tmp_path.iterdir())


@every_target
def test_where_there_is_no_estimate_it_says_what_to_do(name: str, packed_net: Path) -> None:
    if TARGETS[name].estimate is Target.estimate:
        with pytest.raises(UsageError, match=f"target '{name}' gives no estimate: without --estimate it writes"):
            estimate(packed_net, name)
    else:
        assert estimate(packed_net, name).layers


@pytest.mark.parametrize("name", parameters(writes=False))
def test_what_writes_no_file_estimates_layers(name: str, packed_net: Path, tmp_path: Path) -> None:
    found = estimate(packed_net, name)
    assert (found.target, found.limits) == (name, TARGETS[name].limits)
    assert [layer.site for layer in found.layers] == ["0.weight", "5.weight"]
    assert [layer.shape for layer in found.layers] == [(32, 3, 3, 3), (64, 128)]
    assert found.total.per_tensor == sum(layer.per_tensor for layer in found.layers) < found.total.uncoded
    with pytest.raises(UsageError, match=f"target '{name}' writes no file: --estimate"):
        export_net(packed_net, name, tmp_path / "net")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_it_is_described_in_single_lines(name: str) -> None:
    target, facts = TARGETS[name](), describe(TARGETS[name])
    assert bool(target.packages) == bool(target.install)
    assert facts["id"] == name == target.id
    assert facts["settings"] == {field.name: field.default for field in fields(TARGETS[name])}  # type: ignore[arg-type]
    for text in (facts["summary"], facts["limits"]):
        assert 20 < len(text) < 250
        assert "\n" not in text
    assert target.file_name("net").endswith(target.suffix)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_an_unknown_setting_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"target '{name}' has no setting 'colour'"):
        make_target(name, {"colour": 1})
