"""Models of odd kinds: unwrapped, or refused in one line with the call that helps."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compressor import Compressor, Policy, Rule
from compressor.api import job_of
from compressor.api.clustering import cluster_weights, strip_clustering
from compressor.api.quantization import quantize_annotate_layer
from compressor.formats.errors import UsageError

LEARNT = Policy([Rule("*", scheme="learnt", bits=2)])
INPUTS = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(INPUTS, torch.arange(8)), 4)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("copy", [False, True])
def test_a_compiled_model_is_unwrapped(copy: bool) -> None:
    model = net()
    jobs = [Compressor(one, LEARNT, copy=copy) for one in (compiled(model), net())]
    assert (jobs[0].model is model) is not copy
    ours, expected = (job.prepare().finetune(loader(), epochs=1).finish() for job in jobs)
    assert list(ours.content.sites) == ["0.weight", "2.weight"]
    assert ours.to_bytes() == expected.to_bytes()


def test_a_compiled_teacher_is_unwrapped() -> None:
    job = Compressor(net(), LEARNT, teacher=compiled(net()))
    assert type(job.teacher) is nn.Sequential


def pruned() -> nn.Module:
    model = net()
    torch.nn.utils.prune.random_unstructured(model[0], "weight", 0.5)
    return model


def normed(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings(action="ignore"):
        normed: nn.Module = nn.utils.weight_norm(layer)
    return normed


def spectral() -> nn.Module:
    model = net()
    nn.utils.spectral_norm(model[2])
    model(INPUTS)
    return model


def scripted(model: nn.Module) -> Any:
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.script(model)


def traced() -> Any:
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.trace(net(), INPUTS)


def lazy() -> nn.Module:
    with warnings.catch_warnings(action="ignore"):
        return nn.Sequential(nn.LazyLinear(16))


def holding(value: object) -> nn.Module:
    model = net()
    model.held = value  # type: ignore[assignment]
    return model


NOT_COPIED = " cannot be copied: "
SCRIPT = "the model is TorchScript, which has no layers: pass the module that torch.jit was given"
EXPORTED = "the model comes from torch.export, which has no layers: pass the module that was exported"
NAMED = "; of a timm name, timm.create_model(NAME)"
KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "pruned": (
        pruned,
        f"Sequential{NOT_COPIED}torch.nn.utils.prune.remove(model.get_submodule('0'), 'weight') first; "
        "preserve_sparsity=True keeps the zeros",
    ),
    "weight norm": (
        lambda: nn.Sequential(normed(nn.Linear(16, 16)), nn.Linear(16, 16)),
        f"Sequential{NOT_COPIED}torch.nn.utils.remove_weight_norm(model.get_submodule('0'), 'weight') first",
    ),
    "spectral norm": (
        spectral,
        f"Sequential{NOT_COPIED}torch.nn.utils.remove_spectral_norm(model.get_submodule('2'), 'weight') first",
    ),
    "computed": (
        lambda: holding(nn.Parameter(torch.ones(2)) * 2),
        f"Sequential{NOT_COPIED}held is the result of a computation: keep held.detach() there",
    ),
    "lock": (
        lambda: holding(threading.Lock()),
        f"Sequential{NOT_COPIED}cannot pickle '_thread.lock' object; with copy=False and teacher=None the model itself "
        "is worked on",
    ),
    "lazy": (lazy, "0.weight of a lazy module has no shape yet: run model(inputs) on one batch first"),
    "script": (lambda: scripted(net()), SCRIPT),
    "trace": (traced, SCRIPT),
    "export": (lambda: torch.export.export(net(), (INPUTS,)), EXPORTED),
    "exported": (lambda: torch.export.export(net(), (INPUTS,)).module(), EXPORTED),
    "unflattened": (lambda: torch.export.unflatten(torch.export.export(net(), (INPUTS,))), EXPORTED),
    "name": (lambda: "resnet18", f"the model must be a torch.nn.Module, got str{NAMED}"),
    "state": (lambda: net().state_dict(), f"the model must be a torch.nn.Module, got OrderedDict{NAMED}"),
}


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_one_line_of_the_constructor(kind: str, copy: bool) -> None:
    make, line = KINDS[kind]
    with pytest.raises(UsageError) as caught:
        Compressor(make(), LEARNT, copy=copy)  # with copy=False the teacher is a copy
    assert str(caught.value) == line


def test_what_the_line_advises_helps() -> None:
    model = pruned()
    torch.nn.utils.prune.remove(model.get_submodule("0"), "weight")
    zeros = model.state_dict()["0.weight"] == 0
    job = Compressor(model, LEARNT, preserve_sparsity=True).prepare().finetune(loader(), epochs=1)
    job.finish()
    assert torch.equal(job.model.state_dict()["0.weight"] == 0, zeros)
    held = holding(threading.Lock())
    assert Compressor(held, LEARNT, copy=False, teacher=None).prepare().finish().content.sites
    layer = normed(nn.Linear(16, 16))
    nn.utils.remove_weight_norm(layer)
    assert Compressor(layer, LEARNT).prepare().finish().content.sites


def test_weights_of_inference_mode_are_trained_as_a_copy_only() -> None:
    with torch.inference_mode():
        model = net()
    with pytest.raises(UsageError, match=r"^0\.weight was made in torch\.inference_mode .* or pass copy=True$"):
        Compressor(model, LEARNT, copy=False)
    job = Compressor(model, LEARNT).prepare().finetune(loader(), epochs=1)
    assert len(job.finish().content.sites) == 2


def test_a_part_of_torchscript_cannot_teach_but_stays_as_it_is() -> None:
    model = nn.Sequential(scripted(nn.Linear(16, 16)), nn.Linear(16, 16))
    with pytest.raises(UsageError, match=r"^the teacher cannot be frozen \(.*\): teacher=None distils from none$"):
        Compressor(model, LEARNT)
    packed = Compressor(model, LEARNT, teacher=None).prepare().finish()
    assert list(packed.content.sites) == ["1.weight"]


def test_a_wrapped_model_may_be_compiled() -> None:
    clustered = cluster_weights(compiled(net()), 4)
    assert type(clustered) is nn.Sequential
    assert job_of(compiled(clustered)) is job_of(clustered)
    stripped = strip_clustering(compiled(clustered))
    assert type(stripped) is nn.Sequential
    assert len(stripped.state_dict()["0.weight"].unique()) == 4


def test_the_verbs_say_the_same() -> None:
    with pytest.raises(UsageError, match=r"cannot be copied: torch\.nn\.utils\.prune\.remove"):
        quantize_annotate_layer(pruned())
