"""Shared weights on a model: computed once a forward pass, before it, and never kept for the next."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from compressor import Compressor, Policy, Rule
from compressor.formats.errors import UsageError
from compressor.sharing.group import Group
from compressor.sharing.parametrization import attach
from compressor.sharing.sites import Site

SCHEMES = "learnt", "kmeans", "inq", "wfn", "ttq", "diffquant", "hashed"


class Net(nn.Module):
    """Two layers, the second of which may be left out, or be recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(40, 40), nn.Linear(40, 40)
        self.through: Any = lambda layer, images: layer(images)

    def forward(self, images: Tensor) -> Tensor:
        """Returns what the second layer makes of the first's."""
        return torch.as_tensor(self.through(self.second, self.first(images).relu()))


def job_of(scheme: str) -> Compressor:
    """Prepare such a network."""
    torch.manual_seed(0)
    rule = Rule("*.weight", scheme) if scheme in ("wfn", "ttq") else Rule("*.weight", scheme, bits=4)
    job = Compressor(Net(), Policy([rule]), teacher=None, copy=False).prepare()
    job.attach(torch.optim.SGD(job.param_groups(1e-2)), 100)
    return job


def gradients(job: Compressor, output: Tensor) -> list[Tensor]:
    """Returns the gradients of all that is trained."""
    trained = [tensor for tensor in job.model.parameters() if tensor.requires_grad]
    found = torch.autograd.grad(output.square().sum(), trained, allow_unused=True)
    return [torch.zeros_like(one) if grad is None else grad for one, grad in zip(trained, found, strict=True)]


def by_hand(net: Any, images: Tensor) -> Tensor:
    """Returns its output, by the weights there are now."""
    hidden = functional.linear(images, net.first.weight, net.first.bias).relu()
    return functional.linear(hidden, net.second.weight, net.second.bias)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_recomputed_have_the_same_gradients(scheme: str, reentrant: bool) -> None:
    """``torch.utils.checkpoint`` counts what autograd saves: the weight has to be computed again inside it too."""
    job = job_of(scheme)
    net: Any = job.model
    images = torch.randn(8, 40)
    wanted = gradients(job, net(images))
    net.through = lambda layer, given: checkpoint(layer, given, use_reentrant=reentrant)
    output = net(images).square().sum()
    output.backward()
    found = [tensor.grad for tensor in net.parameters() if tensor.requires_grad]
    for one, other in zip(wanted, found, strict=True):
        assert other is None or torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    assert net.first.bias.grad is not None


def test_a_weight_is_computed_once_and_before_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of("learnt")
    told: list[str] = []
    compute = Group.weight

    def tell(group: Group, site: Site, master: Tensor) -> Tensor:
        told.append(site.name)
        return compute(group, site, master)

    monkeypatch.setattr(Group, "weight", tell)
    net: Any = job.model
    net.first.register_forward_pre_hook(lambda *_: told.append("layer"))
    net(torch.randn(8, 40))
    assert told == ["first.weight", "second.weight", "layer"]
    told.clear()
    with torch.no_grad():  # where weights of all layers at once would take memory
        net(torch.randn(8, 40))
    assert told == ["layer", "first.weight", "second.weight"]
    told.clear()
    net.second(torch.randn(8, 40))
    assert told == ["second.weight"], "a part of the model alone"


