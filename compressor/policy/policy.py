"""Policies: ordered rules that say which tensor is shared by which scheme; the first rule that matches wins."""

from __future__ import annotations

import copy
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from compressor.formats.errors import PolicyError, did_you_mean
from compressor.sharing.pruning import Pruning, make_pruning, split_settings
from compressor.sharing.registry import make_scheme, scheme_settings
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site, find_tensors

__all__ = ["Policy", "Rule", "TensorPlan"]


@dataclass(frozen=True, init=False)
class Rule:
    """A pattern, and the scheme and settings of the tensors it matches.

    Args:
        match: a glob (``*`` matches dots too), or a regular expression after ``re:``. It is compared with the name of
            the tensor and the names of all modules above it. Norms, biases and position embeddings are matched only by
            a glob that spells out the last part of the tensor's name, such as ``*.norm1.weight``.
        scheme: id of a scheme; or a scheme, whose settings a type checker knows, such as ``Learnt(codewords=16)``;
            None: the scheme of the policy's last rule, with its settings.
        types: class names, one of which the tensor's module must be an instance of; empty: any.
        settings: settings of the scheme, or ``bits``; with any scheme also those of ``Pruning``, such as ``sparsity``.

    Raises:
        PolicyError: ``match`` is not a valid regular expression; or the scheme that is named, or a setting of it, does
            not exist or has a value that cannot be. Without a scheme, the policy says so.

    Example:
        >>> Rule("layer4", scheme="learnt", bits=2)
        Rule('layer4', scheme='learnt', bits=2)
        >>> from compressor.schemes.kmeans import KMeans
        >>> Rule("layer4", KMeans(codewords=4), sparsity=0.5)
        Rule('layer4', scheme='kmeans', codewords=4, sparsity=0.5)
    """

    match: str
    scheme: str | None
    types: tuple[str, ...]
    ignored: bool
    settings: Mapping[str, Any]

    def __init__(
        self, match: str = "*", scheme: str | Scheme | None = None, *, types: Sequence[str] = (), **settings: Any
    ) -> None:
        if isinstance(scheme, Scheme):
            settings = {**scheme.brief_settings, **settings}
            scheme = scheme.id
        for name, value in (("match", match), ("scheme", scheme), ("types", tuple(types)), ("settings", settings)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "ignored", False)
        if not isinstance(match, str):
            raise PolicyError(f"a rule begins with a pattern of names, such as '*': got {reprlib.repr(match)}")
        if match.startswith("re:"):
            _compile(match)
        if scheme is not None:  # an inherited scheme is known only where all rules of a policy are
            _scheme_of(self, self)
            _pruning_of(self, self)

    @classmethod
    def ignore(cls, match: str, types: Sequence[str] = ()) -> Rule:
        """Returns a rule that leaves the tensors it matches dense.

        Args:
            match: a pattern, as in ``Rule``.
            types: class names, as in ``Rule``.

        Example:
            >>> Rule.ignore("conv1")
            Rule.ignore('conv1')
        """
        rule = cls(match, types=types)
        object.__setattr__(rule, "ignored", True)
        return rule

    def matches(self, site: Site) -> bool:
        """Returns whether the rule applies to this tensor."""
        if self.types and not site.types & set(self.types):
            return False
        if not site.default:
            return site.named_by(self.match)
        return any(self._matches_path(path) for path in site.paths())

    def _matches_path(self, path: str) -> bool:
        if self.match.startswith("re:"):
            return _compile(self.match).fullmatch(path) is not None
        return fnmatchcase(path, self.match)

    def to_dict(self) -> dict[str, Any]:
        """Returns the rule as values that TOML can hold, as a recipe has them."""
        head: dict[str, Any] = {"match": self.match}
        if self.types:
            head["types"] = list(self.types)
        if self.ignored:
            return {**head, "ignore": True}
        return {**head, **({"scheme": self.scheme} if self.scheme else {}), **self.settings}

    def __repr__(self) -> str:
        options: dict[str, Any] = {"types": self.types} if self.types else {}
        options |= {} if self.ignored or self.scheme is None else {"scheme": self.scheme}
        parts = [repr(self.match), *(f"{key}={value!r}" for key, value in {**options, **self.settings}.items())]
        return f"Rule{'.ignore' if self.ignored else ''}({', '.join(parts)})"


