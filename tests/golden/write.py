"""Writes the golden files that do not exist yet, and never rewrites one: ``python -m tests.golden.write``.

One packed file for every record of tests/formats/test_content.py and every codec that can code it, in a folder named
after the format's version, and the SHA-256 of its decoded tensors in tensors.json.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np

from compressor.formats.codecs.hashed import Hashed, hashed_indices
from compressor.formats.codecs.registry import CODECS
from compressor.formats.content import Content, SharedTensor, Table
from compressor.formats.errors import UsageError
from compressor.formats.file.opening import VERSION
from compressor.formats.file.writer import pack
from tests.formats.test_content import RECORDS
from tests.helpers.slow_reader import read

HERE = Path(__file__).resolve().parent


def digest(data: bytes) -> str:
    """Hash all tensors of a packed file, by the slow reader."""
    total = hashlib.sha256()
    for name, (dtype, shape, values) in sorted(read(data).items()):
        total.update(f"{name} {dtype} {list(shape)} {len(values)}\n".encode() + values)
    return total.hexdigest()


def hashed_small() -> Content:
    """Signed hashing with 100 real values."""
    values = np.linspace(-1, 1, 100).astype(np.float32).reshape(1, -1, 1)
    site = SharedTensor((30, 20), 0, hashed_indices("fc.weight", 600, 200, 7), codec=Hashed(7))
    return Content({"fc.weight": site}, (Table(values, mirrored=True),))


def golden() -> dict[str, bytes]:
    """Pack everything: file name to bytes."""
    files = {"hashed_small.hashed.safetensors": pack(hashed_small())}
    for record, make in RECORDS.items():
        if any(site.codec for site in make().sites.values()):
            continue  # large, and hashed_small says the same
        for codec in sorted(name for name, found in CODECS.items() if found.general):
            with contextlib.suppress(UsageError):  # more codewords than the codec takes
                files[f"{record}.{codec}.safetensors"] = pack(make(), codec)
    return files


def main() -> None:
    """Write what is missing."""
    folder = HERE / f"v{VERSION}"
    folder.mkdir(exist_ok=True)
    index = folder / "tensors.json"
    digests = json.loads(index.read_text()) if index.exists() else {}
    for name, data in golden().items():
        if name not in digests:
            (folder / name).write_bytes(data)
            digests[name] = digest(data)
    index.write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
