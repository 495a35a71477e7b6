"""All errors that are raised on purpose, and the exit code of the command for each.

* CompressorError (1: a bug, never raised on purpose)
    - UsageError (2): an invalid option, setting or call
        - PolicyError: an invalid rule, recipe or setting
    - FileError (3): a packed file or checkpoint that cannot be used
        - FormatError: not laid out as SPEC.md says
        - IntegrityError: a checksum does not match
        - UnsupportedError: another kind of file, a newer version, an unknown codec; a file that is no checkpoint
    - MissingError (4): a model, weights or data that do not exist or do not fit
    - QualityError (5): a result that missed its gate
    - ResourceError (6): memory, disk, permissions, a hub or its token
    - InterruptionError (7): a run that was asked to stop and can be resumed

Each message is one line: what is wrong, where (file, layer, option), the value, the expected value, the next step.
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
    "printable",
]


class CompressorError(Exception):
    """Base class of all errors that are raised on purpose."""

    exit_code: ClassVar[int] = 1

    shared = False
    """Whether every process of a distributed run raises the same error, so that only one process has to report it."""


class UsageError(CompressorError, ValueError):
    """An option, setting or call is invalid."""

    exit_code = 2


class PolicyError(UsageError):
    """A rule, recipe or setting of a policy is invalid."""


class FileError(CompressorError):
    """A packed file or checkpoint cannot be used."""

    exit_code = 3


class FormatError(FileError):
    """The file is not laid out as SPEC.md says."""


class IntegrityError(FileError):
    """A checksum does not match the bytes it covers."""


class UnsupportedError(FileError):
    """The file is of another kind or of a newer version, needs an unknown codec, or is no checkpoint."""


class MissingError(CompressorError):
    """A model, weights or data do not exist or do not fit."""

    exit_code = 4


class QualityError(CompressorError):
    """A result missed the quality gate set for it."""

    exit_code = 5


class ResourceError(CompressorError):
    """Memory, disk space or permissions do not suffice, or the hub does not do what is asked."""

    exit_code = 6


class InterruptionError(CompressorError):
    """A run was asked to stop; its state is saved, and it can be resumed."""

    exit_code = 7


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns the sentence `` Did you mean 'x'?`` with the known word most similar to ``word``; "" if none is similar.

    The sentence begins with a space, so that it can be appended to a message.

    >>> did_you_mean("lernt", ["kmeans", "learnt"])
    " Did you mean 'learnt'?"
    >>> did_you_mean("zzz", ["kmeans"])
    ''
    """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def printable(text: str) -> str:
    r"""Escapes control characters, which could drive the terminal that the text is shown on.

    >>> printable("fc\x1b[2J")
    'fc\\x1b[2J'
    """
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)
