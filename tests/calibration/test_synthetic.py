"""Images made from a model alone resemble its training images in the statistics of every BatchNorm layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from compressor.calibration.image_shape import image_shape
from compressor.calibration.synthetic import batch_norm_mismatch, synthetic_images
from compressor.formats.errors import UsageError
from compressor.rng import random_state

SHAPE = (1, 12, 12)


def network(**norm: Any) -> nn.Sequential:
    """Returns a classifier whose BatchNorm layers have seen images that are neither centred nor white."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, **norm), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2),
        nn.BatchNorm2d(8, **norm), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4), nn.BatchNorm1d(4, **norm),
    )  # fmt: skip
    for _ in range(40):
        net(training_images())
    return net


def training_images() -> Tensor:
    return 0.5 + 4 * F.avg_pool2d(torch.randn(64, 1, 14, 14), 3, stride=1)


def mismatch(net: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        value, _ = batch_norm_mismatch(net.eval(), images)
    assert value is not None
    return float(value)


@contextmanager
def unchanged(net: nn.Module) -> Iterator[None]:
    """Compares all that is to stay as it was: tensors, gradients, flags, modes, hooks and the global generators."""

    def state() -> list[Any]:
        tensors = [*net.parameters(), *net.buffers()]
        return [
            [(tensor.detach().clone(), tensor.requires_grad, tensor.grad, tensor._version) for tensor in tensors],
            [(m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in net.modules()],
            random_state(), torch.is_grad_enabled(),
        ]  # fmt: skip

    before = state()
    yield
    after = tree_leaves(state())
    assert all(np.array_equal(new, old) for new, old in zip(after, tree_leaves(before), strict=True))


def test_statistics_come_nearer_to_the_running_ones() -> None:
    net = network()
    made = synthetic_images(net, SHAPE, count=64)
    assert made.source == "batch-norm statistics"
    assert made.images.shape == (64, *SHAPE)
    assert made.images.dtype == torch.float32
    noise = synthetic_images(net, SHAPE, count=64, steps=0).images
    assert mismatch(net, made.images) < mismatch(net, noise) / 50
    assert mismatch(net, made.images) < mismatch(net, training_images())


def test_all_classes_occur() -> None:
    net = nn.Sequential(network(), nn.Flatten(), Biased())
    images = synthetic_images(net, SHAPE, count=64).images
    with torch.no_grad():
        mean = net.eval()(images).softmax(1).mean(0)
    assert mean.min() > 0.1


class Biased(nn.Module):
    """Prefers the first class, unless the images are chosen against it."""

    def forward(self, logits: Tensor) -> Tensor:
        return 2 * logits + torch.tensor([1.0, 0.0, 0.0, 0.0])


def test_batches_are_matched_one_by_one_and_none_is_too_small() -> None:
    net = network()
    made = synthetic_images(net, SHAPE, count=65, steps=20).images
    assert len(made) == 65
    assert mismatch(net, made[:33]) < 0.2
    assert mismatch(net, made[33:]) < 0.2


def test_the_seed_decides() -> None:
    net = network()
    first, again, other = (synthetic_images(net, SHAPE, 16, seed, 3).images for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_model_that_draws_random_numbers_is_matched_the_same_way_twice() -> None:
    net = nn.Sequential(Jitter(), network())
    first, again = (synthetic_images(net, SHAPE, 16, steps=3).images for _ in range(2))
    assert torch.equal(first, again)


class Jitter(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images + torch.rand_like(images)


@pytest.mark.parametrize("training", [True, False])
def test_model_and_generators_stay_as_they_were(training: bool) -> None:
    trained = network()
    net = nn.Sequential(nn.Dropout(), trained).train(training)
    trained[1].eval()
    trained[0].requires_grad_(False)
    trained.register_forward_pre_hook(lambda *_: None)
    with unchanged(net):
        synthetic_images(net, SHAPE, 16, steps=2)
    with unchanged(net), pytest.raises(UsageError):
        synthetic_images(net, (2, 12, 12), 16, steps=2)


def test_gradients_are_computed_inside_no_grad() -> None:
    net = network()
    with torch.no_grad():
        made = synthetic_images(net, SHAPE, 16, steps=3)
    assert torch.equal(made.images, synthetic_images(net, SHAPE, 16, steps=3).images)
    assert not made.images.requires_grad


def test_modes_are_set_without_calling_what_a_module_does_on_train() -> None:
    class Merging(nn.Identity):
        def train(self, mode: bool = True) -> Merging:
            raise AssertionError

    assert synthetic_images(nn.Sequential(Merging(), network()), SHAPE, 16, steps=1).source == "batch-norm statistics"


def test_half_precision_models_are_matched() -> None:
    net = network().bfloat16()
    made = synthetic_images(net, SHAPE, 32).images
    assert made.dtype == torch.float32
    assert mismatch(net.float(), made) < 0.1


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.LayerNorm(8), nn.Linear(8, 3)),
        network(track_running_stats=False),
    ],
    ids=["layer norm", "no running statistics"],
)
def test_without_statistics_there_is_noise(net: nn.Module) -> None:
    made = synthetic_images(net, SHAPE, 16)
    assert made.source == "noise"
    assert made.images.shape == (16, *SHAPE)
    assert float(made.images.std()) == pytest.approx(1, rel=0.1)
    assert torch.equal(made.images, synthetic_images(net, SHAPE, 16, steps=0).images)


def test_layers_without_running_statistics_are_skipped() -> None:
    net = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), network())
    assert synthetic_images(net, SHAPE, 16, steps=2).source == "batch-norm statistics"


