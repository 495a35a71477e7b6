"""Packed models: from a model with shared weights to the content of a packed file, and its report."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import timm
import torch
from torch import Tensor, nn

import compressor
from compressor.calibration.image_shape import image_channels
from compressor.formats.content import Codebook, Content, RawTensor, SharedTensor, find_slices
from compressor.formats.errors import MissingError, UsageError
from compressor.formats.file.memory import MAX_MEMORY
from compressor.formats.file.objects import PREPROCESSING
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack, write
from compressor.formats.io.atomic import check_writable
from compressor.formats.torch_tensors import SAFETENSORS_NAMES, raw_tensor
from compressor.lifecycle.convert import decode_tensor, names_in
from compressor.lifecycle.rebuild import check_rebuild, timm_name, trace
from compressor.lifecycle.state import state_to_pack
from compressor.lifecycle.trace import Trace
from compressor.policy.policy import Policy, TensorPlan
from compressor.report.report import Report
from compressor.sharing.group_state import CHUNK
from compressor.training.evaluation import Evaluation

__all__ = ["Packed", "SharedModel", "check_packable", "content_of"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SharedModel:
    """A finished model with shared weights, and the settings of its training.

    Args:
        model: an ordinary module.
        tensors: its shared tensors, and stacks of them, by name.
        books: their codebooks.
        halved: names of the other tensors that float16 represents exactly.
        model_args: the arguments of ``timm.create_model`` that it was built with; None where timm cannot build it.
        policy: the rules by which its weights are shared.
        plans: the rule, or the reason for none, of each tensor.
        original: the dense weights by name, against which noise is measured.
        seed: of its training.
    """

    model: nn.Module
    tensors: Mapping[str, SharedTensor]
    books: tuple[Codebook, ...]
    halved: frozenset[str]
    model_args: Mapping[str, Any] | None
    policy: Policy
    plans: Sequence[TensorPlan]
    original: Mapping[str, Tensor]
    seed: int


class Packed:
    """A compressed model, ready to be saved and reported on.

    Args:
        content: what the file will contain.
        expected: what the layers of the model compute, where timm is to build it again.
    """

    def __init__(self, content: Content, expected: Trace | None = None) -> None:
        self.content, self._expected = content, expected
        self._bytes: tuple[str, bytes] | None = None

    @classmethod
    def of(cls, shared: SharedModel) -> Packed:
        """Collects the content of the file from a finished model, and what its layers compute."""
        content = content_of(shared)
        return cls(content, None if content.model is None else trace(shared.model, content.model["args"]))

    @property
    def model_args(self) -> Mapping[str, Any] | None:
        """The arguments of ``timm.create_model`` in the file; None, which may be set: to be loaded into any module."""
        return None if self.content.model is None else self.content.model["args"]

    @model_args.setter
    def model_args(self, args: Mapping[str, Any] | None) -> None:
        model = self.content.model
        if model is None:
            raise UsageError("model_args: the file names no timm model, it is to be loaded into any module")
        named = None if args is None else {**model, "args": dict(args)}
        self.content, self._bytes = replace(self.content, model=named), None

    def note(self, **facts: Any) -> None:
        """Adds facts to the provenance, such as the accuracy measured; a fact named ``recipe`` replaces the recipe.

        Args:
            facts: JSON values.
        """
        recipe = facts.pop("recipe", self.content.recipe)
        self.content = replace(self.content, recipe=recipe, provenance={**self.content.provenance, **facts})
        self._bytes = None

    def note_accuracy(
        self, packed: Evaluation, dense: Evaluation | None = None, *, data: str, split: str = "test", version: str = ""
    ) -> None:
        """Adds the accuracy to the provenance, so that report and file carry it.

        Args:
            packed: of the model that the file holds, such as ``evaluate(job.model, loader)``.
            dense: of the model before, on the same images; None: it was not measured.
            data: the name of the data set.
            split: of it.
            version: of the data set; "": it has none.
        """
        facts = {"packed": packed.top1} if dense is None else {"dense": dense.top1, "packed": packed.top1}
        self.note(data={"name": data, "version": version, "split": split, "n": packed.n}, top1=facts)

    def __repr__(self) -> str:
        content = self.content
        name = "a module" if content.model is None else content.model["name"]
        weights = sum(math.prod(tensor.shape) for tensor in content.sites.values())
        size = "" if self._bytes is None else f", {len(self._bytes[1]):,} bytes"
        return f"<Packed: {name}, {len(content.sites)} shared tensors with {weights:,} weights{size}>"

    def _repr_html_(self) -> str:
        """Returns the report for a notebook."""
        return self.report()._repr_html_()

    def save(self, path: str | PathLike[str], codec: str = "auto", force: bool = False) -> int:
        """Writes and verifies the file and returns its size in bytes.

        Args:
            path: the file.
            codec: how indices are coded; "auto": the smallest for each tensor.
            force: whether an existing file is replaced.

        Raises:
            UsageError: the file exists and ``force`` is not set.
            MissingError: the model that timm builds by its name and ``model_args`` is another: its tensors differ, or
                its layers compute something else for one random image. Set ``model_args`` and save again.
        """
        check_writable(path, force)
        if self.content.model is not None and self._expected is not None:
            model = self.content.model
            try:
                check_rebuild(model["name"], model["args"], _decoded(self.content), self._expected)
            except MissingError as error:
                raise MissingError(f"{error}; set packed.model_args and save again") from None
        return write(path, self.content, codec=codec, force=force)

    def to_bytes(self, codec: str = "auto") -> bytes:
        """Returns the bytes of the file.

        Args:
            codec: how indices are coded, as in ``save``.
        """
        if self._bytes is None or self._bytes[0] != codec:
            self._bytes = codec, pack(self.content, codec)
        return self._bytes[1]

    def report(self, codec: str = "auto") -> Report:
        """Returns sizes, entropies and errors, all computed from the bytes of the file.

        Args:
            codec: how indices are coded, as in ``save``.
        """
        with PackedFile.from_bytes(self.to_bytes(codec), MAX_MEMORY) as file:
            return Report.of(file)


def check_packable(model: nn.Module, meta: bool = False) -> None:
    """Checks that a packed file can hold the state of a model, and warns of what will be lost.

    Args:
        model: the model.
        meta: whether tensors may be on ``meta`` as yet.

    Raises:
        UsageError: it cannot.
    """
    states = state_to_pack(model, meta)
    aliases = _aliases(states)
    _warn_of_views({name: tensor for name, tensor in states.items() if name not in aliases and not tensor.is_meta})
    for key, value in _unfit(_listed(model)).items():
        expected = PREPROCESSING[key].expected
        _log.warning("%s of pretrained_cfg is %.80r, expected %s: it is not stored", key, value, expected)


def content_of(shared: SharedModel) -> Content:
    """Returns the content of the file of a finished model."""
    states = state_to_pack(shared.model)
    aliases = _aliases(states)
    name, args = timm_name(shared.model), shared.model_args
    taken = names_in(shared.tensors)
    return Content(
        sites={name: shared.tensors[name] for name in [*_by_rules(shared, states), *shared.tensors]},
        books=shared.books,
        untouched={
            name: _raw(tensor, "F16" if name in shared.halved else "")
            for name, tensor in states.items()
            if name not in taken and name not in aliases
        },
        aliases=aliases,
        model=None if name is None or args is None else {"name": name, "args": dict(args)},
        preprocessing=_preprocessing(shared.model),
        recipe={"stage": [{"rule": [rule.to_dict() for rule in shared.policy.rules]}]},
        provenance=_provenance(shared),
    )


def _by_rules(shared: SharedModel, states: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of the tensors that rules share, in the order of the state: in the file they come first."""
    plans = {plan.site.name for plan in shared.plans if plan.scheme}
    return [name for name in states if name in shared.tensors and name in plans]


