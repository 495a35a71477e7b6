"""Pushing: what is in the repository, what is refused, and that nothing is there after a failure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import compressor
from compressor.formats.errors import CompressorError, FileError, IntegrityError, ResourceError, UsageError
from compressor.formats.io.hub import PACKED, pinned_name
from compressor.model_zoo import packed_path
from compressor.models.names import find_model
from compressor.publishing.files import repository_files
from compressor.publishing.push import push_to_hub
from tests.helpers.hub_server import TOKEN, FakeHub, Repository, hub, unreachable

__all__ = ["hub"]  # the fixture

pytest.importorskip("matplotlib", reason="needs the extra hub")
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # by the hub's client itself

FILE = packed_path("zoo:test_resnet-tiny")
NAMES = ["packed.safetensors", "config.json", "bytes.png", "README.md"]


def test_what_is_pushed_is_loaded(hub: FakeHub, tmp_path: Path) -> None:
    done = push_to_hub(FILE, "me/small")
    made = hub.repositories["me/small"]
    assert done.name == f"hf-hub:me/small@{made.refs['main']}"
    assert done.place == f"{hub.endpoint}/me/small"
    files = made.commits[made.refs["main"]]
    assert files.keys() == {*NAMES, ".gitattributes"}, "no model.safetensors, which timm would take for dense weights"
    assert files[PACKED] == FILE.read_bytes()
    assert {name: len(files[name]) for name in NAMES} == done.files
    assert len(made.commits) == 2, "all files come in one commit, after that of a new repository"
    assert not made.private
    state, wanted = compressor.load_state_dict("hf-hub:me/small"), compressor.load_state_dict(FILE)
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
    found = find_model("hf-hub:me/small")
    assert (found.architecture, dict(found.args)) == ("test_resnet", {"in_chans": 1, "num_classes": 10})
    push_to_hub(FILE, "hf-hub:me/small", folder=tmp_path / "folder")
    assert {path.name: path.read_bytes() for path in (tmp_path / "folder").iterdir()} == {
        name: files[name] for name in NAMES
    }


def test_what_is_there_is_replaced_by_force_alone(hub: FakeHub) -> None:
    first = push_to_hub(FILE, "me/small")
    with pytest.raises(UsageError, match=r"^hf-hub:me/small has README.md, bytes.png, config.json, packed.safe.*force"):
        push_to_hub(packed_path("zoo:test_vit-tiny"), "me/small")
    second = push_to_hub(packed_path("zoo:test_vit-tiny"), "me/small", force=True)
    assert first.name != second.name
    assert "fc.weight" in compressor.load_state_dict(first.name)
    assert "head.weight" in compressor.load_state_dict(second.name)
    with pytest.raises(UsageError, match=r"^hf-hub:me/small is there, and public: leave out --private, or name a new"):
        push_to_hub(FILE, "me/small", private=True, force=True)


def test_a_private_repository(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    push_to_hub(FILE, "me/secret", private=True)
    assert hub.repositories["me/secret"].private
    assert "fc.weight" in compressor.load_state_dict("hf-hub:me/secret")
    push_to_hub(FILE, "me/secret", private=True, force=True)


def no_token(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")


def wrong_token(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}x")


def offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def away(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable(monkeypatch)


def out_of_order(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.broken = 418


def nothing(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the hub as it is."""


Change = Callable[[FakeHub, pytest.MonkeyPatch], None]


@pytest.mark.parametrize(
    ("name", "change", "kind", "message"),
    [
        ("me/small", no_token, ResourceError, "^hf-hub:me/small: no token is set: set HF_TOKEN, or run 'hf auth"),
        ("me/small", wrong_token, ResourceError, "^hf-hub:me/small: the hub refuses what the token asks for: .*401"),
        ("you/small", nothing, ResourceError, "^hf-hub:you/small: the hub refuses .*You have no right to write here"),
        ("me/small", offline, ResourceError, "^hf-hub:me/small: HF_HUB_OFFLINE is set: nothing is pushed; .*folder$"),
        ("me/small", away, ResourceError, "^hf-hub:me/small: http://127.0.0.1:9 cannot be reached: nothing is pushed"),
        ("me/small", out_of_order, ResourceError, "^hf-hub:me/small: HfHubHTTPError: .*418"),
        ("small", nothing, UsageError, "^'small' is no name of a repository: expected OWNER/NAME$"),
        ("me/small@v1", nothing, UsageError, "^me/small@v1: leave out @v1, the repository is meant as a whole$"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line_without_the_token(
    hub: FakeHub, name: str, change: Change, kind: type[CompressorError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(hub, monkeypatch)
    with pytest.raises(kind, match=message) as caught:
        push_to_hub(FILE, name)
    assert TOKEN not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert not hub.repositories, "nothing is half made"


def test_bytes_that_change_on_their_way_are_noticed(hub: FakeHub) -> None:
    hub.corrupt = True
    with pytest.raises(IntegrityError, match=r"^hf-hub:me/small@[0-9a-f]{40}: the hub holds another packed.sa"):
        push_to_hub(FILE, "me/small")


def test_a_commit_of_another_in_between_is_not_overwritten(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["me/small"] = made = Repository()
    made.commit({".gitattributes": b""})

    def slowly(*words: Any) -> Any:
        files = repository_files(*words)
        made.commit({PACKED: b"of another"})
        return files

    monkeypatch.setattr("compressor.publishing.push.repository_files", slowly)
    with pytest.raises(ResourceError, match=r"^hf-hub:me/small: HfHubHTTPError: .*412"):
        push_to_hub(FILE, "me/small")
    assert made.commits[made.refs["main"]][PACKED] == b"of another"


def test_a_damaged_file_is_not_pushed(hub: FakeHub, tmp_path: Path) -> None:
    damaged = bytearray(FILE.read_bytes())
    damaged[-100] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    for folder in (None, tmp_path / "folder"):
        with pytest.raises(FileError, match="damaged: "):
            push_to_hub(tmp_path / "damaged", "me/small", folder=folder)
    assert not hub.repositories
    assert not (tmp_path / "folder").exists()


def test_a_file_of_another_repository_is_pushed_on(hub: FakeHub) -> None:
    hub.repositories["you/small"] = Repository()
    hub.repositories["you/small"].commit({PACKED: FILE.read_bytes()})
    done = push_to_hub("hf-hub:you/small", "me/small")
    assert pinned_name(done.name) is None
    assert hub.repositories["me/small"].commits[done.name[-40:]][PACKED] == FILE.read_bytes()


def test_a_folder_is_written_without_hub_or_token(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    done = push_to_hub(FILE, "me/small", folder=folder)
    assert [*done.files] == NAMES
    assert (done.name, done.place) == (str(folder / PACKED), str(folder))
    assert "fc.weight" in compressor.load_state_dict(done.name)
    with pytest.raises(UsageError, match=r"packed.safetensors exists: give another name, or --force"):
        push_to_hub(FILE, "me/small", folder=folder)
    push_to_hub(FILE, "me/small", folder=folder, force=True)
    with pytest.raises(UsageError, match=r"packed.safetensors is the file that is read, and is never replaced"):
        push_to_hub(folder / PACKED, "me/small", folder=folder, force=True)
    with pytest.raises(ResourceError, match=r"none does not exist: make it first"):
        push_to_hub(FILE, "me/small", folder=tmp_path / "none" / "small")
    with pytest.raises(UsageError, match="a folder is not private"):
        push_to_hub(FILE, "me/small", folder=folder, private=True)