def test_where_no_gradient_reaches_the_images_there_is_noise() -> None:
    class Opaque(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.detach()

    assert synthetic_images(nn.Sequential(Opaque(), network().requires_grad_(False)), SHAPE, 16).source == "noise"
    assert synthetic_images(nn.Sequential(Opaque(), network()), SHAPE, 16).source == "noise"


def test_timm_norms_with_activation_count() -> None:
    net = timm.create_model("test_resnet", in_chans=1, num_classes=4)
    made = synthetic_images(net, (1, 16, 16), 8, steps=2)
    assert made.source == "batch-norm statistics"


def test_other_shapes_are_refused() -> None:
    net = timm.create_model("test_vit", img_size=32, num_classes=4)
    message = (
        r"^the model does not take noise images of \(3, 24, 24\) \(AssertionError: .*\); pass images of \(3, 32, 32\), "
        r"the shape that timm gives for it, or calibration images of yours, float\[n, C, H, W\]$"
    )
    with pytest.raises(UsageError, match=message):
        synthetic_images(net, (3, 24, 24), 8)
    message = (
        r"^the model does not take noise images of \(2, 12, 12\) \(RuntimeError: .*\); "
        r"pass calibration images of yours, float\[n, C, H, W\]$"
    )
    with pytest.raises(UsageError, match=message):
        synthetic_images(network(), (2, 12, 12), 8)


def test_values_that_are_not_finite_are_refused() -> None:
    net = network()
    nn.init.constant_(net.get_parameter("7.bias"), float("nan"))
    message = r"^the model returns values that are not finite for noise images of \(1, 12, 12\); pass calibration"
    with pytest.raises(UsageError, match=message):
        synthetic_images(net, SHAPE, 8)


def test_a_model_without_values_and_no_images_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^the model is on the meta device, where it has no values: load its weights"):
        synthetic_images(network().to("meta"), SHAPE, 8)
    with pytest.raises(UsageError, match=r"^count: at least 1 image is to be made, got 0$"):
        synthetic_images(network(), SHAPE, 0)


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("test_resnet", {}, (3, 160, 160)),
        ("test_resnet", {"in_chans": 1}, (1, 160, 160)),
        ("test_vit", {"img_size": 32}, (3, 32, 32)),
        ("test_vit", {"img_size": (32, 48), "in_chans": 1}, (1, 32, 48)),
    ],
)
def test_timm_models_say_which_images_they_take(name: str, args: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert image_shape(timm.create_model(name, **args)) == expected


def test_the_first_layer_may_have_been_replaced() -> None:
    net: Any = timm.create_model("test_resnet")
    net.conv1[0] = nn.Conv2d(2, net.conv1[0].out_channels, 3)
    assert image_shape(net) == (2, 160, 160)


@pytest.mark.parametrize("cfg", [None, {}, {"input_size": (3,)}, {"input_size": None}, "resnet18"])
def test_other_modules_do_not_say_which_images_they_take(cfg: Any) -> None:
    net: Any = network()
    if cfg is not None:
        net.pretrained_cfg = cfg
    assert image_shape(net) is None
