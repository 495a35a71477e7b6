"""Schemes: how codebook and indices are found while training.

A scheme is one file in ``schemes/``: a frozen dataclass of settings, constructible with no arguments,
registered by ``@register``, with five functions and nothing else. Nothing else is edited; the contract tests
find it in ``SCHEMES``. A scheme sees a Group and never the optimiser, the trainer or the modules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from compressor.formats.codecs.base import Codec
from compressor.formats.codecs.bitpacking import gather
from compressor.formats.content import Codebook, SharedTensor, Table, index_dtype
from compressor.formats.dtypes import round_to
from compressor.formats.errors import PolicyError, did_you_mean
from compressor.sharing.group_state import GroupState
from compressor.sharing.sites import Site

__all__ = ["SCHEMES", "Scheme", "Shared", "make_scheme", "register", "share_scalars", "share_slices"]


@dataclass(frozen=True)
class Shared:
    """What a scheme hands to the file half: books, and the tensors by name that refer to them by position."""

    books: tuple[Codebook, ...]
    tensors: Mapping[str, SharedTensor]


class Scheme(ABC):
    """A frozen dataclass of settings and the five functions of a scheme."""

    id: ClassVar[str]
    paper: ClassVar[str]

    shares: ClassVar[bool] = True
    """Whether it shares values at all; False: its tensors stay free, and are stored untouched."""

    bits_taken: ClassVar[tuple[int, int]] = 1, 16
    """The least and the most that ``bits`` may be."""

    caution: ClassVar[str] = ""
    """What to say, once, where it shares weights that have been trained."""

    @property
    def whole_network(self) -> bool:
        """Whether all tensors under this scheme, with these settings, form one group."""
        return False

    @property
    def wants_gradients(self) -> bool:
        """Whether ``fit`` should be told the importance of the weights, where there is data to learn it from."""
        return False

    @classmethod
    def settings_for_bits(cls, bits: int) -> dict[str, Any]:
        """Give what ``bits`` stands for: the setting of that name, or codewords; raises PolicyError out of range."""
        least, most = cls.bits_taken
        if not least <= bits <= most:
            raise PolicyError(f"scheme {cls.id!r} takes {least} to {most} bits, got {bits}")
        return {"bits": bits} if "bits" in cls.__annotations__ else {"codewords": 2**bits}

    def generator(self) -> Codec | None:
        """Give the codec that generates its indices, of the group's codebook and after it its negatives.

        None where indices are found and kept. Only what is generated can be trained without a dense weight.
        """
        return None

    @abstractmethod
    def stored_values(self, weights: int) -> int:
        """Count the codebook values stored for a tensor of so many weights, to tell whether sharing pays.

        Raises PolicyError for more than can be stored.
        """

    @abstractmethod
    def fit(self, group: GroupState, importance: Mapping[Site, Tensor] | None) -> None:
        """Set the group's codebook and indices from its weights; ``importance`` weighs the squared errors."""

    @abstractmethod
    def weight(self, group: GroupState, site: Site, latent: Tensor) -> Tensor:
        """Give the weight the network computes with, differentiable in ``latent`` and the codebook."""

    def advance(self, group: GroupState, progress: float) -> float | None:
        """Do what is due as training progresses, 0 to 1; called before the first step and after each, under no_grad.

        Called with 1.0 before ``share``, however long training was, so that no round is left undone.

        Returns:
            Where a round begins, the progress at which it will end: the trainer then restarts the learning rate of
            this group's parameters for it, and forgets what the optimiser remembers of them. Else None.
        """
        del group, progress
        return None

    def penalty(self, group: GroupState, task: Tensor) -> Tensor | None:
        """Give a term to add to the loss, or None; ``task`` is the loss without it, a scalar without gradient."""
        del group, task
        return None

    @abstractmethod
    def share(self, group: GroupState) -> Shared:
        """Give the shared tensors; decoding them gives the weights ``Group.weight`` gave last.

        A site left out keeps those weights as they are and is stored untouched.
        """


