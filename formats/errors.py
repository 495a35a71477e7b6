"""Every error a user can meet, and the exit code the command gives for it.

* CompressorError (1: a bug, never raised on purpose)
    - UsageError (2): an option, setting or call that cannot be
        - PolicyError: a rule, recipe or setting
    - FileError (3): the packed file, or the checkpoint, given
        - FormatError: not laid out as SPEC.md says
        - IntegrityError: a checksum does not match
        - UnsupportedError: another kind of file, a newer version, an unknown codec; a checkpoint that is none
    - MissingError (4): model, weights or data that are absent or do not fit
    - QualityError (5): a result that missed its gate
    - ResourceError (6): memory, disk, permissions
    - InterruptionError (7): a run that was told to stop, and can go on

Each message is one line: what, which (file, layer, option), got, expected, next step.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

__all__ = [
    "CompressorError",
    "FileError",
    "FormatError",
    "IntegrityError",
    "InterruptionError",
    "MissingError",
    "PolicyError",
    "QualityError",
    "ResourceError",
    "UnsupportedError",
    "UsageError",
    "did_you_mean",
]


class CompressorError(Exception):
    """Base of all errors raised on purpose."""

    exit_code: ClassVar[int] = 1

    shared = False
    """Whether all of several processes raise it alike, so that one of them has to say it."""


class UsageError(CompressorError, ValueError):
    """An option, setting or call that cannot be."""

    exit_code = 2


class PolicyError(UsageError):
    """A rule, recipe or setting that cannot be."""


class FileError(CompressorError):
    """The packed file, or the checkpoint, given cannot be used."""

    exit_code = 3


class FormatError(FileError):
    """The file is not laid out as SPEC.md says."""


class IntegrityError(FileError):
    """A checksum does not match the bytes it covers."""


class UnsupportedError(FileError):
    """Another kind of file, a newer version, an unknown codec, or a checkpoint that is none."""


class MissingError(CompressorError):
    """Model, weights or data that are absent or do not fit."""

    exit_code = 4


class QualityError(CompressorError):
    """A result that missed its gate."""

    exit_code = 5


class ResourceError(CompressorError):
    """Memory, disk or permissions do not allow it."""

    exit_code = 6


class InterruptionError(CompressorError):
    """A run was told to stop; its state is kept, and it can go on."""

    exit_code = 7


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Give `` Did you mean 'x'?`` for the nearest known word, or nothing.

    >>> did_you_mean("lernt", ["kmeans", "learnt"])
    " Did you mean 'learnt'?"
    >>> did_you_mean("zzz", ["kmeans"])
    ''
    """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