def _decoded(content: Content) -> dict[str, Tensor]:
    """Returns the state dict that the file will give."""
    held = {name: decode_tensor(site, content.books[site.book]) for name, site in content.sites.items()}
    held |= {name: raw_tensor(raw) for name, raw in content.untouched.items()}
    slices = find_slices(content).items()
    state = {name: held[holder] if place is None else held[holder][place] for name, (holder, place) in slices}
    return state | {alias: state[name] for alias, name in content.aliases.items()}


def _aliases(states: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the names of tied tensors, which have exactly the same memory as another, with the name of the first."""
    first: dict[Any, str] = {}
    aliases = {}
    for name, tensor in states.items():
        if tensor.numel():
            stored = first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), name)
            if stored != name:
                aliases[name] = stored
    return aliases


def _warn_of_views(states: Mapping[str, Tensor]) -> None:
    """Warns of tensors whose memory overlaps without being identical: the file stores each in full, untied."""
    reach, holder = 0, ""
    for start, name in sorted((tensor.data_ptr(), name) for name, tensor in states.items() if tensor.numel()):
        tensor = states[name]
        steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        end = start + (steps + 1) * tensor.element_size()
        if start < reach:
            _log.warning("%s and %s lie in the same memory: each is stored for itself, no longer joined", holder, name)
        if end > reach:
            reach, holder = end, name


def _raw(tensor: Tensor, stored: str) -> RawTensor:
    if stored:  # nothing changes where ``halve_untouched`` has rounded it
        tensor = tensor.half().to(tensor.dtype)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return RawTensor(
        SAFETENSORS_NAMES[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes(), stored
    )


def _preprocessing(model: nn.Module) -> dict[str, Any] | None:
    listed = _listed(model)
    unfit = _unfit(listed)
    return {key: value for key, value in listed.items() if key not in unfit} or None


def _listed(model: nn.Module) -> dict[str, Any]:
    """Returns what ``pretrained_cfg`` says of the preprocessing, as JSON has it."""
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(cfg, dict):
        return {}
    given = {key: cfg[key] for key in PREPROCESSING if cfg.get(key) is not None}
    if len(given.get("label_names", ())) != getattr(model, "num_classes", None):
        given.pop("label_names", None)  # those of the weights it started from
    channels = image_channels(model)
    given = {key: value for key, value in given.items() if channels is None or _suits(key, value, channels)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}


def _suits(key: str, value: Any, channels: int) -> bool:
    """Returns whether an entry is for images of so many channels: timm leaves those of its weights at any in_chans."""
    if key not in ("input_size", "mean", "std") or not isinstance(value, list | tuple) or not value:
        return True
    return value[0] == channels if key == "input_size" else len(value) in (1, channels)


def _unfit(listed: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries that no file holds."""
    return {key: value for key, value in listed.items() if not PREPROCESSING[key].fits(value)}


def _provenance(shared: SharedModel) -> dict[str, Any]:
    states = shared.model.state_dict()
    rules = {plan.site.name: plan.rule for plan in shared.plans if plan.scheme}
    names = _by_rules(shared, states)
    return {
        "sqnr": [_sqnr(shared.original.get(name), states[name]) for name in names],
        "rules": [rules[name] for name in names],
        "left": {plan.site.name: plan.reason for plan in shared.plans if not plan.scheme and plan.decided},
        "parameters": sum(parameter.numel() for parameter in shared.model.parameters()),
        "seed": shared.seed,
        "versions": {"timm-compressor": compressor.__version__, "timm": timm.__version__, "torch": torch.__version__},
    }


def _sqnr(dense: Tensor | None, shared: Tensor) -> float | None:
    """Returns the signal to quantisation noise in dB, to two digits; None if nothing was lost or ``dense`` is None."""
    if dense is None:
        return None
    signal = noise = 0.0
    pairs = zip(dense.reshape(-1).split(CHUNK), shared.to(dense.device).reshape(-1).split(CHUNK), strict=True)
    for before, after in pairs:
        exact = before.double()
        signal += float(exact.square().sum())
        noise += float((exact - after.double()).square().sum())
    return round(10 * math.log10(signal / noise), 2) if noise > 0 and signal > 0 else None
