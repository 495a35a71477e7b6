"""Pushing a packed file: into a repository of the hub in one commit, or into a folder with the same files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import compressor
from compressor.formats.errors import IntegrityError, ResourceError, UsageError
from compressor.formats.file.reader import PackedFile
from compressor.formats.io.atomic import check_not_input, check_writable, make_folder, write_atomically
from compressor.formats.io.hub import PACKED, PREFIX, hub_errors, is_reachable, local_path, parse_name
from compressor.publishing.files import file_names, repository_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Pushed", "push_to_hub"]


@dataclass(frozen=True)
class Pushed:
    """What was pushed.

    Args:
        name: by which ``compressor.load`` finds the file: ``hf-hub:OWNER/NAME@COMMIT``, or a path in the folder.
        place: the address of the repository's page, or the path of the folder.
        files: the bytes of each file, by its name.
    """

    name: str
    place: str
    files: Mapping[str, int]


def push_to_hub(
    path: str | os.PathLike[str],
    repository: str,
    *,
    folder: str | os.PathLike[str] | None = None,
    private: bool = False,
    base_model: str | None = None,
    force: bool = False,
    max_memory: int | None = None,
) -> Pushed:
    """Puts a packed file on the Hugging Face hub, with a model card, a picture and timm's configuration.

    Everything is checked and made before the repository is; the files come into it in one commit. The token is the one
    that the hub's client finds: ``HF_TOKEN``, or that of ``hf auth login``.

    Args:
        path: the packed file, as for ``compressor.load``.
        repository: ``OWNER/NAME``; made if it is not there.
        folder: the files are written into this folder, and not pushed; None, the default: they are pushed.
        private: whether a new repository is private.
        base_model: the repository of the dense weights, for the card; None, the default: it is not known.
        force: whether files that exist are replaced; in a repository the earlier commits keep them.
        max_memory: as for ``compressor.load``.

    Returns:
        By which name the file is loaded, and the sizes of all files.

    Raises:
        UsageError: a name is no ``OWNER/NAME``, files exist, or a repository that is to be private is public.
        MissingError: matplotlib is not installed, or timm cannot build the model.
        ResourceError: there is no token, or the hub refuses it, cannot be reached or breaks off.
        IntegrityError: the hub holds other bytes than were pushed.
        FileError: the packed file is damaged, hostile or of another kind.

    Example:
        >>> import tempfile
        >>> from compressor.model_zoo import packed_path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     list(push_to_hub(packed_path("zoo:test_resnet-tiny"), "me/small", folder=folder).files)
        ['packed.safetensors', 'config.json', 'bytes.png', 'README.md']
    """
    own, base = _checked("repository", repository), base_model and _checked("base model", base_model)
    if folder is not None and private:
        raise UsageError("a folder is not private: that is for a repository on the hub")
    source = local_path(path)
    with PackedFile.open(source, max_memory) as file:
        target = _Repository(own, private) if folder is None else _Folder(Path(folder), source)
        target.check(file_names(file), force)
        return target.write(repository_files(file, own, base), force)


def _checked(what: str, name: str) -> str:
    """Returns ``OWNER/NAME``, with or without ``hf-hub:`` before it; a revision is not for what is pushed."""
    try:
        repository, revision = parse_name(name)
    except UsageError:
        raise UsageError(f"{name!r} is no name of a {what}: expected OWNER/NAME") from None
    if "@" in name:
        raise UsageError(f"{name}: leave out @{revision}, the repository is meant as a whole")
    return repository


class _Folder:
    """A folder on disk."""

    def __init__(self, path: Path, source: Path) -> None:
        self._path, self._source = path, source

    def check(self, names: Sequence[str], force: bool) -> None:
        """Checks, before the work, that the files can be written."""
        for name in names if self._path.exists() else ():
            check_not_input(self._path / name, self._source)
            check_writable(self._path / name, force)

    def write(self, files: Mapping[str, bytes], force: bool) -> Pushed:
        """Writes the files, the card last."""
        make_folder(self._path)
        for name, data in files.items():
            write_atomically(self._path / name, data, force=force)
        return Pushed(str(self._path / PACKED), str(self._path), _sizes(files))


class _Repository:
    """A repository of models on the hub."""

    def __init__(self, name: str, private: bool) -> None:
        self._name, self._private = name, private
        self._head: str | None = None  # the commit that the push is to follow

    def check(self, names: Sequence[str], force: bool) -> None:
        """Checks, before the work, that there is a hub and a token, and what is in the repository."""
        from huggingface_hub import constants, get_token
        from huggingface_hub.errors import RepositoryNotFoundError

        label = PREFIX + self._name
        if constants.HF_HUB_OFFLINE or not is_reachable():
            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
            raise ResourceError(f"{label}: {why}: nothing is pushed; write the files to a folder with --folder")
        if not get_token():
            raise ResourceError(f"{label}: no token is set: set HF_TOKEN, or run 'hf auth login'")
        with hub_errors(label):
            try:
                info = self._api().model_info(self._name)
            except RepositoryNotFoundError:
                return
        if self._private and not info.private:
            raise UsageError(f"{label} is there, and public: leave out --private, or name a new repository")
        there = sorted({one.rfilename for one in info.siblings or ()} & {*names})
        if there and not force:
            raise UsageError(f"{label} has {', '.join(there)}: name another, or --force (force=True) to replace them")
        self._head = info.sha

    def write(self, files: Mapping[str, bytes], force: bool) -> Pushed:
        """Makes the repository where it is not there, commits the files, and compares what the hub says of them."""
        from huggingface_hub import CommitOperationAdd

        del force  # checked already
        api = self._api()
        with hub_errors(PREFIX + self._name):
            if self._head is None:
                api.create_repo(self._name, private=self._private, exist_ok=True)
            done = api.create_commit(
                self._name,
                [CommitOperationAdd(name, data) for name, data in files.items()],
                commit_message=f"Push a packed file of timm-compressor {compressor.__version__}",
                parent_commit=self._head,
            )
            self._compare(api, done.oid, files[PACKED])
        return Pushed(f"{PREFIX}{self._name}@{done.oid}", f"{api.endpoint}/{self._name}", _sizes(files))

    def _compare(self, api: HfApi, commit: str, data: bytes) -> None:
        """Raises IntegrityError where the hub has another packed file, by its size and its SHA-256."""
        from huggingface_hub.hf_api import RepoFile

        (found,) = api.get_paths_info(self._name, [PACKED], revision=commit)
        own = hashlib.sha256(data).hexdigest()
        if not isinstance(found, RepoFile) or found.size != len(data) or (found.lfs and found.lfs.sha256 != own):
            raise IntegrityError(f"{PREFIX}{self._name}@{commit}: the hub holds another {PACKED}: push it again")

    def _api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(library_name="timm-compressor", library_version=compressor.__version__)


def _sizes(files: Mapping[str, bytes]) -> dict[str, int]:
    return {name: len(data) for name, data in files.items()}
