"""A bigger teacher of its own: read, checked, shown what it was trained on, and learnt from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from compressor import Compressor, Policy, Rule
from compressor.formats.errors import FileError, MissingError, UsageError
from compressor.models.teacher import Renormalised, load_teacher, with_normalization

ARGS = {"num_classes": 10, "in_chans": 1}
TEACHER, STUDENT = "test_resnet", "test_efficientnet"
HALF = (0.5,), (0.5,)
QUICK = ("--baseline-epochs", "1", "--epochs", "1", "--scheme", "kmeans", "--bits", "4")


pytestmark = pytest.mark.usefixtures("own_folder", "one_worker")


def model_of(name: str, seed: int = 0, **args: Any) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(name, **{**ARGS, **args})
    return model.eval()


def packed(model: nn.Module, path: str = "packed.safetensors", **cfg: Any) -> nn.Module:
    """Write a packed file; give the model that is in it."""
    model.pretrained_cfg = {**model.pretrained_cfg, **cfg}  # type: ignore[assignment, dict-item]
    job = Compressor(model, Policy([Rule("*", scheme="kmeans", bits=6)]), model_args=ARGS, teacher=None)
    job.prepare().finish().save(path)
    return job.model.eval()


numbers = st.floats(-2, 2, width=32)
positive = st.floats(0.125, 4, width=32)


@given(st.tuples(numbers, positive), st.tuples(numbers, positive), st.lists(numbers, min_size=1, max_size=8))
def test_renormalised_sees_the_images_of_its_own_normalisation(
    ours: tuple[float, float], theirs: tuple[float, float], pixels: list[float]
) -> None:
    raw = torch.tensor(pixels, dtype=torch.float64).view(1, 1, 1, -1)
    pairs = [([mean], [std]) for mean, std in (ours, theirs)]
    model = Renormalised(nn.Identity(), pairs[0], pairs[1]).double()
    seen = model((raw - ours[0]) / ours[1])
    torch.testing.assert_close(seen, (raw - theirs[0]) / theirs[1], rtol=1e-5, atol=1e-4)


def test_plain_checkpoint() -> None:
    model, images = model_of(TEACHER), torch.randn(2, 1, 32, 32)
    save_file(model.state_dict(), "plain.safetensors")
    loaded = load_teacher(Path("plain.safetensors"), TEACHER, ARGS, *HALF)
    assert torch.equal(loaded(images), model(images))


def test_packed_file_of_the_same_architecture_under_a_tag() -> None:
    model, images = packed(model_of(f"{TEACHER}.r160_in1k")), torch.randn(2, 1, 32, 32)
    loaded = load_teacher(Path("packed.safetensors"), TEACHER, ARGS, *HALF)  # timm's normalisation is for 3 channels
    assert torch.equal(loaded(images), model(images))


def test_packed_file_knows_its_normalisation() -> None:
    model, raw = packed(model_of(TEACHER), mean=(0.25,), std=(2.0,)), torch.rand(2, 1, 32, 32)
    loaded = load_teacher(Path("packed.safetensors"), TEACHER, ARGS, (0.25,), (2.0,))
    assert torch.equal(loaded(raw), model(raw))
    other = load_teacher(Path("packed.safetensors"), TEACHER, ARGS, *HALF)
    torch.testing.assert_close(other((raw - 0.5) / 0.5), model((raw - 0.25) / 2.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "own", [{"mean": "half"}, {"std": ["a"]}, {"std": (0.0,)}, {"mean": (float("nan"),)}, {"std": None}]
)
def test_normalisation_that_cannot_be(own: dict[str, Any]) -> None:
    with pytest.raises(MissingError, match=r"it is for images normalised by .* expected numbers, std above 0"):
        with_normalization(nn.Identity(), *HALF, own)


def refused(path: str, name: str = TEACHER) -> str:
    with pytest.raises(MissingError) as caught:
        load_teacher(Path(path), name, ARGS, *HALF)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_checkpoint_of_other_classes_or_another_architecture() -> None:
    save_file(model_of(TEACHER, num_classes=7).state_dict(), "seven.safetensors")
    assert refused("seven.safetensors").startswith(
        "seven.safetensors: 7 classes in the checkpoint: a teacher needs the 10 of its"
    )
    save_file(model_of(TEACHER, in_chans=3).state_dict(), "colour.safetensors")
    said = refused("colour.safetensors")
    assert re.search(r"holds no test_resnet: \S+ \(\d+, 3, 3, 3\), expected \(\d+, 1, 3, 3\)$", said)
    save_file(model_of(STUDENT).state_dict(), "other.safetensors")
    said = refused("other.safetensors")
    assert said.startswith("other.safetensors holds no test_resnet: ")
    assert re.search(r" and \d+ more$", said)
    packed(model_of(STUDENT), "other-packed.safetensors")
    said = refused("other-packed.safetensors")
    assert said == "other-packed.safetensors holds a 'test_efficientnet', expected a 'test_resnet'"


def test_weights_that_are_not_finite() -> None:
    state = model_of(TEACHER).state_dict()
    state["fc.weight"][3, 3] = float("nan")
    save_file(state, "nan.safetensors")
    assert refused("nan.safetensors") == "nan.safetensors: fc.weight has weights that are NaN or infinite"


def test_files_that_are_no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def unpickled(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was read")

    torch.save(model_of(TEACHER).state_dict(), "pickle.pth")
    torch.save(model_of(TEACHER).state_dict(), "named.safetensors")
    Path("cut.safetensors").write_bytes(b"\x08")
    monkeypatch.setattr("torch.load", unpickled)
    for name in ("pickle.pth", "named.safetensors", "cut.safetensors"):
        assert refused(name).startswith(f"{name}: damaged, or no safetensors file (")
    assert refused("none.safetensors") == "none.safetensors: no such file"
    assert refused(".") == ".: a folder, expected a file"


def test_damaged_packed_file() -> None:
    packed(model_of(TEACHER))
    data = bytearray(Path("packed.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    Path("flipped.safetensors").write_bytes(data)
    with pytest.raises(FileError, match=r"flipped\.safetensors"):
        load_teacher(Path("flipped.safetensors"), TEACHER, ARGS, *HALF)


def test_teacher_of_other_classes_in_python() -> None:
    class One(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs[:, :1]

    model = nn.Sequential(nn.Linear(16, 10))
    job = Compressor(model, Policy([Rule("*", scheme="kmeans", bits=2)]), teacher=One()).prepare()
    inputs = torch.randn(4, 16)
    with pytest.raises(UsageError, match=r"the teacher's output is \(4, 1\), expected \(4, 10\)"):
        job.loss(job.model(inputs), torch.zeros(4, dtype=torch.long), inputs)
