"""Mixed images and smoothed labels: timm's own, whatever the batch, and in a training that is resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from compressor import Compressor, Policy, Rule
from compressor.checkpointing.manager import Checkpoints
from compressor.formats.errors import InterruptionError, UsageError
from compressor.rng import seed_all
from compressor.training.mixup import make_mixup, mix_batch


def images_of(count: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(count)
    return torch.rand(count, 1, 6, 6, generator=random), torch.randint(3, (count,), generator=random)


@given(st.integers(1, 9), st.sampled_from([0.0, 0.4, 1.0]), st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 0.1]))
def test_labels_are_shares_and_the_batch_is_not_touched(
    count: int, mixup: float, cutmix: float, smoothing: float
) -> None:
    images, labels = images_of(count)
    before = images.clone(), labels.clone()
    mixer = make_mixup(mixup, cutmix, smoothing, classes=3)
    if mixer is None:
        assert mixup == cutmix == smoothing == 0
        return
    new, shares = mix_batch(mixer, images, labels)
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
    assert new.shape == images.shape
    assert shares.shape == (count, 3)
    torch.testing.assert_close(shares.sum(1), torch.ones(count))
    assert bool((new >= images.min()).all() and (new <= images.max()).all())
    if not (mixup or cutmix):
        assert torch.equal(new, images)
        torch.testing.assert_close(shares, functional.one_hot(labels, 3) * (1 - smoothing) + smoothing / 3)


@pytest.mark.parametrize("count", [4, 7])
def test_it_is_timms(count: int) -> None:
    images, labels = images_of(count)
    place = [*range(count), *([count - 1] if count % 2 else [])]
    seed_all(5)
    whole = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=3)  # type: ignore[no-untyped-call]
    timms = whole(images[place], labels[place])
    seed_all(5)
    mixer = make_mixup(0.8, 1.0, 0.1, classes=3)
    assert mixer is not None
    for ours, theirs in zip(mix_batch(mixer, images, labels), timms, strict=True):
        assert torch.equal(ours, theirs[:count])


def finetuned(mixup: object, checkpoints: Checkpoints | None = None, stop: int | None = None) -> bytes:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    job = Compressor(net, Policy([Rule("*", scheme="learnt", bits=2)]), seed=1).prepare()
    random = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(*images_of(21)), 4, shuffle=True, generator=random)

    def on_step(done: int, *_: object) -> None:
        if checkpoints is not None:
            checkpoints.stop = done == stop

    try:
        job.finetune(loader, epochs=2, lr=0.01, mixup=mixup, checkpoints=checkpoints, on_step=on_step)
    finally:
        if checkpoints is not None:
            checkpoints.close()
    return job.finish().to_bytes()


def test_it_trains_and_goes_on(tmp_path: Path) -> None:
    mixer = make_mixup(0.8, 0.0, 0.1, classes=3)
    whole = finetuned(mixer)
    assert finetuned(mixer) == whole
    assert finetuned(None) != whole
    with pytest.raises(InterruptionError, match="after step 8 of 12"):
        finetuned(mixer, Checkpoints(tmp_path / "c"), stop=7)
    other = make_mixup(0.8, 0.0, 0.2, classes=3)
    with pytest.raises(UsageError, match=r"mixup was .*'label_smoothing': 0\.1.*, is .*'label_smoothing': 0\.2"):
        finetuned(other, Checkpoints(tmp_path / "c", resume=True))
    assert finetuned(mixer, Checkpoints(tmp_path / "c", resume=True)) == whole
