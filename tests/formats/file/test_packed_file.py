"""The file as a whole: a valid safetensors file, sizes that sum, one content one hash."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from compressor.formats.content import Content, Grid, RawTensor, SharedTensor, Table
from compressor.formats.errors import FormatError, IntegrityError, ResourceError, UsageError
from compressor.formats.file.container import BLOBS, KEY, canonical_json
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.source import FileSource
from compressor.formats.file.writer import pack, write
from tests.formats.test_content import RECORDS, network_wide_book, normal
from tests.helpers.forging import as_version_1, head, small, split


@pytest.mark.parametrize("record", RECORDS)
def test_safetensors_reads_it(tmp_path: Path, record: str) -> None:
    path = tmp_path / "a.safetensors"
    size = write(path, RECORDS[record]())
    assert path.stat().st_size == size
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == {"packed-v2"}
        assert file.metadata() == {KEY: "2"}
        data = path.read_bytes()
        assert file.get_tensor("packed-v2").tobytes() == data[head(data)[1] :]


def test_safetensors_reads_files_of_version_1(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(small(version=1))
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == set(BLOBS)
        assert list(file.metadata()) == [KEY]
        _, blobs = split(path.read_bytes())
        assert all(file.get_tensor(blob).tobytes() == blobs[blob] for blob in BLOBS)


@pytest.mark.parametrize("record", RECORDS)
def test_sizes_sum_to_the_file(record: str) -> None:
    data = pack(RECORDS[record]())
    with PackedFile.from_bytes(data) as file:
        sizes = file.sizes()
        assert sizes.file == len(data)
        assert sizes.file == sizes.indices + sizes.codebooks + sizes.untouched + sizes.checksums + sizes.header
        assert sizes.indices == sum(site.size for site in file.sites.values())


def test_site_overhead_is_what_a_site_more_costs() -> None:
    content = network_wide_book()
    fewer = replace(content, sites={name: site for name, site in content.sites.items() if name != "layer2.weight"})
    one, other = as_version_1(pack(content, "bits")), as_version_1(pack(fewer, "bits"))
    with PackedFile.from_bytes(one) as file:
        overhead = file.site_overhead("layer2.weight")
        more = len(one) - len(other) - file.sites["layer2.weight"].size
    assert abs(more - overhead) <= 8  # padding of the header, digits of offsets
    assert overhead <= 120


@pytest.mark.parametrize("record", RECORDS)
def test_site_overheads_are_shares_of_the_header(record: str) -> None:
    with PackedFile.from_bytes(pack(RECORDS[record]())) as file:
        shares = {name: file.site_overhead(name) for name in file.sites}
        texts = {site[0]: len(canonical_json(site)) for site in file.metadata["sites"]}
        assert 0 < sum(shares.values()) < file.sizes().header
        assert sorted(shares, key=lambda name: texts[name]) == sorted(
            shares, key=lambda name: (shares[name], texts[name])
        )


def test_header_of_a_site_is_at_most_120_bytes() -> None:
    """The longest usual record: long name, four-dimensional shape, millions of bytes."""
    site = SharedTensor((2048, 1024, 3, 3), 0, np.zeros(2048 * 1024 * 9, np.uint8))
    content = Content({"stages.3.blocks.11.conv_pw.weight": site}, (Table.of([0.0, 1.0]),))
    with PackedFile.from_bytes(pack(content, "bits")) as file:
        assert file.site_overhead("stages.3.blocks.11.conv_pw.weight") <= 120


def test_content_hash_leaves_out_provenance_only() -> None:
    content = network_wide_book()

    def digest(changed: Content) -> str:
        with PackedFile.from_bytes(pack(changed)) as file:
            return file.content_sha256()

    assert digest(content) == digest(replace(content, provenance={"accuracy": 0.9}))
    assert digest(content) != digest(replace(content, recipe={"stage": [{"bits": 4}]}))
    assert digest(content) != digest(replace(content, books=(Table.of(normal(20, seed=1)),)))


@pytest.mark.slow
def test_same_bytes_in_any_process() -> None:
    code = (
        "import hashlib\nfrom tests.formats.test_content import RECORDS\n"
        "from compressor.formats.file.writer import pack\n"
        "print(hashlib.sha256(b''.join(pack(make()) for make in RECORDS.values())).hexdigest())"
    )
    digests = set()
    for seed, threads in (("0", "1"), ("1", "2"), ("random", "2")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
        root = Path(__file__).resolve().parents[3]
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=root
        )
        digests.add(done.stdout)
    assert len(digests) == 1


def test_what_is_given_is_said() -> None:
    content = replace(
        network_wide_book(), model={"name": "test_resnet", "args": {"num_classes": 3}}, preprocessing={"mean": [0.5]},
        recipe={"stage": [{"bits": 4}]}, provenance={"top1": {"packed": 0.98}},
    )  # fmt: skip
    with PackedFile.from_bytes(pack(content)) as file:
        assert file.model == content.model
        assert file.preprocessing == content.preprocessing
        assert file.recipe == content.recipe
        assert file.provenance == content.provenance
        assert file.metadata["version"] == 2


def test_untouched_tensors_that_are_stored_otherwise_have_entries_of_their_own() -> None:
    data = np.array([0.5, -2.0], np.float32).tobytes()
    stored = {"a": "F16", "b": "", "c": "BF16", "d": "F16", "e": "F32"}
    untouched = {name: RawTensor("F32", (2,), data, dtype) for name, dtype in stored.items()}
    with PackedFile.from_bytes(pack(Content({}, (), untouched))) as file:
        assert file.metadata["untouched"] == [
            ["F32", [2], "a d", "F16"],
            ["F32", [2], "b e"],
            ["F32", [2], "c", "BF16"],
        ]
        assert {name: file.raw(name).data for name in file.raw_names} == dict.fromkeys("adbec", data)


def test_tensors_of_one_value_take_no_bytes() -> None:
    """Where the value takes more characters than the tensor has bytes, it is stored."""
    ones, tenths = np.ones(8, np.float32), np.full(4, 0.1, np.float32)
    nan, negative = np.full(8, np.nan, np.float32), np.full(8, -0.0, np.float32)
    arrays = {"ones": ones, "tenths": tenths, "nan": nan, "negative": negative, "more": np.ones(8, np.float32)}
    untouched = {name: RawTensor("F32", array.shape, array.tobytes()) for name, array in arrays.items()}
    untouched["count"] = RawTensor("I64", (), np.array(7).tobytes())
    untouched["empty"] = RawTensor("I64", (0,), b"")
    with PackedFile.from_bytes(pack(Content({}, (), untouched))) as file:
        assert file.metadata["untouched"] == [
            ["F32", [8], "ones more", 1.0],
            ["F32", [4], "tenths"],
            ["F32", [8], "nan"],
            ["F32", [8], "negative", -0.0],
            ["I64", [], "count", 7],
            ["I64", [0], "empty"],
        ]
        assert file.sizes().untouched == 16 + 32
        assert {name: file.raw(name).data for name in file.raw_names} == {n: raw.data for n, raw in untouched.items()}


def test_constants_are_read_alike_whatever_their_stored_dtype() -> None:
    ones = np.ones(8, np.float32).tobytes()
    whole = Content({}, (), {"a": RawTensor("F32", (8,), ones, "F16"), "b": RawTensor("F32", (8,), ones)})
    with PackedFile.from_bytes(pack(whole)) as file:
        assert file.metadata["untouched"] == [["F32", [8], "a b", 1.0]]


def test_a_slice_of_a_stack_is_a_tensor_of_its_own() -> None:
    content = RECORDS["stacks_and_constants"]()
    with PackedFile.from_bytes(pack(content)) as file:
        whole = file.tensor("bn1.weight bn2.weight bn3.weight")
        assert file.tensor("bn2.weight").tolist() == whole[1].tolist()
        assert file.slices["bn1.bias"] == ("bn1.bias bn2.bias", 0)
        assert file.decoded_size == 288 * 4 + 24 * 4 + 16 * 4 + 3 * 32 + 8 + 9 + 10 + 12
    tied = replace(content, aliases={"tied": "bn3.weight"})
    with PackedFile.from_bytes(pack(tied)) as file:
        assert file.decoded_size == 288 * 4 + 24 * 4 + 16 * 4 + 3 * 32 + 8 + 9 + 10 + 12 + 32


def test_parts_of_one_section_are_read_once(tmp_path: Path) -> None:
    write(tmp_path / "a", network_wide_book())
    with PackedFile.open(tmp_path / "a") as file:
        assert isinstance(file.source, FileSource)
        before, sizes = file.source.bytes_read, file.sizes()
        assert file.check() == []
        assert file.source.bytes_read - before == sizes.indices + sizes.codebooks + sizes.untouched < 1 << 16


def test_existing_file_is_kept_without_force(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, network_wide_book())
    before = path.read_bytes()
    with pytest.raises(UsageError, match="exists"):
        write(path, RECORDS["tied_tensors"]())
    assert path.read_bytes() == before
    write(path, RECORDS["tied_tensors"](), force=True)
    assert path.read_bytes() != before


def test_missing_folder_is_told_before_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.formats.file.writer.pack", lambda *args: pytest.fail("packed first"))
    with pytest.raises(ResourceError, match="does not exist"):
        write(tmp_path / "absent" / "a", network_wide_book())


@pytest.mark.parametrize("record", RECORDS)
def test_what_the_disk_changes_is_not_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: str
) -> None:
    """The file on disk holds other content, well formed: only comparing can tell."""
    content = RECORDS[record]()
    name = next(iter(content.sites))
    site = content.sites[name]
    spoilt = replace(content, provenance={"other": 1}) if site.codec else replace(
        content, sites={**content.sites, name: replace(site, indices=site.indices[::-1].copy())}
    )  # fmt: skip
    data = pack(spoilt)
    monkeypatch.setattr("compressor.formats.file.writer.pack", lambda *args: data)
    with pytest.raises(IntegrityError, match="read back differently"):
        write(tmp_path / "a", content)
    assert not list(tmp_path.iterdir())


def test_file_replaced_while_open_is_read_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, network_wide_book())
    with PackedFile.open(path) as file:
        write(path, RECORDS["tied_tensors"](), force=True)
        assert file.check() == []
        assert list(file.sites) == list(network_wide_book().sites)


def test_file_cut_while_open_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, network_wide_book())
    with PackedFile.open(path) as file:
        os.truncate(path, 100)
        with pytest.raises(FormatError, match="became shorter"):
            file.tensor("layer0.weight")


@pytest.mark.parametrize("name", ["ünï cødé", "a b", "-x", "CON", "x" * 200, "日本語"])
def test_any_path(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, network_wide_book())
    with PackedFile.open(tmp_path / name) as file:
        assert file.check() == []


def test_names_of_tensors_may_be_unicode() -> None:
    site = SharedTensor((2,), 0, np.array([0, 1], np.uint8))
    with PackedFile.from_bytes(pack(Content({"層.重み": site}, (Table.of([0.5, 1.0]),)))) as file:
        assert file.tensor("層.重み").tolist() == [0.5, 1.0]


def test_random_files(tmp_path: Path) -> None:
    """Random content of every feature at once, through the verified writer."""
    for seed in range(40):
        write(tmp_path / str(seed), random_content(seed))


def random_content(seed: int) -> Content:
    chance = random.Random(seed)
    sites: dict[str, SharedTensor] = {}
    books: list[Table | Grid] = []
    for number in range(chance.randint(0, 4)):
        shape = tuple(chance.randint(1, 9) for _ in range(chance.randint(1, 4)))
        options: dict[str, Any] = {"dtype": chance.choice(["F32", "F16", "BF16"])}
        if chance.random() < 0.5:
            options[chance.choice(["axis", "block"])] = chance.randrange(len(shape))
            if options.get("block") == 0:
                options["block"] = 7
        groups = SharedTensor(shape, 0, np.empty(0, np.uint8), **options).groups
        if chance.random() < 0.5:
            options["scale"] = normal(groups, seed=seed)
        codewords = chance.randint(1, 40)
        if chance.random() < 0.3:
            books.append(Grid(chance.uniform(-1, 1), 0.125, codewords))
        else:
            values = np.sort(normal(chance.choice([1, groups]), codewords, 1, seed=seed), axis=1)
            books.append(Table(values))
        drawn = np.random.default_rng(seed).integers(0, codewords, int(np.prod(shape))).astype(np.uint8)
        sites[f"layer{number}.weight"] = SharedTensor(shape, number, drawn, **options)
    untouched = {f"norm{n}.bias": RawTensor("I32", (n,), bytes(4 * n)) for n in range(chance.randint(0, 3))}
    return Content(sites, tuple(books), untouched)


def test_safetensors_metadata_order_is_still_random() -> None:
    """Fails when safetensors writes metadata in order: our own header writer is then a choice, not a need."""
    notes = dict.fromkeys("abcdefgh", "1")
    assert len({safetensors.torch.save({"a": torch.zeros(1)}, notes) for _ in range(20)}) > 1


def test_safetensors_still_makes_private_files(tmp_path: Path) -> None:
    """Fails when safetensors heeds the umask."""
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "a")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_decoding_takes_little_more_memory_than_the_tensors(tmp_path: Path) -> None:
    """At most 1.25 times the dense bytes and 64 MB, measured by the kernel in a process of its own."""
    sites = {
        f"layer{n}.weight": SharedTensor(
            (1024, 1024), n, np.random.default_rng(n).integers(0, 16, 1 << 20).astype(np.uint8)
        )
        for n in range(24)
    }
    write(tmp_path / "a", Content(sites, tuple(Table.of(normal(16, seed=n)) for n in range(24))), "bits")
    code = (
        "import resource, sys\nfrom compressor.formats.loader import load_state_dict\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nstate = load_state_dict(sys.argv[1])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a"], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= (1.25 * 24 * 4 + 64) * 1024
