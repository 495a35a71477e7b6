"""Layers as matrices: which weights are one, and the inputs that their columns meet."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional

from compressor.sharing.curvature import LayerView
from compressor.sharing.sites import Site

__all__ = ["layer_view", "output_rows", "unfolded_inputs", "unfolded_parts"]

CHUNK = 1 << 22  # numbers that are unfolded at a time
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def layer_view(site: Site) -> LayerView | None:
    """Returns how a weight is a matrix; None where its modules are not layers that multiply by it as it is.

    Subclasses may compute with another weight than the one they hold, so only the classes themselves are known.
    """
    kinds = {(type(module), getattr(module, "groups", 1)) for module, _ in site.owners}
    module, attribute = site.owners[0]
    if len(kinds) > 1 or attribute != "weight":
        return None
    shape = tuple(site.tensor.shape)
    if type(module) is nn.Linear:
        return LayerView(shape)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and type(module) in CONVOLUTIONS:
        return LayerView(shape, module.groups)
    if isinstance(module, nn.modules.conv._ConvTransposeNd) and type(module) in TRANSPOSED:
        return LayerView(shape, module.groups, inputs_first=True)
    return None


def unfolded_inputs(module: nn.Module, inputs: Tensor, view: LayerView) -> Tensor:
    """Returns what the columns of a layer's matrices are multiplied by, float32[G, positions, columns].

    Args:
        module: of a class that ``layer_view`` knows.
        inputs: what the layer is given, with a batch axis.
        view: of its weight.
    """
    inputs = inputs.detach().float()
    if isinstance(module, nn.Linear):
        return view.live_of(inputs.reshape(1, -1, inputs.shape[-1]))
    unfolded = _unfold(module, inputs)
    batch, columns, positions = unfolded.shape
    parts = unfolded.view(batch, view.groups, columns // view.groups, positions)
    if view.live is not None:
        parts = parts[:, :, view.live]
    return parts.permute(1, 0, 3, 2).reshape(view.groups, batch * positions, -1)


def unfolded_parts(module: nn.Module, inputs: Tensor, view: LayerView) -> Iterator[Tensor]:
    """Yields what ``unfolded_inputs`` returns, of a few images at a time."""
    channels = inputs.shape[-1 if isinstance(module, nn.Linear) else 1]
    positions = max(1, math.prod(inputs.shape[1:]) // max(1, channels))
    images = CHUNK // max(1, view.all_columns * view.groups * positions)
    for part in inputs.split(max(1, images)):
        yield unfolded_inputs(module, part, view)


def _unfold(module: nn.Module, inputs: Tensor) -> Tensor:
    """Returns the inputs of each output position, [batch, channels times kernel positions, output positions]."""
    if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return functional.unfold(inputs, module.kernel_size, module.dilation, module.padding, module.stride)
    # The layer itself, with kernels that each pick one position: it knows how it pads.
    picker: Any = copy.deepcopy(module)
    kernel = tuple(picker.weight.shape[2:])
    positions, channels = math.prod(kernel), inputs.shape[1]
    pick = torch.eye(positions, device=inputs.device).view(1, positions, *kernel)
    weight = pick.repeat(channels, 1, *[1] * len(kernel))
    if not isinstance(module, TRANSPOSED):
        weight = weight.reshape(channels * positions, 1, *kernel)
    picker.weight, picker.bias, picker.groups = nn.Parameter(weight, requires_grad=False), None, channels
    with torch.no_grad():
        unfolded: Tensor = picker.forward(inputs).flatten(2)  # without the hooks of the layer, which copies have too
    return unfolded


def output_rows(gradient: Tensor, module: nn.Module) -> Tensor:
    """Returns a gradient of a layer's output as [rows, positions times batch]."""
    if isinstance(module, nn.Linear):
        return gradient.reshape(-1, gradient.shape[-1]).T
    return gradient.transpose(0, 1).flatten(1)
