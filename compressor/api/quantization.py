"""``tfmot.quantization.keras`` for torch: training with weights, but not activations, rounded to a few bits."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import nn

from compressor.api.wrapping import wrap
from compressor.formats.errors import UsageError
from compressor.policy.policy import Policy, Rule
from compressor.sharing.sites import find_tensors
from compressor.training.model_copy import checked_module, copy_module

__all__ = [
    "DefaultNBitQuantizeScheme",
    "QuantizeScheme",
    "quantize_annotate_layer",
    "quantize_annotate_model",
    "quantize_apply",
    "quantize_model",
]

VERB = "quantize_apply"
MARK = "quantize_annotation"
MAX_BITS = 16


class QuantizeScheme(ABC):
    """How ``quantize_apply`` quantises the layers that are marked without a configuration."""

    @property
    def keeps_zeros(self) -> bool:
        """Whether weights that are zero before the training stay zero."""
        return False

    @abstractmethod
    def rules(self, name: str, layer: nn.Module) -> list[Rule]:
        """Returns the rules that quantise a marked layer, the first that matches a tensor before all others.

        Args:
            name: of the layer in its model; "" for the model itself.
            layer: its weights are those before the training.
        """


@dataclass(frozen=True)
class DefaultNBitQuantizeScheme(QuantizeScheme):
    """Weights of few bits: evenly spaced values between the extremes of every 256 weights, recomputed in each step.

    Args:
        num_bits_weight: 1 to 16.

    Raises:
        UsageError: the number of bits is not valid.
    """

    num_bits_weight: int = 8

    def __post_init__(self) -> None:
        bits = self.num_bits_weight
        if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= MAX_BITS:
            raise UsageError(f"num_bits_weight must be a whole number from 1 to {MAX_BITS}, got {bits!r}")

    def rule(self, match: str) -> Rule:
        """Returns the rule that quantises the tensors matched by ``match`` in this way."""
        return Rule(match, scheme="uniform", bits=self.num_bits_weight)

    def rules(self, name: str, layer: nn.Module) -> list[Rule]:
        """Returns one rule for all weights of the layer."""
        del layer
        return [self.rule(f"re:{re.escape(name)}" if name else "*")]


EIGHT_BITS = DefaultNBitQuantizeScheme()


@dataclass(frozen=True)
class Annotation:
    """The mark on a layer to be quantised, with its own configuration or None for that of ``quantize_apply``."""

    quantize_config: DefaultNBitQuantizeScheme | None


def quantize_model(to_quantize: nn.Module) -> nn.Module:
    """Returns a copy of a model that trains with all its weights rounded to 8 bits.

    Args:
        to_quantize: the model.

    Raises:
        UsageError: the argument is no module.
        PolicyError: nothing in the model can be quantised.

    Example:
        >>> quantized = quantize_model(nn.Sequential(nn.Linear(64, 64)))
        >>> len(quantized[0].weight[:4].unique()) <= 256
        True
    """
    return wrap("quantize_model", to_quantize, Policy([EIGHT_BITS.rule("*")]))


def quantize_annotate_layer(
    to_annotate: nn.Module, quantize_config: DefaultNBitQuantizeScheme | None = None
) -> nn.Module:
    """Returns a copy of a layer with a mark, so that ``quantize_apply`` quantises it.

    Args:
        to_annotate: a layer, or any module whose weights are to be quantised alike.
        quantize_config: how; None: as the scheme of ``quantize_apply`` says.

    Raises:
        UsageError: the argument is no module, or the configuration none for single layers.
    """
    annotated = copy_module(_checked("quantize_annotate_layer", to_annotate))
    if not isinstance(quantize_config, DefaultNBitQuantizeScheme | None):
        raise UsageError(
            f"quantize_config must be a DefaultNBitQuantizeScheme, got {quantize_config!r:.80}; other schemes are for "
            "all marked layers of a model: quantize_apply(model, scheme)"
        )
    setattr(annotated, MARK, Annotation(quantize_config))
    return annotated


def quantize_annotate_model(to_annotate: nn.Module) -> nn.Module:
    """Returns a copy of a model with a mark on every layer that has weights to quantise and no mark yet.

    Args:
        to_annotate: the model.

    Raises:
        UsageError: the argument is no module.
    """
    annotated = copy_module(_checked("quantize_annotate_model", to_annotate))
    for site in find_tensors(annotated):
        for module, _ in site.owners:
            if site.default and not hasattr(module, MARK):
                setattr(module, MARK, Annotation(None))
    return annotated


def quantize_apply(model: nn.Module, scheme: QuantizeScheme = EIGHT_BITS) -> nn.Module:
    """Returns a copy of a model that trains with the weights of its marked layers rounded.

    Zeros and clusters of earlier stages are lost, unless one of the schemes of ``compressor.api.combine`` keeps them.

    Args:
        model: the model.
        scheme: applies to layers that are marked without a configuration.

    Raises:
        UsageError: no layer of the model is marked, or an argument is no module or no scheme.
        PolicyError: a marked layer has no weights to quantise.

    Example:
        >>> model = nn.Sequential(
        ...     nn.Linear(16, 16), quantize_annotate_layer(nn.Linear(16, 16), DefaultNBitQuantizeScheme(2))
        ... )
        >>> quantized = quantize_apply(model)
        >>> len(quantized[1].weight.unique()), len(quantized[0].weight.unique()) > 200
        (4, True)
    """
    copied = copy_module(_checked(VERB, model))
    if not isinstance(scheme, QuantizeScheme):
        raise UsageError(f"scheme must be one such as DefaultNBitQuantizeScheme(8), got {scheme!r:.80}")
    marked = [(name, module, vars(module).pop(MARK)) for name, module in copied.named_modules() if MARK in vars(module)]
    if not marked:
        raise UsageError("quantize_apply: no layer is marked; quantize_annotate_layer(layer) or _model(model) does")
    # The first matching rule applies: in reversed order, the mark of a layer precedes those of modules above it.
    rules = [
        rule for name, module, mark in marked[::-1] for rule in (mark.quantize_config or scheme).rules(name, module)
    ]
    return wrap(VERB, copied, Policy(rules), inplace=True, preserve_sparsity=scheme.keeps_zeros)


def _checked(verb: str, model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise UsageError(f"{verb} takes a torch.nn.Module, got {type(model).__name__}")
    return checked_module(model)
