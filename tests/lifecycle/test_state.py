"""State that a packed file cannot hold is refused at once; finish() and save() can be tried again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor import Compressor, Policy, Rule
from compressor.formats.errors import CompressorError, ResourceError, UsageError

POLICY = Policy([Rule("*.weight", scheme="kmeans", bits=2)])


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def net(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), *extra)


def with_buffer(value: Tensor, name: str = "extra") -> nn.Module:
    model = net()
    model.register_buffer(name, value)
    return model


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (lambda: net(Extra(16, 4)), r"state '2._extra_state' is a dict, not a tensor"),
        (lambda: with_buffer(torch.zeros(2, dtype=torch.complex64)), r"extra: a .*complex64 tensor cannot be packed"),
        (lambda: with_buffer(torch.eye(4).to_sparse()), "extra: a .*sparse.* tensor cannot be packed"),
        (lambda: with_buffer(torch.zeros(2), "two words"), "tensor name 'two words', expected no spaces"),
        (lambda: with_buffer(torch.zeros(2), "bell\x07"), r"tensor name 'bell\\x07', expected no spaces, no control"),
        (lambda: with_buffer(torch.zeros(2), "x" * 513), "expected 1 to 512 characters"),
        (lambda: with_buffer(torch.zeros([1] * 9)), "shape of 'extra' .* at most 8 sizes"),
        (lambda: with_buffer(torch.ones(2, device="meta")), "extra: a meta tensor cannot be packed"),
    ],
)
def test_state_that_cannot_be_packed_is_refused_in_the_constructor(model: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Compressor(model(), POLICY, teacher=None, copy=False)


def test_finish_can_be_tried_again(tmp_path: Path) -> None:
    job = Compressor(net(), POLICY, teacher=None).prepare()

    def broken() -> Any:
        yield torch.randn(4, 16), torch.zeros(4)
        raise OSError("the disk is gone")

    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            job.finish(calibration=broken())
    batches = [(torch.full((2, 16), 3.0), torch.zeros(2))]
    packed = job.finish(calibration=batches)
    packed.save(tmp_path / "a")
    model: Any = job.model
    assert len(model[0].weight.unique()) <= 4
    expected = model[0](torch.full((1, 16), 3.0))[0]
    torch.testing.assert_close(model[1].running_mean, expected)
    loaded = compressor.load(tmp_path / "a", model=net())
    x = torch.randn(3, 16)
    assert torch.equal(loaded(x), model.eval()(x))
    with pytest.raises(UsageError, match=r"finish\(\) after finish\(\): "):
        job.finish()


def test_finish_can_be_tried_again_after_a_state_has_appeared(tmp_path: Path) -> None:
    job = Compressor(net(), POLICY, teacher=None).prepare()
    job.model.register_buffer("late", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(UsageError, match="late"):
        job.finish()
    del job.model.late
    job.finish().save(tmp_path / "a")
    assert set(compressor.load_state_dict(tmp_path / "a")) == set(net().state_dict())


def test_save_can_be_tried_again(tmp_path: Path) -> None:
    packed = Compressor(net(), POLICY, teacher=None).prepare().finish()
    with pytest.raises(ResourceError):
        packed.save(tmp_path / "none" / "a")
    with pytest.raises(CompressorError):
        packed.save(tmp_path / "a", codec="nosuch")
    assert packed.save(tmp_path / "a") == (tmp_path / "a").stat().st_size
