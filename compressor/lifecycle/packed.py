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
from compressor.formats.content import Codebook, Content, RawTensor, SharedTensor
from compressor.formats.errors import MissingError, UsageError
from compressor.formats.file.memory import MAX_MEMORY
from compressor.formats.file.objects import PREPROCESSING
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack, write
from compressor.formats.loader import build_model, check_fits
from compressor.formats.torch_tensors import SAFETENSORS_NAMES
from compressor.policy.policy import Policy, TensorPlan
from compressor.report.report import Report
from compressor.sharing.group_state import CHUNK

__all__ = ["Packed", "SharedModel"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SharedModel:
    """A finished model with shared weights, and the settings of its training.

    Args:
        model: an ordinary module.
        tensors: its shared tensors by name.
        books: their codebooks.
        halved: names of the other tensors that float16 represents exactly.
        model_args: the arguments of ``timm.create_model`` that it was built with.
        policy: the rules by which its weights are shared.
        plans: the rule, or the reason for none, of each tensor.
        original: the dense weights by name, against which noise is measured.
        seed: of its training.
    """

    model: nn.Module
    tensors: Mapping[str, SharedTensor]
    books: tuple[Codebook, ...]
    halved: frozenset[str]
    model_args: Mapping[str, Any]
    policy: Policy
    plans: Sequence[TensorPlan]
    original: Mapping[str, Tensor]
    seed: int


class Packed:
    """A compressed model, ready to be saved and reported on.

    Args:
        content: what the file will contain.
    """

    def __init__(self, content: Content) -> None:
        self.content = content
        self._bytes: tuple[str, bytes] | None = None

    @classmethod
    def of(cls, shared: SharedModel) -> Packed:
        """Collects the content of the file from a finished model."""
        states = _states(shared.model)
        aliases = _aliases(states)
        _warn_of_views({name: tensor for name, tensor in states.items() if name not in aliases})
        cfg = getattr(shared.model, "pretrained_cfg", None)
        return cls(
            Content(
                sites={name: shared.tensors[name] for name in states if name in shared.tensors},
                books=shared.books,
                untouched={
                    name: _raw(tensor, "F16" if name in shared.halved else "")
                    for name, tensor in states.items()
                    if name not in shared.tensors and name not in aliases
                },
                aliases=aliases,
                model=_timm_model(cfg, shared.model_args),
                preprocessing=_preprocessing(cfg),
                recipe={"stage": [{"rule": [rule.to_dict() for rule in shared.policy.rules]}]},
                provenance=_provenance(shared),
            )
        )

    def note(self, **facts: Any) -> None:
        """Adds facts to the provenance, such as the accuracy measured; a fact named ``recipe`` replaces the recipe.

        Args:
            facts: JSON values.
        """
        recipe = facts.pop("recipe", self.content.recipe)
        self.content = replace(self.content, recipe=recipe, provenance={**self.content.provenance, **facts})
        self._bytes = None

    def save(self, path: str | PathLike[str], codec: str = "auto", force: bool = False) -> int:
        """Writes and verifies the file and returns its size in bytes.

        Args:
            path: the file.
            codec: how indices are coded; "auto": the smallest for each tensor.
            force: whether an existing file is replaced.

        Raises:
            UsageError: the file exists and ``force`` is not set.
            MissingError: the model cannot be rebuilt from its name and ``model_args``.
        """
        if self.content.model is not None:
            _check_rebuild(self.content)
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


def _check_rebuild(content: Content) -> None:
    assert content.model is not None
    name, args = content.model["name"], content.model["args"]
    try:
        check_fits(content, build_model(name, args, device="meta"))
    except MissingError as error:
        built = f"timm's {name} built with {args or 'no arguments'}"
        raise MissingError(f"{built} is not this model: {error}; pass model_args") from None


def _states(model: nn.Module) -> dict[str, Tensor]:
    states = model.state_dict()
    for name, value in states.items():
        if not isinstance(value, Tensor):
            raise UsageError(f"state {name!r} is a {type(value).__name__}, not a tensor: it cannot be packed")
        if value.dtype not in SAFETENSORS_NAMES or value.layout is not torch.strided or value.is_meta:
            kind = "meta" if value.is_meta else f"{value.layout} {value.dtype}"
            raise UsageError(f"{name}: a {kind} tensor cannot be packed; make it a dense one of a common dtype")
    return dict(states)


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
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return RawTensor(
        SAFETENSORS_NAMES[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes(), stored
    )


def _timm_model(cfg: Any, args: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns timm's name and arguments of the model; None if it is not timm's."""
    is_timm = isinstance(cfg, dict) and cfg.get("architecture")
    return {"name": cfg["architecture"], "args": dict(args)} if is_timm else None


def _preprocessing(cfg: Any) -> dict[str, Any] | None:
    if not isinstance(cfg, dict):
        return None
    given = {key: cfg[key] for key in PREPROCESSING if cfg.get(key) is not None}
    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
    for key in [key for key, value in listed.items() if not PREPROCESSING[key].fits(value)]:
        value, expected = listed.pop(key), PREPROCESSING[key].expected
        _log.warning("%s of pretrained_cfg is %.80r, expected %s: it is not stored", key, value, expected)
    return listed or None


def _provenance(shared: SharedModel) -> dict[str, Any]:
    states = shared.model.state_dict()
    rules = {plan.site.name: plan.rule for plan in shared.plans if plan.scheme}
    return {
        "sqnr": [_sqnr(shared.original.get(name), states[name]) for name in states if name in shared.tensors],
        "rules": [rules[name] for name in states if name in shared.tensors],
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
