"""The files of a repository: the packed file, timm's configuration, the picture and the model card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from compressor.comparison.details import Details
from compressor.comparison.points import recipe_command
from compressor.formats.file.reader import PackedFile
from compressor.formats.io.hub import PACKED, PREFIX
from compressor.models.local_dir import CONFIG, local_config
from compressor.publishing.card import model_card

__all__ = ["file_names", "repository_files"]

CARD, PICTURE = "README.md", "bytes.png"


def file_names(file: PackedFile) -> Sequence[str]:
    """Returns the names of the files of a repository, in the order in which a folder of them is written."""
    return [PACKED, *([CONFIG] if file.model else []), *([PICTURE] if file.sites else []), CARD]


def repository_files(file: PackedFile, repository: str, base_model: str | None) -> dict[str, bytes]:
    """Returns the files of a repository by their names.

    Args:
        file: a packed file, opened.
        repository: ``OWNER/NAME``.
        base_model: the repository of the dense weights; None: it is not known.

    Raises:
        FileError: a part of the file is damaged.
        MissingError: matplotlib is not installed, or timm cannot build the model.
    """
    for fault in file.check():
        raise fault
    names = file_names(file)
    data = bytes(file.source.read(0, file.source.size))
    details = Details.of(file, None, None)
    files = {PACKED: data}
    if file.model and CONFIG in names:
        files[CONFIG] = json.dumps(local_config(file.model, file.preprocessing or {}), indent=2).encode()
    if PICTURE in names:
        files[PICTURE] = next(details.pictures()).png()
    card = model_card(
        details.report, repository, command=recipe_command(PREFIX + repository, file), base_model=base_model,
        sha256=hashlib.sha256(data).hexdigest(), picture=PICTURE if PICTURE in names else None,
    )  # fmt: skip
    return {**files, CARD: card.encode()}
