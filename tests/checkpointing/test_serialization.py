"""State files: what goes in comes out, bit for bit; what is damaged is found."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn

from compressor.checkpointing.serialization import DTYPES, checksum, read_state, write_state
from compressor.formats.errors import IntegrityError, ResourceError, UsageError


def same(one: Any, other: Any) -> bool:
    """Compare types, values and bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
        return alike and torch.equal(*bits)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) or (one != one and other != other)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
tensors = st.builds(
    lambda shape, dtype: (torch.arange(math.prod(shape)) * 3).reshape(shape).to(dtype),
    st.lists(st.integers(0, 4), max_size=3), st.sampled_from(sorted(DTYPES, key=str)),
)  # fmt: skip
states = st.dictionaries(
    st.text(max_size=4),
    st.recursive(
        plain | tensors,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.lists(inner, max_size=4).map(tuple)
            | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=4)
        ),
        max_leaves=12,
    ),
    max_size=4,
)


@given(states)
def test_any_nesting_comes_back(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "state"
    assert write_state(path, state) == path.stat().st_size
    assert same(read_state(path), state)


def test_what_shares_memory_or_is_laid_out_otherwise(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    state = {"whole": base, "tied": base, "part": base[1], "turned": base.permute(2, 0, 1), "a.b": base, "a": {"b": 1}}
    state["a"] = {"b": base + 1}  # the same name, once the keys are joined
    write_state(tmp_path / "a", state)
    assert same(read_state(tmp_path / "a"), state)
    parameter = nn.Parameter(base[0])
    write_state(tmp_path / "a", {"p": parameter, "n": np.float32(0.5), "i": np.int64(3), "v": np.arange(3)})
    assert same(read_state(tmp_path / "a"), {"p": base[0], "n": 0.5, "i": 3, "v": torch.arange(3)})


def test_the_library_reads_it(tmp_path: Path) -> None:
    """All dtypes, each where its size asks it to be."""
    state = {str(dtype): torch.ones(3, dtype=dtype) for dtype in DTYPES}
    write_state(tmp_path / "a", state)
    assert same(dict(sorted(load_file(tmp_path / "a").items())), {f".{k}": v for k, v in sorted(state.items())})


def test_a_bit_flipped_in_any_byte_and_every_prefix(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_state(path, {"steps": 3, "weights": torch.arange(4.0), "flags": torch.tensor([True])})
    good = path.read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << place * 5 % 8
        path.write_bytes(bad)
        try:
            found = read_state(path)
        except IntegrityError:
            continue
        assert same(found, {"steps": 3, "weights": torch.arange(4.0), "flags": torch.tensor([True])})  # a space
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(IntegrityError, match="is damaged, or holds no state of a training"):
            read_state(path)


def test_checksum_is_the_crc32_of_names_and_values() -> None:
    """CRC-32's check value is 0xCBF43926, of the text 123456789."""
    tensors = {"4": torch.tensor(list(b"56789"), dtype=torch.uint8), "1": torch.tensor(list(b"23"), dtype=torch.uint8)}
    assert checksum(tensors) == 0xCBF43926
    assert checksum({"4": tensors["4"]}, checksum({"1": tensors["1"]})) == 0xCBF43926
    assert checksum({"1": tensors["4"], "4": tensors["1"]}) != 0xCBF43926


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="none is damaged"):
        read_state(tmp_path / "none")
    save_file({"weight": torch.ones(2)}, tmp_path / "weights")
    with pytest.raises(IntegrityError, match="no 'timm-compressor-state'"):
        read_state(tmp_path / "weights")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.tensor([0.0, 1.0, 1.0]).to(dtype)
    write_state(tmp_path / "a", {"weight": weight})
    found = read_state(tmp_path / "a")["weight"]
    assert (found.dtype, found.view(torch.uint8).tolist()) == (dtype, weight.view(torch.uint8).tolist())


def test_what_cannot_be_kept_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"state 'optimizer.groups.0.hook' is a function"):
        write_state(tmp_path / "a", {"optimizer": {"groups": [{"hook": test_other_files_are_refused}]}})
    with pytest.raises(UsageError, match=r"state 'weight' is a Tensor"):
        write_state(tmp_path / "a", {"weight": torch.ones(2, dtype=torch.complex128)})
    with pytest.raises(ResourceError, match="does not exist"):
        write_state(tmp_path / "none" / "a", {})
    assert not list(tmp_path.iterdir())


# bnb, fused and kron ask for other packages, and adahessian for a backward pass of its own, which our loop has not
@pytest.mark.parametrize("name", list_optimizers(exclude_filters=["*bnb*", "fused*", "kron*", "adahessian"]))
def test_optimisers_of_timm_go_on_as_if_nothing_had_been(tmp_path: Path, name: str) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
        return model, create_optimizer_v2(model, opt=name, lr=1e-3, weight_decay=0.01)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            x = torch.randn(3, 6, generator=torch.Generator().manual_seed(number))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    model, optimizer = make()
    steps(model, optimizer, range(4))
    write_state(tmp_path / "a", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    steps(model, optimizer, range(4, 8))
    other, again = make()
    state = read_state(tmp_path / "a")
    other.load_state_dict(state["model"])
    again.load_state_dict(state["optimizer"])
    steps(other, again, range(4, 8))
    assert same(dict(model.state_dict()), dict(other.state_dict()))
