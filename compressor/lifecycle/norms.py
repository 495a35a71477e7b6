"""Norms and biases in few bytes: BatchNorm statistics folded into scale and shift, and these on grids.

In eval mode a BatchNorm computes ``(x - mean) / sqrt(var + eps) * scale + shift``, four vectors that are two: with
``scale / sqrt(var + eps)`` and ``shift - mean * scale / sqrt(var + eps)`` in their place the mean is 0 and the variance
1, which a file stores in no bytes. Scale, shift and bias of any norm or layer are then rounded to a step that follows
from what errors of them cost, as the step of weights does, and coded like weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from compressor.calibration.measurement import Measurement
from compressor.calibration.price import MOST_STEPS, grid_step
from compressor.formats.codecs.base import Stream
from compressor.formats.codecs.registry import CODECS
from compressor.formats.content import Codebook, Grid, SharedTensor, index_dtype
from compressor.formats.errors import UsageError
from compressor.formats.file.choice import encode_each
from compressor.policy.policy import TensorPlan
from compressor.sharing.sites import Site, find_tensors
from compressor.training.modes import eval_mode

__all__ = ["FoldedNorms", "check_foldable", "fold_norms", "minor_tensors", "norm_inputs"]

FINER = 4.0  # times less is paid for a bit than of weights: an error of a norm moves a whole channel at once
TRAINED = 4.0  # times less again after training, which has brought the loss down at the same bytes
SPREAD_STEPS = 64.0  # steps in the standard deviation of a tensor where no curvature or price is known
LEAST_STEPS = 2.0  # steps in the standard deviation at any price
NEGLIGIBLE = 2.0**-20  # of the mean cost of losing a channel: channels that cost less are lost
LEAST_EXPONENT = -100  # of a step, which bfloat16 and products with whole numbers still hold exactly
FEWEST = 8  # values of a tensor that is worth an entry of its own
ENTRY, SLICE = 14, 3  # bytes of an entry in the metadata, and of the step of one more tensor in a stack, about

_FORWARDS = {
    kind.forward for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d)
}

Importance = Mapping[str, Tensor]
"""The curvature of tensors by name: the mean over images of the squared gradient of the loss, float32[shape]."""


@dataclass
class FoldedNorms:
    """Norms and biases on grids.

    Args:
        values: what tensors of the model's state become, by name.
        tensors: those on grids, and stacks of them, as the file holds them.
        books: their codebooks.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, SharedTensor] = field(default_factory=dict)
    books: list[Codebook] = field(default_factory=list)

    def added_to(
        self, tensors: Mapping[str, SharedTensor], books: Sequence[Codebook]
    ) -> tuple[dict[str, SharedTensor], tuple[Codebook, ...]]:
        """Returns the shared tensors and codebooks of a model with these after them."""
        moved = {name: replace(one, book=one.book + len(books)) for name, one in self.tensors.items()}
        return {**tensors, **moved}, (*books, *self.books)


@dataclass(frozen=True)
class _Vector:
    """A tensor on a grid through zero.

    Args:
        name: in the state of the model.
        step: a power of two.
        numbers: whole multiples of it, int64[shape].
    """

    name: str
    step: float
    numbers: Tensor

    @property
    def values(self) -> Tensor:
        """What the file decodes to, float32[shape]: whole numbers of at most 17 bits, times a power of two."""
        return (self.numbers.double() * self.step).float()


def minor_tensors(model: nn.Module, plans: Sequence[TensorPlan]) -> list[Site]:
    """Returns the tensors that go on grids: float32 norms, biases, positions and vectors that no rule speaks of.

    Args:
        model: the model.
        plans: the plans of a policy for it.
    """
    spoken_of = {plan.site.name for plan in plans if plan.scheme or plan.rule is not None}
    return [
        site
        for site in find_tensors(model)
        if site.exemption and site.name not in spoken_of and site.tensor.dtype == torch.float32
    ]


def check_foldable(model: nn.Module, shared: Collection[str]) -> None:
    """Checks that the statistics of every BatchNorm can be folded.

    Args:
        model: the model.
        shared: names of the tensors that a scheme shares.

    Raises:
        UsageError: the first that cannot, and why.
    """
    for name, norm in _batch_norms(model).items():
        if fault := _fault(model, name, norm, shared):
            raise UsageError(f"fold_norms: {name} ({type(norm).__name__}) {fault}; leave fold_norms out to skip it")


