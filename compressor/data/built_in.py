"""The names of the data sets that need no files of the user's own. Nothing here imports torch."""

from __future__ import annotations

from compressor.formats.errors import MissingError, did_you_mean

__all__ = ["BUILT_IN", "check_name"]

BUILT_IN = ("digits", "fashion-mnist")
"""Names of the data sets that are read here, of files that come with scikit-learn or Debian; timm opens all others."""


def check_name(name: str, has_folder: bool) -> None:
    """Checks that a name is none of ``BUILT_IN`` misspelt.

    Args:
        name: of a data set, in any form that timm takes.
        has_folder: whether a folder of its files is named, so that timm may open it by any name.

    Raises:
        MissingError: it is; the message names the one that was meant.
    """
    if "/" not in name and not has_folder and name not in BUILT_IN and (hint := did_you_mean(name, BUILT_IN)):
        raise MissingError(f"no data set {name!r}.{hint}")
