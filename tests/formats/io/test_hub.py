"""Packed files on the hub: names, fetching, its limits, and the cache when there is no hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import compressor
from compressor.formats.errors import CompressorError, FormatError, MissingError, ResourceError, UsageError
from compressor.formats.file.reader import PackedFile
from compressor.formats.io.hub import MOST_BYTES, PACKED, fetch, hub_errors, parse_name, pinned_name
from compressor.model_zoo import packed_path
from tests.helpers.hub_server import TOKEN, FakeHub, Repository, hub, unreachable

__all__ = ["hub"]  # the fixture

NAME = "hf-hub:you/small"
FILE = packed_path("zoo:test_resnet-tiny")


@pytest.fixture
def small(hub: FakeHub) -> Repository:
    """A repository with a packed file, of which there are two versions."""
    found = hub.repositories["you/small"] = Repository()
    found.refs["v1"] = found.commit({PACKED: FILE.read_bytes()})
    found.commit({PACKED: packed_path("zoo:test_resnet-balanced").read_bytes()})
    return found


def test_the_model_is_that_of_the_file(hub: FakeHub, small: Repository) -> None:
    model = compressor.load(f"{NAME}@v1")
    wanted = compressor.load_state_dict(FILE)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    latest = compressor.load_state_dict(NAME)
    assert not torch.equal(latest["fc.weight"], wanted["fc.weight"])
    got = {path for method, path in hub.requests if method == "GET" and "resolve" in path}
    assert got <= {f"/you/small/resolve/{name}/{PACKED}" for name in ("v1", "main")}, "nothing else is fetched"


def test_a_file_knows_its_commit(small: Repository) -> None:
    pinned = f"{NAME}@{small.refs['v1']}"
    path = fetch(f"{NAME}@v1")
    assert path.read_bytes() == FILE.read_bytes()
    assert pinned_name(path) == pinned
    with PackedFile.open(f"{NAME}@v1") as file:
        assert file.label == pinned
    for other in (FILE, Path(), path.with_name("other.safetensors"), path.parents[1] / "main" / PACKED):
        assert pinned_name(other) is None


def test_a_commit_in_the_cache_asks_nobody(hub: FakeHub, small: Repository) -> None:
    pinned = f"{NAME}@{small.refs['v1']}"
    path = fetch(pinned)
    hub.requests.clear()
    assert fetch(pinned) == path
    assert not hub.requests


@pytest.mark.parametrize("revision", ["", "@v1"])
@pytest.mark.parametrize("away", ["offline", "unreachable", "broken"])
def test_what_was_fetched_is_there_without_a_hub(
    hub: FakeHub, small: Repository, revision: str, away: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch(NAME + revision)
    if away == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    elif away == "unreachable":
        hub.close()
        unreachable(monkeypatch)
    else:
        hub.broken = 503
    assert fetch(NAME + revision) == path
    with pytest.raises(MissingError, match=r"^hf-hub:you/other is not in the hub's cache .*hub, and .*(set|reached)$"):
        fetch("hf-hub:you/other")


@pytest.mark.parametrize("size", [MOST_BYTES + 1, 10**15])
def test_a_file_that_is_too_large_is_not_fetched(hub: FakeHub, small: Repository, size: int) -> None:
    hub.sizes[PACKED] = size
    with pytest.raises(FormatError, match=rf"packed.safetensors has {size:,} bytes, expected at most 2,147,483,648: "):
        fetch(NAME)
    assert {method for method, _ in hub.requests} == {"HEAD"}


def test_a_file_of_a_stranger_has_the_guards_of_any(small: Repository) -> None:
    damaged = bytearray(FILE.read_bytes())
    damaged[-100] ^= 1
    small.commit({PACKED: bytes(damaged)})
    with pytest.raises(CompressorError, match=f"^{NAME}@{small.refs['main']}: "):
        compressor.load(NAME)
    small.commit({PACKED: b"\x01 no such file"})
    with pytest.raises(FormatError, match=f"^{NAME}@{small.refs['main']}: "):
        compressor.load(NAME)


def nothing(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the hub as it is."""


def no_token(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")


def wrong_token(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}x")


def odd_token(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\x01 {TOKEN}\u00e9")


def out_of_order(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.broken = 418


Change = Callable[[FakeHub, pytest.MonkeyPatch], None]


@pytest.mark.parametrize(
    ("name", "change", "kind", "message"),
    [
        ("hf-hub:you/none", nothing, MissingError, "has no hf-hub:you/none, or it is private and the token may not"),
        ("hf-hub:you/none", no_token, MissingError, "or it is private and no token is set: set HF_TOKEN, or run"),
        ("hf-hub:you/private", no_token, MissingError, "or it is private and no token is set: set HF_TOKEN, or run"),
        (
            "hf-hub:you/gated",
            no_token,
            MissingError,
            r"you/gated is gated: ask for access at http:.*/gated; no",
        ),
        (f"{NAME}@v2", nothing, MissingError, "hf-hub:you/small@v2: the repository has no such branch, tag or commit"),
        ("hf-hub:you/empty", nothing, MissingError, "holds no packed.safetensors, which 'compress push' writes"),
        (NAME, wrong_token, ResourceError, "you/small: the hub refuses what the token asks for: HfHubHTTPError: "),
        (NAME, odd_token, ResourceError, "you/small: "),
        (NAME, out_of_order, ResourceError, "you/small: HfHubHTTPError: .*418"),
        ("hf-hub:you/sm--all", nothing, UsageError, "hf-hub:you/sm--all: HFValidationError: "),
    ],
)
def test_what_goes_wrong_is_said_in_one_line_without_the_token(
    hub: FakeHub,
    small: Repository,
    name: str,
    change: Change,
    kind: type[CompressorError],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for place in ("private", "gated", "empty"):
        hub.repositories[f"you/{place}"] = Repository(private=place == "private", gated=place == "gated")
        hub.repositories[f"you/{place}"].commit({"config.json": b"{}"})
    change(hub, monkeypatch)
    with pytest.raises(kind, match=message) as caught:
        fetch(name)
    assert TOKEN not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__, "the client's own error is not shown, which may quote the token"


@pytest.mark.parametrize("text", [f"Illegal header value b'Bearer {TOKEN}\\x01'", f"a request with {TOKEN} failed"])
def test_an_error_of_the_client_may_quote_the_token(hub: FakeHub, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN if "request" in text else f"{TOKEN}\x01")
    with pytest.raises(ResourceError, match=r"^hf-hub:you/small: ValueError: ") as caught, hub_errors(NAME):
        raise ValueError(text)
    assert "***" in str(caught.value)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["hf-hub:", "hf-hub:small", "hf-hub:a/b/c", "hf-hub:you/small@", "hf-hub:you/s m", "hf-hub:a/b@../c"],
)
def test_names_of_no_repository(name: str) -> None:
    with pytest.raises(UsageError, match="names no repository: expected hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVIS"):
        parse_name(name)
    with pytest.raises(UsageError, match="names no repository"):
        compressor.load(name)


def test_a_path_is_a_file_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hf-hub:you").mkdir()
    Path(NAME).write_bytes(FILE.read_bytes())
    assert compressor.load_state_dict(Path(NAME)).keys() == compressor.load_state_dict(f"./{NAME}").keys()