@dataclass(frozen=True)
class TensorPlan:
    """The decision of a policy about one tensor.

    Args:
        site: the tensor.
        rule: position of the rule that matched it; None: no rule did.
        scheme: the scheme that shares it; None: it stays dense.
        reason: why it stays dense; "": it is shared.
        pruning: how it is pruned; None: not at all.
    """

    site: Site
    rule: int | None
    scheme: Scheme | None
    reason: str = ""
    pruning: Pruning | None = None

    @property
    def decided(self) -> bool:
        """Whether the policy decides about the tensor: any rule may match it, or one spells out its name."""
        return self.rule is not None or self.site.default


class Policy:
    """Ordered rules, of which the first that matches a tensor decides about it.

    Args:
        rules: at least one. ``given`` holds them as they were written, ``schemes`` and ``prunings`` what each resolves
            to, None for a rule that ignores.

    Raises:
        PolicyError: there is no rule, a scheme or setting does not exist, or a value is out of range.

    Example:
        >>> policy = Policy([Rule("fc", bits=8), Rule("*", scheme="kmeans", bits=4)])
        >>> policy.schemes
        (KMeans(codewords=256), KMeans(codewords=16))
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        if not rules:
            raise PolicyError("a policy needs at least one rule, such as Rule('*', scheme='learnt', bits=4)")
        if wrong := [rule for rule in rules if not isinstance(rule, Rule)]:
            raise PolicyError(
                f"a policy is a list of rules, Policy([Rule('*', 'learnt')]): got {reprlib.repr(wrong[0])}"
            )
        self.given = tuple(rules)
        self.schemes = tuple(None if rule.ignored else _scheme_of(rule, rules[-1]) for rule in rules)
        self.prunings = tuple(None if rule.ignored else _pruning_of(rule, rules[-1]) for rule in rules)
        for rule, scheme, pruning in zip(rules, self.schemes, self.prunings, strict=True):
            if pruning and scheme and not scheme.can_prune:
                cannot = f"{scheme} cannot fix single weights to zero"
                raise PolicyError(f"rule {rule.match!r} has sparsity, and {cannot}: leave it out, or change the scheme")

    def __repr__(self) -> str:
        return f"Policy({list(self.given)!r})"

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules with their scheme and all its settings spelt out, inherited and default ones included."""
        explicit = []
        for rule, scheme, pruning in zip(self.given, self.schemes, self.prunings, strict=True):
            settings = {**scheme_settings(scheme), **(asdict(pruning) if pruning else {})} if scheme else {}
            explicit.append(Rule(rule.match, scheme.id, types=rule.types, **settings) if scheme else rule)
        return tuple(explicit)

    def priced(self, rate: float) -> Policy:
        """Returns the policy with another price of a bit, for the schemes that have one."""
        policy = copy.copy(self)
        policy.schemes = tuple(one.priced(rate) if one and one.has_price else one for one in self.schemes)
        return policy

    def plan(self, model: nn.Module) -> list[TensorPlan]:
        """Returns the plan of every tensor of two or more dimensions or named by a rule, in state-dict order.

        Raises:
            PolicyError: a rule matches no tensor, no tensor is shared, or one needs more values than can be stored.
        """
        tensors = find_tensors(model)
        plans = [plan for site in tensors if (plan := self._plan_tensor(site)) is not None]
        if any(plan.decided for plan in plans):
            self._check_all_rules_match(tensors)
        if not any(plan.scheme for plan in plans):
            raise PolicyError(_nothing_shared(plans))
        return plans

    def _plan_tensor(self, site: Site) -> TensorPlan | None:
        """Returns the plan of one tensor; None: a vector that no rule names."""
        for number, (rule, scheme) in enumerate(zip(self.given, self.schemes, strict=True)):
            if rule.matches(site):
                if scheme is None:
                    return TensorPlan(site, number, None, f"ignored by rule {number + 1} ({rule.match})")
                return TensorPlan(site, number, *_scheme_or_reason(site, scheme), self.prunings[number])
        if site.tensor.ndim < 2:
            return None
        reason = f"{site.exemption}; shared only by a rule that names it" if site.exemption else "no rule matches it"
        return TensorPlan(site, None, None, reason)

    def _check_all_rules_match(self, tensors: Sequence[Site]) -> None:
        for number, rule in enumerate(self.given, 1):
            if not any(rule.matches(site) for site in tensors):
                known = {path for site in tensors for path in site.paths() if site.default}
                near = did_you_mean(rule.match.removeprefix("re:").strip("*."), known)
                raise PolicyError(f"rule {number} ({rule.match!r}) matches no tensor that can share values.{near}")


