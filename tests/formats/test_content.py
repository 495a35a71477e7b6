"""The record through the file: what is read back decodes to the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from compressor.formats.codecs.hashed import Hashed, hashed_indices
from compressor.formats.codecs.registry import CODECS
from compressor.formats.content import Codebook, Content, Grid, RawTensor, SharedTensor, Table, decode, index_dtype
from compressor.formats.dtypes import from_storage, round_to
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack

GENERAL = sorted(name for name, codec in CODECS.items() if codec.general)


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def indices(count: int, codewords: int, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(0, codewords, count).astype(index_dtype(codewords))


def network_wide_book() -> Content:
    sites = {f"layer{n}.weight": SharedTensor((8, 5 + n), 0, indices(8 * (5 + n), 20, n)) for n in range(3)}
    return Content(sites, (Table.of(normal(20)),))


def hashed_with_many_codewords() -> Content:
    """HashedNets: 2**17 real values and their negatives make 262,144 codewords."""
    codewords = 1 << 18
    site = SharedTensor((300, 100), 0, hashed_indices("fc.weight", 30_000, codewords, 11), codec=Hashed(11))
    return Content({"fc.weight": site}, (Table(normal(1, codewords // 2, 1), mirrored=True),))


def flat_blocks() -> Content:
    """Blocks of 256 entries in C order, each with a scale and an offset; the last is cut short."""
    site = SharedTensor(
        (10, 77), 0, indices(770, 16), block=256,
        scale=round_to(normal(4, seed=1), "F16"), offset=round_to(normal(4, seed=2), "F16"), scale_dtype="F16",
    )  # fmt: skip
    return Content({"fc.weight": site}, (Table.of(normal(16), "F16"),))


def per_channel_books() -> Content:
    site = SharedTensor((6, 4, 3, 3), 0, indices(216, 4), axis=0)
    return Content({"conv.weight": site}, (Table(np.sort(normal(6, 4, 1), axis=1)),))


def vectors_with_tail() -> Content:
    """Vectors of 4 along an axis of 10: the third of each row gives two entries only."""
    values = normal(1, 32, 4)
    values = values[:, np.argsort(values[0, :, 0])]
    site = SharedTensor((5, 10, 3), 0, indices(5 * 3 * 3, 32), vector_axis=1)
    return Content({"conv.weight": site}, (Table(values),))


def wide_grid() -> Content:
    site = SharedTensor((50, 40), 0, indices(2000, 1 << 16))
    return Content({"fc.weight": site}, (Grid(-1.0, 2.0**-15, 1 << 16),))


def tied_tensors() -> Content:
    site = SharedTensor((9, 4), 0, indices(36, 3))
    raw = RawTensor("F32", (4,), normal(4).tobytes())
    return Content(
        {"embed.weight": site}, (Table.of([-1.0, 0.0, 2.0]),), {"norm.bias": raw},
        {"head.weight": "embed.weight", "norm2.bias": "norm.bias"},
    )  # fmt: skip


def far_below_one_bit() -> Content:
    """A pruned tensor at 0.3 bits a weight: 97 % zeros."""
    rng = np.random.default_rng(0)
    drawn = rng.choice(5, 40_000, p=[0.01, 0.005, 0.97, 0.005, 0.01]).astype(np.uint8)
    return Content({"conv.weight": SharedTensor((400, 100), 0, drawn)}, (Table.of([-2, -1, 0, 1, 2]),))


def stacks_and_constants() -> Content:
    """A grid that begins at a whole number of steps; stacks with a scale per tensor; tensors of one value."""
    sites = {
        "conv.weight": SharedTensor((8, 4, 3, 3), 0, indices(288, 9)),
        "bn1.weight bn2.weight bn3.weight": SharedTensor((3, 8), 1, indices(24, 5), axis=0, scale=normal(3)),
        "bn1.bias bn2.bias": SharedTensor((2, 8), 2, indices(16, 3)),
    }
    ones, zeros = np.ones(8, np.float32).tobytes(), bytes(32)
    untouched = {
        "bn1.running_mean": RawTensor("F32", (8,), zeros), "bn1.running_var": RawTensor("F32", (8,), ones),
        "bn2.running_mean": RawTensor("F32", (8,), zeros), "bn1.num_batches_tracked": RawTensor("I64", (), bytes(8)),
        "mask": RawTensor("BOOL", (3, 3), b"\1" * 9), "half": RawTensor("BF16", (5,), b"\x00\x40" * 5),
        "fc.bias": RawTensor("F32", (3,), normal(3).tobytes()),
    }  # fmt: skip
    return Content(sites, (Grid(-4 * 0.125, 0.125, 9), Grid(-0.3, 0.1, 5), Table.of([-1.0, 0.0, 1.0])), untouched)


RECORDS = {
    make.__name__: make
    for make in (
        network_wide_book, hashed_with_many_codewords, flat_blocks, per_channel_books,
        vectors_with_tail, wide_grid, tied_tensors, far_below_one_bit,
        stacks_and_constants,
    )
}  # fmt: skip


def slow_decode(site: SharedTensor, book: Codebook) -> NDArray[np.float32]:
    """Follow the definition entry by entry: w = values[book[g], index] * scale[g] + offset[g]."""
    table = book.expand()
    books, _, length = table.shape
    weights = np.empty(site.shape, np.float32)
    along = site.shape[site.vector_axis]
    rows = -(-along // length)
    for flat, where in enumerate(np.ndindex(*site.shape)):
        group = where[site.axis] if site.axis is not None else flat // site.block if site.block else 0
        others = [size for axis, size in enumerate(site.shape) if axis != site.vector_axis]
        outer = np.ravel_multi_index([i for axis, i in enumerate(where) if axis != site.vector_axis], others)
        along_here = where[site.vector_axis]
        position = int(outer) * rows + along_here // length if length > 1 else flat
        value = table[group if books > 1 else 0, int(site.indices[position]), along_here % length]
        value = np.float32(value) * site.scale[group] if site.scale is not None else value
        weights[where] = value + site.offset[group] if site.offset is not None else value
    return weights


@pytest.mark.parametrize("codec", [*GENERAL, "auto"])
@pytest.mark.parametrize("record", RECORDS)
def test_round_trip(record: str, codec: str) -> None:
    content = RECORDS[record]()
    if codec != "auto" and max(book.shape[1] for book in content.books) > CODECS[codec].max_codewords:
        pytest.skip(f"{codec} takes fewer codewords")
    with PackedFile.from_bytes(pack(content, codec)) as file:
        assert file.check() == []
        assert file.aliases == content.aliases
        for name, site in content.sites.items():
            expected = decode(site, content.books[site.book])
            assert file.tensor(name).dtype == np.float32
            np.testing.assert_array_equal(file.tensor(name).view(np.uint32), expected.view(np.uint32))
            np.testing.assert_array_equal(file.indices(name), site.indices)
        for name, raw in content.untouched.items():
            assert file.raw(name).data == raw.data


@pytest.mark.parametrize("record", RECORDS)
def test_decoder_follows_the_definition(record: str) -> None:
    content = RECORDS[record]()
    site = next(iter(content.sites.values()))
    book = content.books[site.book]
    np.testing.assert_array_equal(decode(site, book), slow_decode(site, book))


@pytest.mark.parametrize("record", RECORDS)
def test_content_read_packs_to_the_same_bytes(record: str) -> None:
    data = pack(RECORDS[record]())
    with PackedFile.from_bytes(data) as file:
        assert pack(file.content()) == data


def test_vectors_per_group_take_the_group_of_their_row() -> None:
    site = SharedTensor((3, 2, 5), 0, indices(18, 4), axis=0, vector_axis=2)
    book = Table(np.sort(normal(3, 4, 2), axis=1))
    np.testing.assert_array_equal(decode(site, book), slow_decode(site, book))
    with PackedFile.from_bytes(pack(Content({"fc.weight": site}, (book,)))) as file:
        np.testing.assert_array_equal(file.tensor("fc.weight"), decode(site, book))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_weights_are_rounded_once_to_their_dtype(dtype: str) -> None:
    scale = np.array([3.7], np.float32)
    site = SharedTensor((30,), 0, indices(30, 8), dtype, scale=scale)
    book = Table.of(normal(8))
    expected = round_to(book.expand().reshape(-1)[site.indices] * scale, dtype, cast=True)
    with PackedFile.from_bytes(pack(Content({"fc.weight": site}, (book,)))) as file:
        assert file.tensor("fc.weight").tobytes() == expected.tobytes()


@pytest.mark.parametrize("stored", ["F16", "BF16"])
def test_untouched_floats_stored_smaller(stored: str) -> None:
    values = round_to(normal(50), stored)
    raw = RawTensor("F32", (50,), values.tobytes(), stored)
    with PackedFile.from_bytes(pack(Content({}, (), {"norm.weight": raw}))) as file:
        assert file.sizes().untouched == 100
        np.testing.assert_array_equal(from_storage(file.raw("norm.weight").data, "F32"), values)


def test_a_grid_is_rounded_once() -> None:
    """3 (1 + 2**-23) lies in the middle of two float32 numbers: rounded, it would be 3 + 2**-21."""
    values = Grid(-3.0, 1 + 2.0**-23, 4).expand()
    assert values.dtype == np.float32
    assert values.shape == (1, 4, 1)
    assert values.reshape(-1).tolist() == [-3.0, -2 + 2.0**-23, -1 + 2.0**-22, 3 * 2.0**-23]


def test_mirrored_codewords_follow_the_others() -> None:
    table = Table.of([2.0, -0.5], mirrored=True)
    assert table.shape == (1, 4, 1)
    assert table.expand().reshape(-1).tolist() == [-0.5, 2.0, 0.5, -2.0]


@pytest.mark.parametrize(
    ("count", "dtype"),
    [(1, np.uint8), (256, np.uint8), (257, np.uint16), (65_536, np.uint16), (65_537, np.uint32)],
)
def test_indices_take_the_fewest_bytes(count: int, dtype: type[np.unsignedinteger[Any]]) -> None:
    assert index_dtype(count) is dtype


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_small_shapes(shape: tuple[int, ...]) -> None:
    site = SharedTensor(shape, 0, np.zeros(int(np.prod(shape)), np.uint8))
    with PackedFile.from_bytes(pack(Content({"a": site}, (Table.of([1.5, 2.5]),)))) as file:
        assert file.tensor("a").shape == shape
        assert (file.tensor("a") == 1.5).all()


def test_below_one_bit_the_file_is_small() -> None:
    """0.25 bits a weight are 1,250 bytes of 40,000 weights."""
    assert len(pack(far_below_one_bit(), "auto")) < 8_000


@pytest.mark.parametrize("codec", [*GENERAL, "auto"])
@pytest.mark.parametrize(
    "values", [[-3.0, -2.0, -1.0], [1e-38, 1.0, 1e38], [-3e38, -1e-45, 3e38], [5.0], [1.0, 1.0, 1.0], [-0.0, 0.0]]
)
def test_extreme_codewords(values: list[float], codec: str) -> None:
    book = Table.of(values)
    site = SharedTensor((7, 9), 0, indices(63, len(values)))
    with PackedFile.from_bytes(pack(Content({"fc.weight": site}, (book,)), codec)) as file:
        assert file.tensor("fc.weight").tobytes() == decode(site, book).tobytes()
        assert np.isfinite(file.tensor("fc.weight")).all()


def test_weights_too_large_for_their_dtype_become_infinite_without_a_warning() -> None:
    site = SharedTensor((2,), 0, np.array([0, 1], np.uint8), "F16", scale=np.array([1e30], np.float32))
    with PackedFile.from_bytes(pack(Content({"a": site}, (Table.of([-1e30, 1.0]),)))) as file:
        assert file.tensor("a").tolist() == [-np.inf, np.inf]