@pytest.mark.parametrize("training", [True, False])
def test_weights_are_computed_outside_autocast(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    job = job_of("learnt")
    outside: list[bool] = []
    compute = Group.weight

    def note(group: Group, site: Site, master: Tensor) -> Tensor:
        outside.append(not torch.is_autocast_enabled("cpu"))
        return compute(group, site, master)

    monkeypatch.setattr(Group, "weight", note)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
        output = job.model.train(training)(torch.randn(8, 40))
    assert outside == [True, True]
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_kept_for_the_next_pass(fails: bool) -> None:
    """Not even by one that raised: what is then changed by hand has to be seen."""
    job = job_of("learnt")
    net: Any = job.model
    if fails:
        net.through = None
        with pytest.raises(TypeError):
            net(torch.randn(8, 40))
        net.through = lambda layer, images: layer(images)
    else:
        net(torch.randn(8, 40))
    before = net.second.weight
    for parameter in net.parameters():
        parameter.data.mul_(2)
    assert not torch.equal(net.second.weight, before)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("what", ["masters", "codebooks"])
def test_a_model_may_change_its_parameters_as_it_goes(scheme: str, what: str) -> None:
    """As those do that average others, or clamp: the layer computes with what there is in its turn."""
    job = job_of(scheme)
    net: Any = job.model
    changed = [value for name, value in net.named_parameters() if (".values" in name) == (what == "codebooks")]
    images = torch.randn(8, 40)

    def change(*given: Any) -> None:
        del given
        with torch.no_grad():
            for parameter in changed:
                parameter.mul_(2)

    net.first.register_forward_pre_hook(change)
    output = net(images)
    assert torch.equal(output, by_hand(net, images))
    gradients(job, output)


def test_a_layer_may_be_called_with_other_parameters() -> None:
    """``torch.func.functional_call`` of a part, inside the pass of the whole."""
    net: Any = job_of("learnt").model
    name = "parametrizations.weight.original"
    other = (net.second.parametrizations.weight.original.detach() + 1).requires_grad_()
    net.through = lambda layer, given: torch.func.functional_call(layer, {name: other}, (given,))
    net(torch.randn(8, 40)).sum().backward()
    assert other.grad is not None
    assert net.second.parametrizations.weight.original.grad is None


def test_a_pass_in_another_thread_has_its_own_weights() -> None:
    net: Any = job_of("learnt").model
    images = torch.randn(8, 40)
    inner: list[Tensor] = []

    def through(layer: nn.Module, given: Tensor) -> Any:
        if not inner:
            inner.append(images)
            with ThreadPoolExecutor(1) as pool:
                pool.submit(lambda: layer(given.detach()).sum().backward()).result()
        return layer(given)

    net.through = through
    net(images).sum().backward()  # of a graph that was gone through already it would say so


def test_a_pass_that_was_interrupted_leaves_nothing_to_the_next() -> None:
    net: Any = job_of("learnt").model

    def interrupted(*given: Any) -> Any:
        raise KeyboardInterrupt

    net.through = interrupted
    images = torch.randn(8, 40)
    with pytest.raises(KeyboardInterrupt):
        net(images)
    net.through = lambda layer, given: layer(given)
    for parameter in net.parameters():
        parameter.data.mul_(2)
    with torch.no_grad():
        assert torch.equal(net(images), by_hand(net, images))


def test_a_copy_in_the_middle_of_a_pass_has_its_own() -> None:
    job = job_of("learnt")
    net: Any = job.model
    copies: list[Any] = []

    def copied(layer: nn.Module, images: Tensor) -> Any:
        copies.append(copy.deepcopy(net))
        return layer(images)

    net.through = copied
    net(torch.randn(8, 40))
    (other,) = copies
    other.through = net.through = lambda layer, images: layer(images)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    images = torch.randn(8, 40)
    assert not torch.allclose(other(images), net(images))
    assert other.second.parametrizations.weight[0].precomputed.is_empty


def test_groups_are_put_on_a_model_once() -> None:
    job = job_of("learnt")
    before = [(name, type(module)) for name, module in job.model.named_modules()]
    with pytest.raises(UsageError, match=r"^the model is being compressed already: finish\(\) or undo\(\) that first$"):
        attach(job.model, job.groups)
    assert [(name, type(module)) for name, module in job.model.named_modules()] == before


def test_no_hook_stays_on_the_model() -> None:
    job = job_of("learnt")
    assert job.model._forward_pre_hooks
    other = copy.deepcopy(job)
    job.finish()
    other.undo()
    for model in (job.model, other.model):
        assert not model._forward_pre_hooks
        assert not model._forward_hooks
        assert not model._forward_hooks_always_called


@pytest.mark.parametrize("end", ["finish", "undo"])
def test_tensors_are_in_the_order_that_they_had(end: str) -> None:
    job = job_of("learnt")
    getattr(job, end)()
    assert list(job.model.state_dict()) == ["first.weight", "first.bias", "second.weight", "second.bias"]
    assert [name for name, _ in job.model.named_parameters()] == list(job.model.state_dict())
