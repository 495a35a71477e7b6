"""``torch.compile`` for the training of a model whose weights are shared."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

from compressor.formats.errors import ResourceError, UsageError, did_you_mean

__all__ = ["check_backend", "compiled_model"]


def check_backend(backend: str | None) -> None:
    """Raise UsageError for a backend that ``torch.compile`` does not know."""
    known = torch._dynamo.list_backends(exclude_tags=())
    if backend is not None and backend not in known:
        near = did_you_mean(backend, known)
        raise UsageError(f"torch.compile has no backend {backend!r}.{near} Known: {', '.join(sorted(known))}")


@contextmanager
def compiled_model(model: nn.Module, backend: str | None = "inductor") -> Iterator[nn.Module]:
    """Let calls of a model run compiled inside; its parameters, their names and its class stay as they are.

    The lookup of shared weights is left out of the graphs: what it reads changes at every step.

    Args:
        backend: of ``torch.compile``; None to compile nothing.

    Raises UsageError for a backend that is not known, ResourceError where it cannot compile here.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> with compiled_model(model, "eager"):
        ...     tuple(model(torch.ones(1, 2)).shape)
        (1, 2)
    """
    check_backend(backend)
    if backend is None:
        yield model
        return
    model.compile(backend=backend)
    try:
        with warnings.catch_warnings():  # of dynamo's own looking at what goes on after the lookup
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
            yield model
    except (TorchDynamoException, CppCompileError, InvalidCxxCompiler) as exc:
        said = " ".join(str(exc).split())[:200]
        raise ResourceError(f"torch.compile with backend {backend!r} fails here: leave it out ({said})") from exc
    finally:
        model._compiled_call_impl = None
