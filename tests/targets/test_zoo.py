"""A checkpoint of the zoo through every target that is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

import compressor
from compressor.deployment.estimate import estimate
from compressor.deployment.registry import TARGETS
from compressor.model_zoo import packed_path


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_checkpoint_goes_through(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    if not all(find_spec(package) for package in target.packages):
        pytest.skip(f"needs {target.install}")
    if not target.writes:
        total = estimate(packed_path("zoo:test_resnet-tiny"), name).total
        assert 0 < total.per_tensor < total.uncoded / 2
        return
    done = compressor.export(packed_path("zoo:test_resnet-tiny"), name, tmp_path / f"net{target.suffix}")
    assert done.difference <= target.tolerance
    assert done.exported < done.dense / 2