def _compile(match: str) -> re.Pattern[str]:
    try:
        return re.compile(match.removeprefix("re:"))
    except re.error as error:
        raise PolicyError(f"rule {match!r} is not a regular expression: {error}") from None


def _scheme_of(rule: Rule, last: Rule) -> Scheme:
    """Returns the scheme a rule names, or that of the last rule with the settings this rule changes."""
    if rule.scheme is not None:
        return make_scheme(rule.scheme, split_settings(rule.settings)[0])
    if last.scheme is None:
        raise PolicyError(f"rule {rule.match!r} names no scheme, and neither does the last rule")
    inherited = scheme_settings(make_scheme(last.scheme, split_settings(last.settings)[0]))
    changed = make_scheme(last.scheme, split_settings(rule.settings)[0])
    overrides = {key: value for key, value in scheme_settings(changed).items() if _sets(rule, changed, key)}
    return make_scheme(last.scheme, {**inherited, **overrides})


def _pruning_of(rule: Rule, last: Rule) -> Pruning | None:
    """Returns the pruning of a rule; one that names no scheme inherits the settings of the last rule."""
    inherited = {} if rule.scheme is not None else split_settings(last.settings)[1]
    return make_pruning({**inherited, **split_settings(rule.settings)[1]}, f"rule {rule.match!r}")


def _sets(rule: Rule, scheme: Scheme, key: str) -> bool:
    """Returns whether a rule sets this setting of its scheme, by name or by ``bits``."""
    bits = rule.settings.get("bits")
    return key in rule.settings or (bits is not None and key in scheme.settings_for_bits(bits))


def _scheme_or_reason(site: Site, scheme: Scheme) -> tuple[Scheme | None, str]:
    """Returns the scheme where sharing the tensor is possible and makes it smaller, else None and the reason."""
    tensor = site.tensor
    if not tensor.is_floating_point():
        return None, f"holds {tensor.dtype}, not floating point"
    if tensor.element_size() > 4:
        return None, f"holds {tensor.dtype}, which a packed file stores untouched"
    try:
        values = scheme.stored_values(tensor.numel())
    except PolicyError as error:
        raise PolicyError(f"{site.name}: {error}") from None
    if tensor.numel() <= values:
        return None, f"{tensor.numel():,} weights are no more than the {values:,} values they would share"
    return scheme, ""


def _nothing_shared(plans: Sequence[TensorPlan]) -> str:
    """Returns the message for a policy that shares no tensor of a model."""
    considered = [plan for plan in plans if plan.decided]
    if not considered:
        return (
            "nothing to share: no weights of two or more dimensions except norms, positions, biases that no rule names"
        )
    first = considered[0]
    return f"nothing to share: all {len(considered)} tensors are left alone; {first.site.name}: {first.reason}"
