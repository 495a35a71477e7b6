"""The calibrator measures the curvature of each tensor, layer after layer, on a model that is being compressed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from compressor.calibration.images import batches_of
from compressor.calibration.layer_views import layer_view, output_rows, unfolded_parts
from compressor.calibration.moments import Moments, MomentsOnDemand
from compressor.formats.errors import UsageError
from compressor.sharing.curvature import Curvature, LayerView
from compressor.sharing.sites import Site
from compressor.training.modes import eval_mode

__all__ = ["Calibrator"]

PASSES = 64  # through the model, at most about so many: layers that come together see the same inputs
MEMORY = 1 << 29  # bytes of the moments of layers that are measured together
LEAST_SHARE = 1e-6  # of the mean curvature of all tensors, given to those that the loss seems not to depend on

OnCall = Callable[[Site, nn.Module, Tensor, Any], None]


class _AllCalledError(Exception):
    """Ends a forward pass in which all layers that are measured have been called."""


@dataclass
class _Sums:
    """What the first pass sums up for one tensor.

    Args:
        inputs: the sum of the squared inputs of each column, float64[G, columns].
        outputs: the sum of the squared gradients of each row, float64[rows].
        positions: the number of gradients of each row.
        squares: the sum over batches of the squared gradient, float32[shape], where the tensor is no matrix of a layer
            that is called: some models multiply by the weight of a layer themselves.
    """

    inputs: Tensor | float = 0.0
    outputs: Tensor | float = 0.0
    positions: int = 0
    squares: Tensor | float = 0.0


class Calibrator:
    """Measures what errors of each tensor cost, on images without labels.

    One pass with gradients finds the mean squared gradient of the outputs of all layers, for errors that are drawn from
    the model's own answers (``_sampled_loss``), and the squares of their inputs. The moments of inputs are measured
    later, of a few layers at a time: of the inputs that they are given once the layers before have been compressed.

    Args:
        model: the model; nothing of it is changed.
        sites: the tensors.
        images: float[n, ...], inputs of the model.
        dense: the dense weights of the sites by name, whatever the model now holds.
        seed: of what is drawn.
        memory: bytes that the moments of the layers that are measured together may take, about; a layer whose own
            would take more has them for ranges of its columns, or its diagonal alone.
        minor: other tensors, such as norms and biases, of which the mean squared gradient is measured.

    Attributes:
        importance: of the minor tensors by name: the mean over images of the squared gradient, float32[shape].

    Raises:
        UsageError: the model does not take the images, or answers other than with finite numbers; or the inputs of a
            layer are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        images: Tensor,
        dense: Mapping[str, Tensor],
        seed: int = 0,
        memory: int = MEMORY,
        minor: Sequence[Site] = (),
    ) -> None:
        self.minor = {site.name: site.tensor.detach() for site in minor}
        self.importance = {name: torch.zeros_like(tensor) for name, tensor in self.minor.items()}
        self.model, self.sites, self.dense, self.memory = model, list(sites), dict(dense), memory
        like = next(iter(self.dense.values()))
        self.batches = batches_of(images.to(like.device, like.dtype if images.is_floating_point() else None))
        self.images = len(images)
        self.views = {site: view for site in sites if (view := layer_view(site)) is not None}
        self.calls: Counter[Site] = Counter()
        """How often a forward pass calls the layers of each site that are called at all."""
        self._sums = {site: _Sums() for site in sites}
        with eval_mode(model):
            self._first_pass(torch.Generator().manual_seed(seed))
        for site in self.calls:
            self.calls[site] //= len(self.batches)
            self.views[site] = _living(self.views[site], self._sums[site].inputs)
        measured = {site: float(self._measured_diagonal(site).double().mean()) for site in sites}
        least = LEAST_SHARE * max(sum(measured.values()) / len(measured), torch.finfo(torch.float32).tiny)
        self._added = {site: max(0.0, least - mean) for site, mean in measured.items()}

    def in_order(self) -> list[Site]:
        """Returns the sites in the order in which the model calls their layers, those it does not call at the end."""
        order = {site: number for number, site in enumerate(self.calls)}
        return sorted(self.sites, key=lambda site: order.get(site, len(order)))

    def site_chunks(self) -> Iterator[list[Site]]:
        """Yields the sites in order, as many at a time as are measured together."""
        chunk: list[Site] = []
        taken, most = 0, math.ceil(len(self.sites) / PASSES)
        for site in self.in_order():
            size = 0 if site not in self.views else Moments.size(self.views[site], self.memory)
            if chunk and (len(chunk) == most or taken + size > self.memory):
                yield chunk
                chunk, taken = [], 0
            chunk.append(site)
            taken += size
        if chunk:
            yield chunk

    @torch.no_grad()
    def measure(self, sites: Sequence[Site], compressed: Mapping[str, Tensor]) -> dict[Site, Curvature]:
        """Returns the curvature of some tensors.

        Args:
            sites: those to measure.
            compressed: the weights of the tensors that have been compressed already, by name.
        """
        moments = {
            site: Moments(self.views[site], self.memory, self.dense[site.name])
            for site in sites
            if site in self.calls and site in self.views
        }
        # Those after the first meet inputs that the first has not made up for yet: both would make up for the same.
        corrected = list(moments)[:1] if compressed else []
        with eval_mode(self.model):
            for batch in self.batches if moments else ():
                present = self._inputs(batch, moments, {**self.dense, **compressed})
                dense = self._inputs(batch, corrected, self.dense) if corrected else {}
                for site, calls in present.items():
                    before: list[Tensor | None] = [inputs for _, inputs in dense.get(site, ())]
                    before = before or [None] * len(calls)
                    for (module, inputs), one in zip(calls, before, strict=True):
                        moments[site].add(module, inputs, one)
        return {site: self._curvature(site, moments.get(site)) for site in sites}

    def of_dense(self, site: Site) -> Curvature:
        """Returns the curvature of a tensor in the dense model, whose moments are measured when they are read."""
        if site not in self.calls or site not in self.views:
            return Curvature(self.diagonal(site))
        view = self.views[site]
        moments = MomentsOnDemand(view, self.memory, lambda: self.measure([site], {})[site].moments)
        return Curvature(self.diagonal(site), view, moments)

    def _curvature(self, site: Site, moments: Moments | None) -> Curvature:
        if moments is None or not moments.sums:
            return Curvature(self.diagonal(site))
        target = moments.corrected()
        of_one_image = [total.div_(self.images) for total in moments.sums]
        return Curvature(self.diagonal(site), self.views[site], of_one_image, target)

    def _inputs(
        self, batch: Tensor, wanted: Iterable[Site], weights: Mapping[str, Tensor]
    ) -> dict[Site, list[tuple[nn.Module, Tensor]]]:
        """Returns what the layers of some tensors are given, call by call, under these weights."""
        given: dict[Site, list[tuple[nn.Module, Tensor]]] = {site: [] for site in wanted}

        def on_call(site: Site, module: nn.Module, inputs: Tensor, _: Any) -> None:
            given[site].append((module, inputs))
            if all(len(calls) == self.calls[one] for one, calls in given.items()):
                raise _AllCalledError

        with self._listening(list(wanted), on_call), suppress(_AllCalledError):
            functional_call(self.model, dict(weights), (batch,))
        return given

    def _first_pass(self, generator: torch.Generator) -> None:
        """Sums squared inputs and gradients over all images."""
        weights = {**self.dense, **self.minor}
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
        with self._listening(list(self.views), self._sum_call):
            for batch in self.batches:
                with torch.enable_grad():
                    loss = _sampled_loss(self._answer(batch, leaves), generator)
                    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                gradients = dict(zip(leaves, found, strict=True))
                for name, total in self.importance.items():
                    if (gradient := gradients[name]) is not None:
                        total += gradient.square() / self.images
                for site in self.sites:
                    gradient = gradients[site.name]
                    if gradient is not None and site not in self.calls:
                        self._sums[site].squares = self._sums[site].squares + gradient.detach().float().square()
                del loss, found, gradients, gradient  # before the next are computed

    def _answer(self, batch: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Returns the logits of a batch."""
        shape = tuple(batch.shape[1:])
        try:
            output = functional_call(self.model, dict(weights), (batch,))
        except UsageError:
            raise
        except Exception as error:
            line = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise UsageError(f"calibration: the model does not take images of shape {shape}: {line}") from error
        if not isinstance(output, Tensor) or output.ndim < 2 or not output.is_floating_point():
            raise UsageError(
                f"calibration: the model answers with {type(output).__name__}, expected logits [n, classes]"
            )
        if not bool(torch.isfinite(output).all()):
            raise UsageError(f"calibration: the model's answers to images of shape {shape} are not finite")
        return output

    def _sum_call(self, site: Site, module: nn.Module, inputs: Tensor, output: Any) -> None:
        """Sums the squares of what a layer is given, and of the gradient of what it returns."""
        self.calls[site] += 1
        sums, view = self._sums[site], self.views[site]
        squares = sum(part.square().sum(dim=1).double() for part in unfolded_parts(module, inputs.detach(), view))
        if not bool(torch.isfinite(squares).all()):  # type: ignore[arg-type]
            raise UsageError(f"calibration: the inputs of the layer of {site.name} are not finite")
        sums.inputs = sums.inputs + squares

        def on_gradient(gradient: Tensor) -> None:
            rows = output_rows(gradient.detach(), module)
            sums.outputs = sums.outputs + rows.square().sum(dim=1).double()
            sums.positions += rows.shape[1]

        if output.requires_grad:
            output.register_hook(on_gradient)

    def diagonal(self, site: Site) -> Tensor:
        """Returns the diagonal of the curvature, float32[shape], computed anew: all would be as large as the model."""
        return self._measured_diagonal(site).clamp_(min=0.0).add_(self._added[site])

    def _measured_diagonal(self, site: Site) -> Tensor:
        sums, tensor = self._sums[site], self.dense[site.name]
        if site not in self.calls:
            return torch.zeros_like(tensor, dtype=torch.float32) + sums.squares / self.images
        if not isinstance(sums.inputs, Tensor) or not isinstance(sums.outputs, Tensor):
            return torch.zeros_like(tensor, dtype=torch.float32)
        view = self.views[site]
        rows = (sums.outputs / sums.positions).view(view.groups, -1, 1)
        columns = view.live_of(sums.inputs / self.images)[:, None, :]
        return view.tensor(rows.float() * columns.float()).contiguous()

    @contextmanager
    def _listening(self, sites: Sequence[Site], on_call: OnCall) -> Iterator[None]:
        """Calls back whenever the layer of a tensor is called."""

        def hook_of(site: Site) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
            return lambda module, args, named, output: on_call(site, module, (*args, *named.values())[0], output)

        handles = [
            module.register_forward_hook(hook_of(site), with_kwargs=True) for site in sites for module, _ in site.owners
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _living(view: LayerView, squares: Tensor | float) -> LayerView:
    """Returns the view of the columns whose inputs are not always zero, as those that meet nothing but padding are.

    Args:
        view: of all columns.
        squares: the sum of the squared inputs of each column, float64[G, columns].
    """
    live = torch.as_tensor(squares).sum(dim=0).nonzero()[:, 0]
    return view if len(live) in (0, view.all_columns) else replace(view, live=live)


def _sampled_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Returns a scalar whose squared gradient has the curvature of the cross entropy as its mean.

    With p the model's own probabilities, its gradient by the logits is ``sqrt(p) e - p sum(sqrt(p) e)`` for signs e
    drawn at random, whose covariance is ``diag(p) - p p^T``: that of the gradient for labels drawn by p. Drawing labels
    instead gives the same mean from a few large gradients: a network that is sure of itself hardly ever draws another.
    Of a single output it is the curvature of the squared error.
    """
    rows = logits.float().movedim(1, -1).flatten(0, -2)
    signs = (torch.randint(2, rows.shape, generator=generator) * 2 - 1).to(rows)
    if rows.shape[1] == 1:
        return (rows * signs).sum()
    probabilities = rows.detach().softmax(1)
    weighted = probabilities.sqrt() * signs
    return (rows * (weighted - probabilities * weighted.sum(1, keepdim=True))).sum()