def share_scalars(
    group: GroupState, codebook: Tensor, indices: Mapping[Site, Tensor], scales: Mapping[Site, float] | None = None
) -> Shared:
    """Bring a scalar codebook and its indices into canonical form: ascending, nothing twice, 0.0 where pruned.

    Args:
        codebook: float32[K].
        indices: int[shape] by site of ``group``, each in 0..K-1; any number where the weight is pruned.
        scales: what the codewords of a site are multiplied by.
    """
    codebook = codebook.detach().float()  # the model may have been moved to another dtype, codebooks and all
    if group.has_zeros:
        indices = {site: found.masked_fill(group.pruned(site), len(codebook)) for site, found in indices.items()}
        codebook = torch.cat([codebook, codebook.new_zeros(1)])
    latents = {site: group.latent(site) for site in indices}
    dtypes = {DTYPE_NAMES[latent.dtype] for latent in latents.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"  # one dtype: the codebook needs no more digits than it
    given = Table.of(codebook.cpu().numpy(), dtype)
    values, position = np.unique(given.values.reshape(-1), return_inverse=True)
    renamed = np.empty(len(position), dtype=index_dtype(len(values)))
    renamed[np.argsort(codebook.cpu().numpy(), kind="stable")] = position
    tensors = {
        site.name: SharedTensor(
            shape=tuple(latent.shape),
            book=0,
            indices=gather(renamed, indices[site].detach().cpu().numpy().reshape(-1)),
            dtype=DTYPE_NAMES[latent.dtype],
            scale=None if scales is None else np.array([scales[site]], np.float32),
        )
        for site, latent in latents.items()
    }
    return Shared((Table(values.reshape(1, -1, 1), dtype),), tensors)


def share_slices(group: GroupState, codebooks: Tensor, indices: Tensor) -> Shared:
    """Bring the codebooks of the slices of a tensor's axis 0 into canonical form: ascending, 0.0 where pruned.

    Args:
        codebooks: float32[slices, K].
        indices: int[shape] of the group's one tensor, into its slice's codebook; any number where it is pruned.
    """
    (site,) = group.sites
    dtype, shape = DTYPE_NAMES[group.latent(site).dtype], tuple(indices.shape)
    codebooks = codebooks.detach().float()
    if group.has_zeros:
        indices = indices.masked_fill(group.pruned(site), codebooks.shape[1])
        codebooks = torch.cat([codebooks, codebooks.new_zeros(len(codebooks), 1)], dim=1)
    given = round_to(codebooks.cpu().numpy(), dtype) + np.float32(0)  # -0.0 becomes 0.0
    order = np.argsort(given, axis=1, kind="stable")
    position = np.argsort(order, axis=1).astype(index_dtype(given.shape[1]))
    renamed = np.take_along_axis(position, indices.cpu().numpy().reshape(len(given), -1), axis=1)
    table = Table(np.take_along_axis(given, order, axis=1)[:, :, None], dtype)
    return Shared((table,), {site.name: SharedTensor(shape, 0, renamed.reshape(-1), dtype, axis=0)})


DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


SCHEMES: dict[str, type[Scheme]] = {}
S = TypeVar("S")


def register(cls: type[S]) -> type[S]:
    """Add a scheme class to ``SCHEMES`` under its id, which must be free."""
    scheme = cast(type[Scheme], cls)  # pydantic's decorator hides the base class from the type checker
    if scheme.id in SCHEMES:
        raise PolicyError(f"scheme id {scheme.id!r} is taken by {SCHEMES[scheme.id].__module__}")
    SCHEMES[scheme.id] = scheme
    scheme.__repr__ = _brief  # type: ignore[method-assign,assignment]
    return cls


def _brief(scheme: Scheme) -> str:
    """Show the first setting, and those that are not at their defaults."""
    settings = fields(scheme)  # type: ignore[arg-type]
    said = [f for n, f in enumerate(settings) if n == 0 or getattr(scheme, f.name) != f.default]
    return f"{type(scheme).__name__}({', '.join(f'{f.name}={getattr(scheme, f.name)!r}' for f in said)})"


def make_scheme(name: str, settings: Mapping[str, Any]) -> Scheme:
    """Build a scheme from its id and settings, ``bits`` among them if wished.

    Raises PolicyError, naming the nearest known word, for what no scheme or setting is called.

    Example:
        >>> make_scheme("kmeans", {"bits": 2})
        KMeans(codewords=4)
    """
    if name not in SCHEMES:
        known = ", ".join(sorted(SCHEMES))
        raise PolicyError(f"no scheme {name!r}.{did_you_mean(name, SCHEMES)} Known schemes: {known}.")
    cls = SCHEMES[name]
    known_settings = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in settings:
        if key not in (*known_settings, "bits"):
            near = did_you_mean(key, [*known_settings, "bits"])
            has = ", ".join(known_settings)
            raise PolicyError(f"scheme {name!r} has no setting {key!r}.{near} Its settings: {has}.")
    given = dict(settings)
    if "bits" in given:
        given = {**cls.settings_for_bits(_whole(name, given.pop("bits"))), **given}
    try:
        made: Scheme = TypeAdapter(cls).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise PolicyError(f"scheme {name!r}, setting {key!r}: {first['msg']}, got {first['input']!r}") from None
    return made


def _whole(name: str, bits: Any) -> int:
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise PolicyError(f"scheme {name!r}: bits must be a whole number, got {bits!r}")
    return bits


def scheme_settings(scheme: Scheme) -> dict[str, Any]:
    """Give all settings of a scheme as TOML-ready values; ``make_scheme`` gives the scheme back."""
    settings = asdict(scheme)  # type: ignore[call-overload]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def describe(cls: type[Scheme]) -> dict[str, Any]:
    """Give id, first docstring line, settings with defaults, and paper of a scheme."""
    known = {f.name: f.default for f in fields(cls) if f.default is not MISSING}  # type: ignore[arg-type]
    defaults = {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}
    return {"id": cls.id, "summary": (cls.__doc__ or "").splitlines()[0], "settings": defaults, "paper": cls.paper}
