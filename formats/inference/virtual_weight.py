"""Virtual weights: codebooks whose indices a codec generates, so that the weight itself need never exist.

Linear layers and convolutions compute a chunk of output channels at a time, forward and backward. Any other operation
is given the expanded weight, which exists for the time of that operation.

Chen, Wilson, Tyree, Weinberger and Chen, "Compressing Neural Networks with the Hashing Trick", ICML 2015, section 4.
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
    """A weight that stores its codebook alone and is differentiable in it.

    Args:
        source: the source of its indices.
        codebook: float[K], mirrored codewords included.
        dtype: the dtype that weights are cast to, after they are rounded to the dtype of ``source``.

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
        tensor: VirtualTensor = torch.Tensor._make_wrapper_subclass(
            cls, source.shape, dtype=dtype, device=codebook.device, requires_grad=codebook.requires_grad
        )
        tensor.source, tensor.codebook = source, codebook
        return tensor

    def expand_weights(self) -> Tensor:
        """Returns all weights as an ordinary tensor, differentiable in the codebook."""
        return self.source.expand(self.codebook).to(self.dtype)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = dict(kwargs or {})
        if func in _VALUE_FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **keywords)
        if func in BLOCKWISE and _only_weight_is_virtual(args, keywords):
            return BLOCKWISE[func](*args, **keywords)
        args, keywords = tree_map_only(VirtualTensor, VirtualTensor.expand_weights, (args, keywords))
        return func(*args, **keywords)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Expands virtual weights for operations that skip ``__torch_function__``.

        The most frequent is ``set_`` in ``remove_parametrizations``. Autograd is above this level, so a weight that
        requires a gradient is refused: the gradient would not reach its codebook.
        """
        weights = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, VirtualTensor)]
        if any(weight.requires_grad for weight in weights):
            raise TypeError(f"{func} does not see a virtual weight as torch's overrides do; give it expand_weights()")
        args, keywords = tree_map_only(VirtualTensor, VirtualTensor.expand_weights, (args, dict(kwargs or {})))
        return func(*args, **keywords)


_VALUE_FREE = {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_meta", "layout")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point}  # need no values of the tensor


def _only_weight_is_virtual(args: tuple[Any, ...], keywords: Mapping[str, Any]) -> bool:
    """Returns whether the weight, the second argument or the one of that name, is the only virtual argument."""
    weight = args[1] if len(args) > 1 else keywords.get("weight")
    virtual = [argument for argument in (*args, *keywords.values()) if isinstance(argument, VirtualTensor)]
    return len(virtual) == 1 and virtual[0] is weight


def mirrored(values: Tensor) -> Tensor:
    """Returns codewords followed by their negatives, as in a mirrored table: float[2K] of float[K]."""
    return torch.cat([values, -values])


class ComputedWeight(nn.Module):
    """Base of modules that compute the weight of a packed layer, as parametrisations of an empty buffer.

    Attributes:
        codebook: float32 buffer; like all float buffers it stays float32 when the layer is cast to another dtype.
        dtype: the dtype of the stored tensor.
    """

    codebook: Tensor
    dtype: torch.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ComputedWeight:
        """Moves buffers to another device but keeps their dtype: the computed weight is cast, not the codebook."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            self._buffers[name] = None if tensor is None else tensor.to(self.codebook.device)
        return self


class VirtualWeight(ComputedWeight):
    """A weight whose indices a codec generates; ``forward`` returns a tensor that layers expand chunk by chunk.

    Args:
        source: the source of its indices.
        codebook: float32[K] without mirrored codewords; its only buffer.
        negatives: whether the codebook is mirrored.
    """

    def __init__(self, source: Generated, codebook: Tensor, negatives: bool) -> None:
        super().__init__()
        self.source, self.dtype, self.negatives = source, source.dtype, negatives
        self.register_buffer("codebook", codebook)

    def forward(self, like: Tensor) -> VirtualTensor:
        """Returns the weight in the dtype of ``like``."""
        return VirtualTensor(self.source, mirrored(self.codebook) if self.negatives else self.codebook, like.dtype)
