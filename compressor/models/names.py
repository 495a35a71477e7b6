"""Names of models, in every form that timm takes: its own, ``hf-hub:REPOSITORY`` and ``local-dir:FOLDER``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from compressor.formats.errors import MissingError
from compressor.formats.io.hub import is_reachable
from compressor.models.known_names import keep_names, no_such_model

__all__ = ["NamedModel", "find_model"]

LOCAL = "local-dir:"
CONFIG = "config.json"


@dataclass(frozen=True)
class NamedModel:
    """A model that timm can build by a name.

    Args:
        name: by which ``timm.create_model`` builds it, and finds its weights.
        architecture: timm's own name of the model, which a packed file states.
        args: arguments of ``timm.create_model`` that come with the name.
        cfg: the ``pretrained_cfg`` of its weights.
    """

    name: str
    architecture: str
    args: Mapping[str, Any] = field(default_factory=dict)
    cfg: Mapping[str, Any] = field(default_factory=dict)


def find_model(name: str) -> NamedModel:
    """Finds a model by a name of timm's; downloads at most its configuration.

    Where the hub cannot be reached, the copy of a repository in the hub's cache takes its place.

    Raises:
        MissingError: timm has no such model, or a folder or repository of that name holds none.
    """
    try:
        source, place = timm.models.parse_model_name(name)
    except ValueError as exc:
        raise MissingError(" ".join(str(exc).split())) from exc
    if source is None:
        if not timm.is_model(name):
            raise no_such_model(name, timm.list_models())
        keep_names(timm.list_models())
        cfg = timm.models.get_pretrained_cfg(name)
        return NamedModel(name, name, cfg=_sketched_cfg(name) if cfg is None else cfg.to_dict())  # type: ignore[no-untyped-call]
    path, name = (Path(place) / CONFIG, name) if source == "local-dir" else _from_hub(name, place)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = NamedModel(name, str(config["architecture"]), dict(config.get("model_args") or {}), _sketched_cfg(name))
    except OSError as exc:
        raise MissingError(
            f"{name}: {path} cannot be read ({exc.strerror or exc}); timm writes one to each model"
        ) from exc
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError) as exc:
        reason = " ".join(f"{type(exc).__name__}: {exc}".split())[:200]
        raise MissingError(f"{name}: {path} is not the configuration of a model of timm's ({reason})") from exc
    return found


def _sketched_cfg(name: str) -> dict[str, Any]:
    """Returns the ``pretrained_cfg`` that timm gives a model, which is built without memory for that."""
    with torch.device("meta"):
        return dict(getattr(timm.create_model(name), "pretrained_cfg", {}))


def _from_hub(name: str, place: str) -> tuple[Path, str]:
    """Returns the configuration of a repository, and the name to build its model by: that of its copy when off line."""
    repository, _, revision = place.partition("@")
    cached_only = not constants.HF_HUB_OFFLINE and not is_reachable()
    try:
        path = hf_hub_download(repository, CONFIG, revision=revision or None, local_files_only=cached_only)
    except LocalEntryNotFoundError as exc:
        raise MissingError(
            f"{name} is not in the hub's cache {constants.HF_HUB_CACHE}, and the hub is off line"
        ) from exc
    except (HfHubHTTPError, OSError, ValueError) as exc:
        raise MissingError(f"{name}: {' '.join(str(exc).split())[:200]}") from exc
    return Path(path), f"{LOCAL}{Path(path).parent}" if cached_only else name
