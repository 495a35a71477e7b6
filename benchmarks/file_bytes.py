"""Where the bytes of packed files go, and what classes save: zoo checkpoints, and networks compressed after training.

    OMP_NUM_THREADS=1 python benchmarks/file_bytes.py [--dense FOLDER] [--repeat 7]

Each file is written in version 1 of the format with the codec ``ans`` for all tensors, and in version 2 both so and
with the smallest codec for each. The networks of ``--dense`` are compressed at one price each, with 256 training
images, and nothing is trained; without it they are left out. Of the streams with classes, the entropy of the indices
given their tables is computed from the indices, and what the streams take beyond it: for classes, for tables, and for
the rest (rounding, states, sizes). Times are processor times of one thread, the three files in turn. Rows go to
``results/file_bytes.jsonl``, where they replace those of the same files, and the tables between the markers of
``README.md`` are rewritten.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from codec_speed import decode_indices
from nncodec_peer import NNCodec
from numpy.typing import NDArray
from page import put
from peer_environment import default_folder
from post_training import Bench, args
from version_1 import pack_version_1

from compressor import Compressor
from compressor.formats.codecs.base import Stream
from compressor.formats.codecs.classes import PlacedAns, StreamReader
from compressor.formats.content import Content
from compressor.formats.file.container import canonical_json
from compressor.formats.file.deflate import deflate
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import write
from compressor.formats.loader import load
from compressor.report.weight_stats import entropy

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "file_bytes.jsonl"
ZOO = HERE.parent / "model_zoo" / "checkpoints"
PRICES = {"test_resnet": 4e-7, "mobilenetv3_small_050": 6e-8, "test_vit": 6e-8, "resnet18": 4e-8}
PARTS = "file", "indices", "codebooks", "untouched", "header", "checksums"
KINDS = "v1", "ans", "auto"  # version 1 and ``ans``, version 2 and ``ans``, version 2 and the smallest codecs
STREAMS = "streams", "ans", "size", "entropy", "classes", "tables", "rest", "within"
NEAR, BYTES = 0.005, 32  # a stream is near the entropy of what it codes within this part of it and so many bytes


def contents(dense: Path | None) -> Iterator[tuple[str, Content]]:
    """Yields the content of each file with its name."""
    for path in sorted(ZOO.glob("*.safetensors")):
        with PackedFile.open(path) as file:
            yield path.stem, file.content()
    if dense is None:
        return
    bench = Bench(dense, NNCodec(default_folder(), keep=True))
    for net, price in PRICES.items():
        torch.manual_seed(0)
        job = Compressor(bench.dense(net), rate=price, model_args=args(net), teacher=None)
        packed = job.prepare(calibration=bench.images(0)).finish(half_untouched=True, fold_norms=True)
        yield f"{net} {price:g}", packed.content


def coded(histogram: NDArray[np.int64]) -> float:
    """Returns the bytes of symbols that occur so often, by their entropy."""
    return int(histogram.sum()) * entropy(histogram) / 8


def stream_parts(indices: NDArray[Any], stream: Stream, ans: int) -> dict[str, float]:
    """Returns the bytes of a stream by part; ``within`` is 1 where all but entropy and tables is next to nothing."""
    data = PlacedAns().encode(indices, stream)
    reader = StreamReader(memoryview(data), stream)
    classes, shape = reader.classes(), (reader.tables, stream.codewords)
    codes = classes.choices(0, stream.count).astype(np.int64) * stream.codewords + indices
    given = sum(coded(row) for row in np.bincount(codes, minlength=shape[0] * shape[1]).reshape(shape))
    of_classes = sum(coded(np.bincount(axis)) for axis in classes.axes)
    rest = len(data) - given - of_classes - reader.head_size
    sizes = {"streams": 1, "ans": ans, "size": len(data), "entropy": given, "classes": of_classes}
    return sizes | {"tables": reader.head_size, "rest": rest, "within": rest <= NEAR * given + BYTES}


def streams(before: Path, after: Path) -> dict[str, float]:
    """Returns the sums of ``stream_parts`` over all streams with classes."""
    sums = dict.fromkeys(STREAMS, 0.0)
    with PackedFile.open(before) as old, PackedFile.open(after) as file:
        for name, site in file.sites.items():
            if site.codec == PlacedAns.id:
                stream = Stream(name, site.count, site.codewords, site.index_shape)
                for key, value in stream_parts(file.indices(name), stream, old.sites[name].size).items():
                    sums[key] += value
    return sums


def in_turn(acts: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Returns the median processor milliseconds of each act; the first turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in acts}
    for _ in range(repeat + 1):
        for name, act in acts.items():
            start = time.process_time()
            act()
            seconds[name].append(time.process_time() - start)
    return {name: 1e3 * statistics.median(times[1:]) for name, times in seconds.items()}


def grid_bytes(file: PackedFile) -> int:
    """Returns the bytes that codebooks which are grids take in the deflated metadata: what they would take less."""
    fields = dict(file.metadata)
    with_grids = len(deflate(canonical_json(fields).encode()))
    fields["books"] = [book for book in fields["books"] if book[0] not in ("grid", "steps")]
    return with_grids - len(deflate(canonical_json(fields).encode()))


def measure(name: str, content: Content, folder: Path, repeat: int) -> dict[str, Any]:
    """Returns the row of a file."""
    paths = {kind: folder / f"{kind}.safetensors" for kind in KINDS}
    row: dict[str, Any] = {"name": name}
    paths["v1"].write_bytes(pack_version_1(content, "ans"))
    for codec in KINDS[1:]:
        start = time.process_time()
        write(paths[codec], content, codec, force=True)
        row[f"{codec} write ms"] = 1e3 * (time.process_time() - start)
    for kind, path in paths.items():
        with PackedFile.open(path) as file:
            row |= {f"{kind} {part}": getattr(file.sizes(), part) for part in PARTS}
            row["indices"] = sum(site.count for site in file.sites.values())
            row["grids"] = grid_bytes(file)
    acts: dict[str, Callable[[], object]] = {}
    for kind, path in paths.items():
        acts[f"{kind} decode ms"] = lambda path=path: decode_indices(path)  # type: ignore[misc]
        acts[f"{kind} load ms"] = lambda path=path: load(path)  # type: ignore[misc]
    return row | in_turn(acts, repeat) | streams(paths["ans"], paths["auto"])


def bytes_table(rows: list[dict[str, Any]]) -> str:
    """Returns the table of bytes by part, before and after."""
    columns = "bytes", "indices", "tables", "untouched", "header, checksums"
    lines = ["| file | " + " | ".join(f"{name}, v1 | v2" for name in columns) + " | v2 less grids |"]
    lines.append("|---" + "|--:" * 11 + "|")
    for row in rows:
        sums = {kind: row[f"{kind} header"] + row[f"{kind} checksums"] for kind in ("v1", "auto")}
        cells = [f"{row[f'{kind} {part}']:,}" for part in PARTS[:4] for kind in sums]
        cells += [f"{size:,}" for size in (*sums.values(), sums["auto"] - row["grids"])]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def times_table(rows: list[dict[str, Any]]) -> str:
    """Returns the table of times, each with its ratio to that of version 1."""
    columns = " | ".join(f"{what} ms, v1 `ans` | v2 `ans` | times | smallest | times" for what in ("decode", "load"))
    lines = [f"| file | {columns} |", "|---" + "|--:" * 10 + "|"]
    for row in rows:
        cells = []
        for what in ("decode", "load"):
            times = [row[f"{kind} {what} ms"] for kind in KINDS]
            cells.append(f"{times[0]:.1f}")
            cells += [f"{one:.1f} | {one / times[0]:.2f}" for one in times[1:]]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def codecs_table(rows: list[dict[str, Any]]) -> str:
    """Returns the table of what choosing codecs saves."""
    lines = ["| file | bytes, `ans` | smallest | | indices, `ans` | smallest | |", "|---" + "|--:" * 6 + "|"]
    for row in rows:
        change = {part: f"{100 * row[f'auto {part}'] / row[f'ans {part}'] - 100:.1f} %" for part in PARTS[:2]}
        sizes = [f"{row[f'ans {part}']:,} | {row[f'auto {part}']:,} | {change[part]}" for part in PARTS[:2]]
        lines.append(f"| {row['name']} | {' | '.join(sizes)} |")
    return "\n".join(lines)


def streams_table(rows: list[dict[str, Any]]) -> str:
    """Returns the table of the streams with classes by part."""
    lines = ["| file | streams | with `ans` | bytes | entropy given tables | classes | tables | rest | near |"]
    lines.append("|---" + "|--:" * 8 + "|")
    lines += [f"| {row['name']} | " + " | ".join(f"{row[part]:,.0f}" for part in STREAMS) + " |" for row in rows]
    return "\n".join(lines)


def put_tables(rows: list[dict[str, Any]]) -> None:
    """Rewrites the tables of the page; rows from before version 1 was measured beside are in two of them."""
    beside = [row for row in rows if "v1 file" in row]
    for name, table in {"parts": bytes_table(beside), "times": times_table(beside)}.items():
        put(f"file_bytes {name}", table)
    for name, table in {"files": codecs_table(rows), "streams": streams_table(rows)}.items():
        put(f"file_bytes {name}", table)


@click.command()
@click.option("--dense", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of dense weights.")
@click.option("--repeat", default=7, help="Turns of the times.")
def main(dense: Path | None, repeat: int) -> None:
    """Measures all files, and rewrites rows and tables."""
    torch.set_num_threads(1)
    known = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    rows = {row["name"]: row for row in known}
    with tempfile.TemporaryDirectory() as folder:
        for name, content in contents(dense):
            rows[name] = measure(name, content, Path(folder), repeat)
            print(rows[name], flush=True)
            RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    put_tables([*rows.values()])


if __name__ == "__main__":
    main()