def _batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Returns the norms that compute with statistics, by name."""
    return {
        name: norm
        for name, norm in model.named_modules()
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None
    }


def _fault(model: nn.Module, name: str, norm: _BatchNorm, shared: Collection[str]) -> str:
    """Returns why the statistics of a norm cannot be folded; "" where they can."""
    affine: bool = norm.affine
    if not affine:
        return "has no scale and shift to fold its statistics into (affine=False)"
    if type(norm).forward not in _FORWARDS:
        return "computes in a way of its own"
    if norm.weight.dtype != torch.float32:
        return f"has parameters of {norm.weight.dtype}, expected float32"
    if {f"{name}.weight", f"{name}.bias"} & {*shared}:
        return "has a scale or shift that a rule shares"
    holders = [other for other in model.modules() for one in other.parameters(recurse=False) if one is norm.weight]
    if len(holders) > 1:
        return "has a scale that is tied to another's"
    return ""


@torch.no_grad()
def fold_norms(
    model: nn.Module,
    plans: Sequence[TensorPlan],
    rate: float | None = None,
    measured: Measurement | None = None,
    sources: Mapping[str, nn.Module] | None = None,
    trained: bool = False,
) -> FoldedNorms:
    """Returns what folding and rounding make of norms and biases; the model is not changed.

    A BatchNorm that cannot be folded keeps its statistics, and its scale and shift are rounded like those of others.

    Args:
        model: the model; where weights have been compressed, with the statistics that it will have.
        plans: the plans of its policy.
        rate: the price of a bit; None: steps follow from the spread of values, and the loss does not move.
        measured: has the curvature of ``minor_tensors``, and images to find the convolution before each BatchNorm
            by: channels whose weights are all zero need no scale. None: as without a price.
        sources: these convolutions, where they are known: what ``norm_inputs`` returned.
        trained: whether the model has been trained since its weights were compressed.
    """
    importance = None if measured is None else measured.calibrator.importance
    if sources is None:
        sources = {} if measured is None else norm_inputs(model, measured.calibrator.batches[0][:1])
    found = FoldedNorms()
    vectors: list[_Vector] = []
    shared = {plan.site.name for plan in plans if plan.scheme}
    sites = {site.name: site for site in minor_tensors(model, plans)}
    norms = {name: norm for name, norm in _batch_norms(model).items() if not _fault(model, name, norm, shared)}
    price = None if rate is None or importance is None else rate / (FINER * TRAINED if trained else FINER)
    for name, norm in norms.items():
        if {f"{name}.weight", f"{name}.bias"} <= sites.keys():
            del sites[f"{name}.weight"], sites[f"{name}.bias"]
            empty = _empty_rows(sources.get(name), norm)
            vectors += _folded(name, norm, price, importance or {}, empty, found.values)
    for name, site in sites.items():
        cost = torch.ones_like(site.tensor) if importance is None else importance[name]
        vector = _on_grid(name, site.tensor.detach().double(), cost, price)
        if vector is not None:
            vectors.append(vector)
            found.values[name] = vector.values.to(site.tensor)
    _store(vectors, found)
    return found


def norm_inputs(model: nn.Module, images: Tensor) -> dict[str, nn.Module]:
    """Returns for each BatchNorm that is given the very output of a convolution that convolution, by the norm's name.

    Args:
        model: the model.
        images: an input of the model, float[n, ...]; what is found does not depend on it.
    """
    returned: dict[int, tuple[Tensor, int, nn.Module]] = {}
    found: dict[str, set[nn.Module | None]] = {}

    def on_output(module: nn.Module, _: Any, output: Tensor) -> None:
        returned[id(output)] = output, output._version, module  # kept, so that no other tensor gets its address

    def on_input(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: found.setdefault(name, set()).add(source_of(args[0]))

    def source_of(given: Tensor) -> nn.Module | None:
        _, version, module = returned.get(id(given), (None, -1, None))
        return module if version == given._version else None  # a shortcut may have been added in place

    hooks = [one.register_forward_hook(on_output) for one in model.modules() if isinstance(one, _ConvNd)]
    hooks += [norm.register_forward_pre_hook(on_input(name)) for name, norm in _batch_norms(model).items()]
    try:
        with torch.inference_mode(False), torch.no_grad(), eval_mode(model):  # tensors of inference have no versions
            model(images.to(next(model.parameters()).device))  # which may have been moved since it was measured
    finally:
        for hook in hooks:
            hook.remove()
    only = {name: next(iter(sources)) for name, sources in found.items() if len(sources) == 1}
    return {name: source for name, source in only.items() if source is not None}


def _empty_rows(source: nn.Module | None, norm: _BatchNorm) -> Tensor:
    """Returns the channels of a norm whose inputs are always zero, bool[channels]."""
    empty = torch.zeros_like(norm.weight, dtype=torch.bool)
    if isinstance(source, _ConvNd) and not source.transposed and source.bias is None:
        weight = source.weight
        if len(weight) == len(empty):
            empty = (weight.flatten(1) == 0).all(dim=1)
    return empty


def _folded(
    name: str,
    norm: _BatchNorm,
    price: float | None,
    importance: Importance,
    empty: Tensor,
    values: dict[str, Tensor],
) -> list[_Vector]:
    """Folds the statistics of a BatchNorm, and returns its scale and shift on grids.

    The shift is computed with the scale as it was rounded, so that channels keep their means.
    """
    mean, variance = (one.detach().double() for one in (norm.running_mean, norm.running_var))  # type: ignore[union-attr]
    scale, shift = (one.detach().double() for one in (norm.weight, norm.bias))
    deviation, unit = (variance + norm.eps).sqrt(), math.sqrt(1 + norm.eps)  # before and after
    weight, bias = f"{name}.weight", f"{name}.bias"
    cost = importance[weight].to(deviation) * deviation**2 if weight in importance else variance
    folded = scale / deviation * unit
    shift = torch.where(empty, shift - mean * folded / unit, shift)
    mean = mean.masked_fill(empty, 0)  # which the shift of these channels holds now
    lost = cost * folded**2
    folded = folded.masked_fill(empty | (lost <= NEGLIGIBLE * lost.mean()), 0)
    scales = _on_grid(weight, folded, cost, price)
    values[weight] = folded.float() if scales is None else scales.values.to(norm.weight)
    moved = shift - mean * values[weight].double() / unit
    shifts = _on_grid(bias, moved, importance.get(bias, torch.ones_like(mean)), price)
    values[bias] = moved.float() if shifts is None else shifts.values.to(norm.bias)
    values[f"{name}.running_mean"] = torch.zeros_like(mean, dtype=torch.float32)
    values[f"{name}.running_var"] = torch.ones_like(mean, dtype=torch.float32)
    if norm.num_batches_tracked is not None:
        values[f"{name}.num_batches_tracked"] = torch.zeros_like(norm.num_batches_tracked)
    return [vector for vector in (scales, shifts) if vector is not None]


def _on_grid(name: str, tensor: Tensor, cost: Tensor, price: float | None) -> _Vector | None:
    """Rounds a tensor to whole multiples of a step; None where storing it as it is takes less, or nothing else will do.

    Args:
        name: of the tensor.
        tensor: float64[shape].
        cost: the curvature, float[shape].
        price: of a bit; None: the step follows from the spread.
    """
    flat = tensor.cpu()
    kept = flat[flat != 0]
    if flat.numel() < FEWEST or not kept.numel() or bool((flat == flat.flatten()[0]).all()):
        return None
    largest = float(kept.abs().max())
    spread = float(kept.std(correction=0)) or largest
    step = spread / SPREAD_STEPS
    if price is not None:
        curvature = float(cost.double().cpu()[flat != 0].mean())
        step = min(grid_step(price, curvature, flat), spread / LEAST_STEPS)
    if not math.isfinite(largest) or largest < torch.finfo(torch.float32).tiny:
        return None
    exponent = max(round(math.log2(step)), math.ceil(math.log2(2 * largest / MOST_STEPS)), LEAST_EXPONENT)
    step = 2.0**exponent  # most tensors then have one of a few steps, which metadata hold in few bytes
    return _Vector(name, step, (flat / step).round().long())


def _store(vectors: Sequence[_Vector], found: FoldedNorms) -> None:
    """Adds the entries of tensors on grids: those of one shape and kind by themselves, or as a stack if smaller."""
    alike: dict[tuple[object, ...], list[_Vector]] = {}
    for vector in vectors:
        alike.setdefault((tuple(vector.numbers.shape), vector.name.rpartition(".")[2]), []).append(vector)
    for group in alike.values():
        single = [_entry([vector]) for vector in group]
        stack = _entry(group)
        stacked = len(group) > 1 and _size(*stack) + SLICE * len(group) < sum(_size(*entry) for entry in single)
        for members, (tensor, book) in (
            [(group, stack)] if stacked else zip([[one] for one in group], single, strict=True)
        ):
            name = " ".join(vector.name for vector in members)
            found.tensors[name] = replace(tensor, book=len(found.books))
            found.books.append(book)


def _entry(vectors: Sequence[_Vector]) -> tuple[SharedTensor, Grid]:
    """Returns a tensor on a grid, or a stack of tensors on a grid of steps of which each has its own size."""
    numbers = torch.stack([vector.numbers for vector in vectors]) if len(vectors) > 1 else vectors[0].numbers
    least, most = int(numbers.min()), int(numbers.max())
    indices = (numbers - least).numpy().astype(index_dtype(most - least + 1)).reshape(-1)
    shape, step, count = tuple(numbers.shape), vectors[0].step, most - least + 1
    if len(vectors) == 1:
        return SharedTensor(shape, 0, indices), Grid(least * step, step, count)
    steps = np.array([vector.step for vector in vectors], np.float32)
    tensor = SharedTensor(shape, 0, indices, axis=0, scale=steps, scale_dtype="BF16")
    return tensor, Grid(float(least), 1.0, count)


def _size(tensor: SharedTensor, grid: Grid) -> int:
    """Returns about how many bytes an entry takes in a file."""
    codecs = [CODECS[name]() for name in sorted(CODECS.built_in()) if CODECS[name].general]
    suitable = [codec for codec in codecs if grid.count <= codec.max_codewords]
    options = encode_each(suitable, tensor.indices, Stream("", len(tensor.indices), grid.count))
    return len(options[0].data) + ENTRY
