"""The Hugging Face hub, where timm's weights are: what happens where it cannot be reached."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from compressor.formats.errors import MissingError

__all__ = ["hub_or_cache"]

PATIENCE = 5  # seconds
# What the client is told is one for all threads: they take turns, or one stays offline for ever.
_ONE = threading.RLock()


@contextmanager
def hub_or_cache(model: str) -> Iterator[None]:
    """Let the hub's client use its cache alone where the hub cannot be reached.

    Of itself it asks six times for each file it wants, for a minute, though the file may be in its cache.

    Raises MissingError where the weights of ``model`` are not there either.
    """
    with _ONE:
        before = constants.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = before or not _reachable()
        try:
            yield
        except LocalEntryNotFoundError as exc:
            why = "HF_HUB_OFFLINE is set" if before else f"{constants.ENDPOINT} cannot be reached"
            raise MissingError(
                f"the pretrained weights of {model} are not in the hub's cache {constants.HF_HUB_CACHE}, and {why}: "
                "set HF_HOME to a folder that has them, or name a file of weights with --checkpoint-path"
            ) from exc
        finally:
            constants.HF_HUB_OFFLINE = before


def _reachable() -> bool:
    """Tell whether anything answers, in one try; through a proxy, where the environment names one."""
    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=PATIENCE):
            return True
    except HTTPError:
        return True
    except URLError as exc:
        return isinstance(exc.reason, ssl.SSLError)  # the client may know other certificates
    except (OSError, HTTPException):  # nothing, or what does not speak HTTP
        return False
