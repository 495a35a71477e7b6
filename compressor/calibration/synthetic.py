"""Images made from a model itself, for calibration without data.

A BatchNorm layer remembers mean and variance of its inputs over the training images. Images whose activations have the
same means and variances in every such layer resemble the training images where it counts: in what each layer sees
(Yin et al., "Dreaming to Distill", 2020; Cai et al., "ZeroQ", 2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from compressor.calibration.image_shape import image_shape
from compressor.formats.errors import UsageError
from compressor.rng import seeded
from compressor.training.modes import eval_flags

__all__ = ["SyntheticImages", "batch_norm_mismatch", "synthetic_images"]

_BATCH = 64  # images that are optimised together, which have the running statistics as a whole
_LEARNING_RATE = 0.2  # at the start, falling to 0 as a cosine
_BETAS = (0.5, 0.9)  # of Adam: a few dozen steps have no time for a long memory
_COARSENESS = 4  # pixels between the independent values of smooth noise
_WHITE = 0.1  # standard deviation of the white noise on top, relative to the smooth noise


@dataclass(frozen=True)
class SyntheticImages:
    """Images that were made without data.

    Args:
        images: float32[n, C, H, W] on the CPU, normalised as the model takes them.
        source: what they were made of: "batch-norm statistics" or "noise".
    """

    images: Tensor
    source: str


def synthetic_images(
    model: nn.Module, shape: tuple[int, int, int], count: int = 256, seed: int = 0, steps: int = 30
) -> SyntheticImages:
    """Makes images for which the inputs of each BatchNorm layer have the mean and variance that it remembers.

    Smooth noise is optimised by Adam. The loss is ``batch_norm_mismatch``, plus, for a classifier, how far the entropy
    of the mean prediction is below the highest possible, so that all classes occur. The model, its modes and hooks, and
    the global random generators are left as they were. On a CPU the same seed gives the same images.

    Args:
        model: the model; it is run in eval mode.
        shape: channels, height and width of an image.
        count: number of images.
        seed: of the noise, 0 to 2^32 - 1.
        steps: steps of the optimiser; each runs the model forward and backward on all images.

    Returns:
        The images; smooth noise where the model has no BatchNorm layer with statistics, or no gradient reaches the
        images.

    Raises:
        UsageError: ``count`` is less than 1, the model has no values (it is on ``meta``), does not take images of this
            shape, or returns values that are not finite.
    """
    if count < 1:
        raise UsageError(f"count: at least 1 image is to be made, got {count}")
    noise = _smooth_noise((count, *shape), torch.Generator().manual_seed(seed))
    like = next((tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.is_floating_point()), noise)
    if like.is_meta:
        raise UsageError("the model is on the meta device, where it has no values: load its weights first")
    with eval_flags(model), seeded(seed):
        _check_output(model, noise[:2].to(like), shape)
        parts = noise.tensor_split(math.ceil(count / _BATCH))
        matched = [_matched(model, part, like, steps) for part in parts]
    images = [image for image in matched if image is not None]
    if not images:
        return SyntheticImages(noise, "noise")
    return SyntheticImages(torch.cat(images), "batch-norm statistics")


def _smooth_noise(shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """Returns Gaussian noise of low resolution, enlarged, and a little white noise, together of unit variance."""
    count, channels, height, width = shape
    coarse = (math.ceil(height / _COARSENESS), math.ceil(width / _COARSENESS))
    low = torch.randn(count, channels, *coarse, generator=generator)
    smooth = F.interpolate(low, size=(height, width), mode="bilinear", align_corners=False)
    noise = smooth / smooth.square().mean().sqrt() + _WHITE * torch.randn(shape, generator=generator)
    return noise / math.sqrt(1 + _WHITE**2)


def _check_output(model: nn.Module, images: Tensor, shape: tuple[int, ...]) -> None:
    """Runs a model once.

    Raises:
        UsageError: it does not take the images, or returns values that are not finite.
    """
    known = image_shape(model)
    other = f"images of {known}, the shape that timm gives for it, or " if known not in (None, shape) else ""
    advice = f"pass {other}calibration images of yours, float[n, C, H, W]"
    try:
        with torch.no_grad():
            output = model(images)
    except Exception as error:  # whatever a model raises, it does not take these images
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(f"the model does not take noise images of {shape} ({reason}); {advice}") from None
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not all(bool(leaf.isfinite().all()) for leaf in leaves):
        raise UsageError(f"the model returns values that are not finite for noise images of {shape}; {advice}")


def _matched(model: nn.Module, noise: Tensor, like: Tensor, steps: int) -> Tensor | None:
    """Optimises one batch of images from noise; returns None where no gradient reaches them."""
    images = noise.to(like.device).requires_grad_(True)
    optimizer = torch.optim.Adam([images], lr=_LEARNING_RATE, betas=_BETAS)
    for step in range(steps):
        with torch.enable_grad():
            mismatch, output = batch_norm_mismatch(model, images.to(like.dtype))
            gradient = None if mismatch is None else _gradient(mismatch + _imbalance(output), images)
        if gradient is None:
            return None
        images.grad = gradient.nan_to_num(0.0, 0.0, 0.0)  # a pixel without a usable gradient stays where it is
        optimizer.param_groups[0]["lr"] = _LEARNING_RATE * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.step()
    return images.detach().cpu()


def _gradient(loss: Tensor, images: Tensor) -> Tensor | None:
    """Returns the gradient of the images alone, so that parameters and their ``.grad`` are not touched."""
    if not loss.requires_grad:
        return None
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(loss, [images], allow_unused=True)
    return gradients[0]


def batch_norm_mismatch(model: nn.Module, images: Tensor) -> tuple[Tensor | None, object]:
    """Runs a model, and returns how far the inputs of its BatchNorm layers are from their running statistics.

    With mean m and standard deviation s of a channel's inputs, and M and S of its running statistics, this is
    ``((m - M)^2 + (s - S)^2) / S^2``, averaged over the channels of a layer and then over the calls of all layers.
    Layers without running statistics do not count.

    Args:
        model: the model, in eval mode.
        images: float[n, C, H, W].

    Returns:
        The mismatch, None where the model calls no such layer; and the output of the model.
    """
    terms: list[Tensor] = []

    def listen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, _BatchNorm)
        assert module.running_mean is not None
        assert module.running_var is not None
        values = inputs[0].float()
        variance, mean = torch.var_mean(values, [dim for dim in range(values.ndim) if dim != 1], correction=0)
        expected = module.running_var.float() + module.eps
        deviation = (variance + module.eps).sqrt() - expected.sqrt()
        shift = mean - module.running_mean.float()
        terms.append(((shift.square() + deviation.square()) / expected).mean().to(images.device))

    hooks = [layer.register_forward_pre_hook(listen) for layer in _layers_with_statistics(model)]
    try:
        output = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return (torch.stack(terms).mean() if terms else None), output


def _layers_with_statistics(model: nn.Module) -> Sequence[nn.Module]:
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [norm for norm in norms if norm.running_mean is not None and norm.running_var is not None]


def _imbalance(output: object) -> Tensor | float:
    """Returns how far the entropy of the mean prediction is below that of a batch of as many classes as possible."""
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] < 2:
        return 0.0
    entropy: Tensor = torch.special.entr(output.float().softmax(1).mean(0)).sum()
    return (math.log(min(output.shape)) - entropy).clamp(min=0)
