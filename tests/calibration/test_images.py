"""Calibration images, from a tensor or from batches as loaders give them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compressor.calibration.image_shape import image_shape
from compressor.calibration.images import batches_of, calibration_images, images_for
from compressor.formats.errors import UsageError


def numbered(count: int) -> Tensor:
    """Returns images whose pixels are all their number."""
    return torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def test_a_tensor_is_taken_whole() -> None:
    images = numbered(1100)
    assert calibration_images(images) is images


def test_batches_with_and_without_targets() -> None:
    images = numbered(40)
    both = DataLoader(TensorDataset(images, torch.zeros(40)), 16)
    alone = DataLoader(TensorDataset(images), 16)
    for batches in (both, alone, list(images.split(16)), iter(images.split(16)), [(part,) for part in images.split(7)]):
        assert torch.equal(calibration_images(batches), images)


def test_no_more_batches_are_drawn_than_are_needed() -> None:
    drawn: list[int] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            drawn.append(len(drawn))
            yield numbered(100) + 100 * drawn[-1], torch.zeros(100)

    images = calibration_images(batches())
    assert len(drawn) == 11
    assert images[:, 0, 0, 0].tolist() == list(range(1024))


@pytest.mark.parametrize("count", [0, 1, 15])
def test_few_images_are_refused(count: int) -> None:
    message = rf"^calibration: {count} images, expected at least 16, better 256$"
    for given in (numbered(count), list(numbered(count).split(4)) if count else []):
        with pytest.raises(UsageError, match=message):
            calibration_images(given)
    assert len(calibration_images(numbered(16))) == 16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    images = numbered(20).clone()
    images[7, 0, 1, 1] = value
    with pytest.raises(UsageError, match=r"^calibration: some values of the images are NaN or infinite$"):
        calibration_images(images)


@pytest.mark.parametrize(
    ("batch", "kind"), [({"image": numbered(20)}, "dict"), ([], "list"), (["cat"], "list"), (3, "int")]
)
def test_batches_that_are_no_images_are_refused(batch: Any, kind: str) -> None:
    message = rf"^calibration: a batch must be a tensor or begin with one, got {kind}: give the loader a collate_fn"
    with pytest.raises(UsageError, match=message):
        calibration_images([batch])


def test_a_tensor_without_axes_is_refused() -> None:
    for given in (torch.tensor(1.0), [torch.tensor(1.0)]):
        with pytest.raises(UsageError, match=r"^calibration(:| must be images, or batches of them, got tensor)"):
            calibration_images(given)


@pytest.mark.parametrize("given", [3, None, object()])
def test_what_cannot_be_iterated_is_refused(given: Any) -> None:
    with pytest.raises(UsageError, match=r"^calibration must be images, or batches of them, got "):
        calibration_images(given)


def test_images_of_several_shapes_are_refused() -> None:
    message = r"^calibration: images of several shapes, \(1, 2, 2\) and \(1, 3, 3\): give them one$"
    with pytest.raises(UsageError, match=message):
        calibration_images([torch.zeros(20, 1, 3, 3), torch.zeros(20, 1, 2, 2)])


def test_whole_numbers_are_kept_for_models_that_embed_them() -> None:
    assert calibration_images([torch.arange(40).view(20, 2)]).dtype == torch.int64


class Square(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.pretrained_cfg = {"input_size": (1, 8, 8)}


def test_what_a_caller_gives_is_data() -> None:
    given = images_for(nn.Identity(), numbered(20), seed=0)
    assert given.source == "data"
    assert torch.equal(given.images, numbered(20))


def test_the_word_synthetic_asks_for_images_made_from_the_model() -> None:
    model = Square()
    assert image_shape(model) == (1, 8, 8)
    made, again, other = (images_for(model, "synthetic", seed) for seed in (0, 0, 1))
    assert made.images.shape == (256, 1, 8, 8)
    assert made.source == "batch-norm statistics"
    assert torch.equal(made.images, again.images)
    assert not torch.equal(made.images, other.images)
    model[1] = nn.Identity()
    assert images_for(model, "synthetic", 0).source == "noise"


def test_the_word_is_no_use_without_a_shape() -> None:
    message = r"^calibration='synthetic': it is not known which images the model takes; give it images$"
    with pytest.raises(UsageError, match=message):
        images_for(nn.Linear(2, 2), "synthetic", 0)


def test_other_words_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^calibration must be images, 'synthetic' or None, got 'noise'$"):
        images_for(Square(), "noise", 0)


def test_large_images_come_in_smaller_batches() -> None:
    for side, count, sizes in ((32, 150, [64, 64, 22]), (224, 14, [6, 6, 2]), (1100, 2, [1, 1])):
        images = torch.zeros(1, 3, side, side).expand(count, -1, -1, -1)
        assert [len(batch) for batch in batches_of(images)] == sizes
