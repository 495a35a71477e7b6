"""Virtual weights: a codebook whose indices a codec generates; the matrix never exists, in training or inference.

Linear layers and convolutions compute a block of output channels at a time, forward and backward; whatever else reads
such a weight is given all of it for the moment.

Chen, Wilson, Tyree, Weinberger, Chen, "Compressing Neural Networks with the Hashing Trick", ICML 2015, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from compressor.formats.inference.blockwise import BLOCKWISE
from compressor.formats.inference.generated import Generated

__all__ = ["ComputedWeight", "VirtualTensor", "VirtualWeight", "mirrored"]


class VirtualTensor(Tensor):
    """A weight that holds its codebook alone, and is differentiable in it.

    Args:
        source: what generates its indices.
        codebook: float[codewords], mirrored ones included.
        dtype: what weights are cast to, after they have been rounded to the source's dtype.

    Example:
        >>> from compressor.formats.codecs.base import Stream
        >>> from compressor.formats.codecs.registry import codec_class
        >>> source = Generated(codec_class("hashed")(), Stream("fc.weight", 6, 2), (2, 3), torch.float32)
        >>> values = torch.tensor([-1.0, 2.0], requires_grad=True)
        >>> weight = VirtualTensor(source, values, torch.float32)
        >>> torch.nn.functional.linear(torch.ones(1, 3), weight).sum().backward()
        >>> weight.expand_weights().tolist(), values.grad.tolist()
        ([[-1.0, 2.0, 2.0], [-1.0, 2.0, -1.0]], [3.0, 3.0])
    """

    source: Generated
    codebook: Tensor

    @staticmethod
    def __new__(cls, source: Generated, codebook: Tensor, dtype: torch.dtype) -> VirtualTensor:  # noqa: D102
        made: VirtualTensor = torch.Tensor._make_wrapper_subclass(
            cls, source.shape, dtype=dtype, device=codebook.device, requires_grad=codebook.requires_grad
        )
        made.source, made.codebook = source, codebook
        return made

    def expand_weights(self) -> Tensor:
        """Give all weights as an ordinary tensor, differentiable in the codebook."""
        return self.source.expand(self.codebook).to(self.dtype)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **given)
        if func in BLOCKWISE and _is_the_weight(args, given):
            return BLOCKWISE[func](*args, **given)
        args, given = tree_map_only(VirtualTensor, VirtualTensor.expand_weights, (args, given))
        return func(*args, **given)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Come here for what torch's overrides do not see, above all ``set_`` of ``remove_parametrizations``."""
        met = [one for one in tree_leaves((args, kwargs)) if isinstance(one, VirtualTensor)]
        if any(weight.requires_grad for weight in met):  # gradients would go no further than here
            raise TypeError(f"{func} does not see a virtual weight as torch's overrides do; give it expand_weights()")
        args, given = tree_map_only(VirtualTensor, VirtualTensor.expand_weights, (args, dict(kwargs or {})))
        return func(*args, **given)


_KNOWN = {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_meta", "layout")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point}  # what a tensor can tell without its values


def _is_the_weight(args: tuple[Any, ...], given: Mapping[str, Any]) -> bool:
    """Tell whether the argument called weight, or the second, is virtual, and no other."""
    weight = args[1] if len(args) > 1 else given.get("weight")
    virtual = [one for one in (*args, *given.values()) if isinstance(one, VirtualTensor)]
    return len(virtual) == 1 and virtual[0] is weight


def mirrored(values: Tensor) -> Tensor:
    """Give codewords and after them their negatives, as a mirrored table has them: float[K] to float[2K]."""
    return torch.cat([values, -values])


class ComputedWeight(nn.Module):
    """What a packed layer's weight is computed from: the parametrisation of an empty buffer.

    ``codebook`` and other floats stay float32, whatever dtype the layer is cast to; ``dtype`` is the stored tensor's.
    """

    codebook: Tensor
    dtype: torch.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ComputedWeight:
        """Follow to a device, but keep float32: the weight is rounded to another dtype after it is computed."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            self._buffers[name] = None if tensor is None else tensor.to(self.codebook.device)
        return self


class VirtualWeight(ComputedWeight):
    """A weight that is codebook and seed; ``forward`` gives a tensor that layers compute with block by block.

    Args:
        source: what generates its indices.
        codebook: float32[K] without mirrored codewords, its only buffer.
        negatives: whether the codebook is mirrored.
    """

    def __init__(self, source: Generated, codebook: Tensor, negatives: bool) -> None:
        super().__init__()
        self.source, self.dtype, self.negatives = source, source.dtype, negatives
        self.register_buffer("codebook", codebook)

    def forward(self, like: Tensor) -> VirtualTensor:
        """Give the weight in the dtype of ``like``."""
        return VirtualTensor(self.source, mirrored(self.codebook) if self.negatives else self.codebook, like.dtype)
