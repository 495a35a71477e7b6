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
    """Checks that ``torch.compile`` knows a backend.

    Raises:
        UsageError: it does not.
    """
    known = torch._dynamo.list_backends(exclude_tags=())
    if backend is not None and backend not in known:
        near = did_you_mean(backend, known)
        raise UsageError(f"torch.compile has no backend {backend!r}.{near} Known: {', '.join(sorted(known))}")


@contextmanager
def compiled_model(model: nn.Module, backend: str | None = "inductor") -> Iterator[nn.Module]:
    """Compiles the calls of a model inside; its parameters, their names and its class do not change.

    The gathering of shared weights stays outside the graphs, because what it reads changes at every step.

    Args:
        backend: of ``torch.compile``; None to compile nothing.

    Raises:
        UsageError: ``torch.compile`` does not know the backend.
        ResourceError: the backend cannot compile on this machine.

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
        with warnings.catch_warnings():  # raised by dynamo itself, as it inspects the gathered weights
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
            yield model
    except (TorchDynamoException, CppCompileError, InvalidCxxCompiler) as exc:
        reason = " ".join(str(exc).split())[:200]
        raise ResourceError(f"torch.compile with backend {backend!r} fails here: leave it out ({reason})") from exc
    finally:
        model._compiled_call_impl = None
