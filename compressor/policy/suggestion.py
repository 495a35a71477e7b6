"""A recipe to begin with: of a model, the layers that suffer most from few values are treated apart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

from torch import nn

from compressor.config_fields import config_fields
from compressor.formats.errors import PolicyError
from compressor.policy.policy import Rule
from compressor.policy.recipe import Recipe
from compressor.sharing.sites import Site, find_tensors
from compressor.training.config import TrainingConfig

__all__ = ["suggest_recipe"]

BITS, FINE_BITS, DEPTHWISE_BITS = 4, 8, 6
FEW = 4096  # weights of a layer that is left dense: fewer values would save less than 1 % of a small network
WIDTH = 110  # characters of a line of comments
SHOWN = "batch_size", "lr", "opt", "weight_decay", "distill", "mixup", "smoothing"


@dataclass(frozen=True)
class Part:
    """Layers that a rule treats alike.

    Args:
        title: what they are, and why they are apart.
        match: pattern of the rule.
        sites: that it matches.
        bits: of an index; None: they are left dense.
    """

    title: str
    match: str
    sites: Sequence[Site]
    bits: int | None


def suggest_recipe(model: nn.Module, name: str, cfg: Mapping[str, Any]) -> str:
    """Returns a commented recipe as TOML, which runs as it is.

    Args:
        model: its shapes alone count; it may be on the ``meta`` device.
        name: of the model, for the comments.
        cfg: timm's ``pretrained_cfg``, which names the first layer and the classifier; may be empty.

    Raises:
        PolicyError: the model has nothing that can share values.
    """
    sites = [site for site in find_tensors(model) if site.default]
    if not sites:
        raise PolicyError(f"{name}: nothing to share: no weights of two or more dimensions")
    parts: list[Part] = []
    for part in (_ends(sites, cfg, "first_conv"), _ends(sites, cfg, "classifier"), _depthwise(sites)):
        left = [site for site in part.sites if not any(site in one.sites for one in parts)]
        if left:
            parts.append(part)
    apart = [site for part in parts for site in part.sites]
    rest = [site for site in sites if site not in apart]
    if not rest:  # the last rule decides about what the others leave, which is nothing
        parts = []
        rest = sites
    total = sum(site.tensor.numel() for site in sites)
    text = "\n".join([_head(name, sites, total), *(_rule(part, total) for part in parts), _last_rule(rest, total)])
    Recipe.from_toml(text, name).stages[0].policy.plan(model)  # what is offered must run
    return text


def _ends(sites: Sequence[Site], cfg: Mapping[str, Any], key: str) -> Part:
    """Returns the first layers, or the classifier, as timm names them; without names, the first or last site."""
    names = cfg.get(key) or ()
    modules = [names] if isinstance(names, str) else list(names)
    found = [site for site in sites if any(module in site.paths() for module in modules)]
    if not found:
        found = [sites[0 if key == "first_conv" else -1]]
        modules = [found[0].name]
    modules = [module for module in modules if any(module in site.paths() for site in found)]
    title = (
        "The first layer sees the image itself: its errors reach all that follows."
        if key == "first_conv"
        else "The classifier: its errors are those of the answer."
    )
    few = sum(site.tensor.numel() for site in found) <= FEW
    return Part(title, _pattern(modules), found, None if few else FINE_BITS)


def _depthwise(sites: Sequence[Site]) -> Part:
    """Returns the depthwise convolutions, whose outputs come from a handful of weights each."""
    found = [site for site in sites if _is_depthwise(site)]
    title = "Depthwise convolutions: an output comes from a handful of weights, so that errors do not average out."
    return Part(title, _pattern_of_layers(found, sites), found, DEPTHWISE_BITS)


def _is_depthwise(site: Site) -> bool:
    return any(
        getattr(module, "groups", 1) > 1 and getattr(module, "groups", 1) == getattr(module, "in_channels", 0)
        for module, _ in site.owners
    )


def _pattern(names: Iterable[str]) -> str:
    listed = list(names)
    if len(listed) == 1 and re.fullmatch(r"[\w.]+", listed[0]):
        return listed[0]
    return f"re:^({'|'.join(map(re.escape, listed))})$"


def _pattern_of_layers(found: Sequence[Site], sites: Sequence[Site]) -> str:
    """Returns a short pattern of some sites: with any number in place of numbers, where that matches no other site."""
    if not found:
        return ""
    shapes = dict.fromkeys(re.sub(r"\d+", r"\\d+", re.escape(site.name)) for site in found)
    short = f"re:^({'|'.join(shapes)})$" if len(shapes) > 1 else f"re:^{next(iter(shapes))}$"
    rule = Rule(short)
    exact = all(rule.matches(site) == (site in found) for site in sites)
    return short if exact else _pattern(site.name for site in found)


def _head(name: str, sites: Sequence[Site], total: int) -> str:
    fields = {one.name: one for one in config_fields(TrainingConfig)}
    settings = {key: f"# {key} = {_toml(fields[key].default)}" for key in SHOWN}
    settings = {"epochs": f"epochs = {fields['epochs'].default}", **settings}
    what = (
        f"{name}: {len(sites)} tensors of {total:,} weights can share values. The first rule that matches decides. "
        f"'compress {name} --recipe FILE --dry-run' shows what becomes of each, 'compress sensitivity {name}' what "
        "rounding one alone costs. With # in front: what holds anyway."
    )
    return "\n".join(
        [_comment(what), "", "[[stage]]", *(f"{text:<24}# {fields[key].help}" for key, text in settings.items())]
    )


def _comment(text: str) -> str:
    """Returns a text as lines that TOML leaves out."""
    return fill(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _rule(part: Part, total: int) -> str:
    what = "ignore = true  # stays dense" if part.bits is None else f'scheme = "learnt"\nbits = {part.bits}'
    return f"\n{_comment(f'{part.title} {_share(part.sites, total)}')}\n[[stage.rule]]\nmatch = '{part.match}'\n{what}"


def _last_rule(sites: Sequence[Site], total: int) -> str:
    return (
        f"\n# All else. {_share(sites, total)}\n"
        '[[stage.rule]]\nmatch = "*"\nscheme = "learnt"       # others: compress schemes\n'
        f"bits = {BITS}                # {1 << BITS} values a tensor; 3 or 2 with more epochs\n"
        "# sparsity = 0.8        # and this share of the weights zero\n"
    )


def _share(sites: Sequence[Site], total: int) -> str:
    weights = sum(site.tensor.numel() for site in sites)
    tensors = "1 tensor" if len(sites) == 1 else f"{len(sites)} tensors"
    return f"{tensors}, {weights:,} weights, {100 * weights / total:.1f} % of all."
