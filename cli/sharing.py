"""How ``compress MODEL`` was asked to let weights share values.

Nothing here imports torch, timm or pydantic, so that ``--help`` is quick.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.cli.click_options import given_flags
from compressor.cli.completion import completing, recipes, schemes
from compressor.cli.spelling import check_recipe, check_scheme
from compressor.config_fields import config_field
from compressor.formats.errors import UsageError

__all__ = ["SharingConfig"]

NUMBERS = ("codewords", "delta", "sparsity")
FIXED_BY_PRICE = ("bits", "codewords", "delta")  # what a target's price decides
DEFAULT_SCHEME, DEFAULT_BITS = "learnt", 4


@dataclass(frozen=True)
class SharingConfig:
    """How weights share values; None where the command does not say."""

    scheme: str | None = config_field(
        None,
        "How weights share values: see 'compress schemes'. [default: learnt, 4 bits]",
        click={"shell_complete": completing(schemes)},
    )
    bits: int | None = config_field(None, "Bits of an index: 2^BITS shared values for most schemes.", ge=1)
    codewords: int | None = config_field(None, "Number of shared values, instead of --bits.", ge=1)
    delta: float | None = config_field(None, "Largest relative distance of a weight to its value, for wfn.", gt=0)
    sparsity: float | None = config_field(
        None, "Share of weights that are pruned to zero, under any scheme.", ge=0, lt=1
    )
    settings: tuple[str, ...] = config_field((), "A setting of the scheme.", metavar="KEY=VALUE", flags=("--set",))
    recipe: str | None = config_field(
        None,
        "Shipped recipe, TOML file, or that of a packed file.",
        metavar="NAME|FILE",
        click={"shell_complete": completing(recipes, files=True)},
    )

    def check(self) -> None:
        """Raises UsageError for options that contradict each other, or the error for a name that nothing has."""
        if self.recipe is not None and (extra := given_flags(self, "scheme", "bits", *NUMBERS, "settings")):
            raise UsageError(f"--recipe says what is shared and how: leave out {', '.join(extra)}")
        if self.bits is not None and self.codewords is not None:
            raise UsageError("--bits and --codewords: name one")
        check_scheme(self.scheme)
        check_recipe(self.recipe)

    def rule(self, has_price: bool = False) -> dict[str, Any]:
        """Returns the one rule of the policy where there is no recipe, as keyword arguments of ``Rule``.

        Args:
            has_price: a price decides how many values there are, so that no default does.
        """
        numbers = {name: value for name in NUMBERS if (value := getattr(self, name)) is not None}
        settings = {**dict(_setting(text) for text in self.settings), **numbers}
        bits = self.bits
        if not has_price and self.scheme is None and bits is None and not settings.keys() - {"sparsity"}:
            bits = DEFAULT_BITS
        return {"scheme": self.scheme or DEFAULT_SCHEME, **({} if bits is None else {"bits": bits}), **settings}

    def fixed_by_price(self) -> list[str]:
        """Returns the options that a price makes pointless."""
        settings = [key for text in self.settings if (key := _setting(text)[0]) in (*FIXED_BY_PRICE, "rate")]
        return [*given_flags(self, *FIXED_BY_PRICE), *(f"--set {key}" for key in settings)]

    def label(self, has_price: bool = False) -> str:
        """Returns a short name for files: that of the recipe, or scheme and numbers, such as ``learnt4``."""
        if self.recipe is not None:
            return Path(self.recipe.removeprefix("zoo:")).stem
        rule = self.rule(has_price)
        numbers = "".join(f"-{name}{rule[name]}" for name in NUMBERS if name in rule)
        return f"{rule['scheme']}{rule.get('bits', '')}{numbers}".replace("-codewords", "-")

    def command_line(self, has_price: bool = False) -> str:
        """Returns the options that ask for the same."""
        if self.recipe is not None:
            return f"--recipe {self.recipe}"
        rule = self.rule(has_price)
        return f"--scheme {rule['scheme']}" + "".join(f" --{k} {rule[k]}" for k in ("bits", *NUMBERS) if k in rule)


def _setting(text: str) -> tuple[str, Any]:
    """Reads KEY=VALUE; a value that is no number, truth value or list of TOML is a word.

    >>> _setting("threshold=0.5"), _setting("init=linear")
    (('threshold', 0.5), ('init', 'linear'))
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {text}: expected KEY=VALUE")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value
