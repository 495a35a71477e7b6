"""Packed files on the Hugging Face hub: by which name, how they are fetched, and what is said where that fails.

The hub's client is imported where it is used, so that commands which need no hub start at once.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from compressor.formats.errors import CompressorError, FormatError, MissingError, ResourceError, UsageError, printable

__all__ = [
    "MOST_BYTES",
    "PACKED",
    "PREFIX",
    "fetch",
    "hub_errors",
    "is_reachable",
    "local_path",
    "parse_name",
    "pinned_name",
]

PREFIX = "hf-hub:"
PACKED = "packed.safetensors"
"""The name of the packed file in its repository; not the one under which timm looks for dense weights."""
MOST_BYTES = 2 << 30
"""The largest packed file that is downloaded."""

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)[\w./-]+", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CACHED = re.compile(rf"models--([\w.-]+?)--([\w.-]+)/snapshots/({_COMMIT.pattern})/{re.escape(PACKED)}", re.ASCII)
_TIMEOUT = 5  # seconds
_MAX_REASON = 200  # characters of a message that is another's
_REFUSED = 401, 403  # status of answers to a token that is wrong, or may not do this
_BROKEN = 500  # status of answers of a hub that is there and does not work, and above


def fetch(name: str) -> Path:
    """Returns the packed file of a repository, from the hub's cache where it is there, else downloaded into it.

    Nothing else of the repository is read. Where the hub cannot be reached, the cache alone is asked.

    Args:
        name: ``hf-hub:OWNER/NAME``, or ``hf-hub:OWNER/NAME@REVISION`` for a branch, tag or commit.

    Returns:
        A path in the hub's cache, of which ``pinned_name`` tells the commit.

    Raises:
        UsageError: the name is not of that form.
        MissingError: there is no such repository, revision or file, or no right to read it, or it is not in the cache
            and the hub cannot be reached.
        FormatError: the file is larger than ``MOST_BYTES``; nothing has been downloaded then.
        ResourceError: the hub refuses the token, or breaks off.
    """
    repository, revision = parse_name(name)
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    with hub_errors(name):
        if _COMMIT.fullmatch(revision):  # which never changes
            found = try_to_load_from_cache(repository, PACKED, revision=revision)
            if isinstance(found, str):
                return Path(found)
        in_cache_only = constants.HF_HUB_OFFLINE or not is_reachable() or not _check_size(name, repository, revision)
        try:
            return Path(hf_hub_download(repository, PACKED, revision=revision, local_files_only=in_cache_only))
        except LocalEntryNotFoundError:
            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
            raise MissingError(f"{name} is not in the hub's cache {constants.HF_HUB_CACHE}, and {why}") from None


def local_path(path: str | os.PathLike[str]) -> Path:
    """Returns the path of a file, which is fetched where a text names one on the hub; raises errors as ``fetch``."""
    return fetch(path) if isinstance(path, str) and path.startswith(PREFIX) else Path(path)


def parse_name(name: str) -> tuple[str, str]:
    """Returns repository and revision of a name, ``main`` where it has none.

    Raises:
        UsageError: it is not ``hf-hub:OWNER/NAME`` or ``hf-hub:OWNER/NAME@REVISION``.

    Example:
        >>> parse_name("hf-hub:me/resnet18-small@v1"), parse_name("hf-hub:me/resnet18-small")
        (('me/resnet18-small', 'v1'), ('me/resnet18-small', 'main'))
    """
    repository, at, revision = name.removeprefix(PREFIX).partition("@")
    if not _REPOSITORY.fullmatch(repository) or (at and not _REVISION.fullmatch(revision)):
        raise UsageError(f"{name!r} names no repository: expected {PREFIX}OWNER/NAME or {PREFIX}OWNER/NAME@REVISION")
    return repository, revision or "main"


def pinned_name(path: str | os.PathLike[str]) -> str | None:
    """Returns ``hf-hub:OWNER/NAME@COMMIT`` of a packed file in the hub's cache; None for any other file.

    Example:
        >>> pinned_name("cache/models--me--small/snapshots/" + 40 * "0" + "/packed.safetensors")
        'hf-hub:me/small@0000000000000000000000000000000000000000'
    """
    match = _CACHED.fullmatch("/".join(Path(path).parts[-4:]))
    return f"{PREFIX}{match[1]}/{match[2]}@{match[3]}" if match else None


def is_reachable() -> bool:
    """Whether anything answers at the hub's address, in one try; through a proxy, where the environment names one."""
    from huggingface_hub import constants

    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_TIMEOUT):
            return True
    except HTTPError:
        return True
    except URLError as exc:
        return isinstance(exc.reason, ssl.SSLError)  # the client may know other certificates
    except (OSError, HTTPException):  # nothing answers, or something that does not speak HTTP
        return False


def _check_size(name: str, repository: str, revision: str) -> bool:
    """Returns whether the hub works; raises FormatError where the file is too large to be downloaded."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        size = get_hf_file_metadata(hf_hub_url(repository, PACKED, revision=revision)).size
    except HfHubHTTPError as exc:
        if exc.response.status_code < _BROKEN:
            raise
        return False
    if size is None or size > MOST_BYTES:
        has = "unknown size" if size is None else f"{size:,} bytes"
        raise FormatError(
            f"{name}: {PACKED} has {has}, expected at most {MOST_BYTES:,}: if you trust it, get it by "
            f"'hf download {repository} {PACKED}', and name the file"
        )
    return True


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Raises an error of one line, without a token, in place of whatever the hub's client raises.

    The client's own error is not chained to it: it may quote a request, with its token.

    Args:
        name: of the repository, for messages.
    """
    from huggingface_hub import constants, errors, get_token

    allowed = "the token may not read it" if get_token() else "no token is set: set HF_TOKEN, or run 'hf auth login'"
    try:
        yield
    except (CompressorError, MemoryError):
        raise
    except errors.HFValidationError as exc:
        raise UsageError(f"{name}: {_reason(exc)}") from None
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{parse_name(name)[0]}"
        raise MissingError(f"{name} is gated: ask for access at {page}; {allowed}") from None
    except errors.RepositoryNotFoundError:
        raise MissingError(f"{constants.ENDPOINT} has no {name}, or it is private and {allowed}") from None
    except errors.RevisionNotFoundError:
        raise MissingError(f"{name}: the repository has no such branch, tag or commit") from None
    except errors.EntryNotFoundError:
        raise MissingError(f"{name} holds no {PACKED}, which 'compress push' writes") from None
    except Exception as exc:
        cause = exc.__cause__ or exc if isinstance(exc, RuntimeError) else exc  # of a thread that uploads
        status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
        what = "the hub refuses what the token asks for: " if status in _REFUSED else ""
        raise ResourceError(f"{name}: {what}{_reason(cause)}") from None


def _reason(exc: BaseException) -> str:
    """Returns the message of another's error in one line, without the token."""
    from huggingface_hub import get_token

    text = re.sub(r"Bearer \S+", "Bearer ***", " ".join(f"{type(exc).__name__}: {exc}".split()))
    if token := get_token():
        text = text.replace(token, "***")
    return printable(text)[:_MAX_REASON]
