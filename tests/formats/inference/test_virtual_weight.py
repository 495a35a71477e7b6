"""Virtual weights in training and in packed inference: as with dense ones, which never exist."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from compressor import Compressor, Policy, Rule, load
from compressor.formats.errors import MissingError, UsageError
from tests.helpers.blocks import blocks_of, job_of, network, never_whole

__all__ = ["never_whole"]


def train(job: Compressor, steps: int = 5) -> torch.optim.Optimizer:
    opt = torch.optim.SGD(job.param_groups(lr=0.1), lr=0.1, momentum=0.9)
    job.attach(opt, steps)
    for _ in range(steps):
        step(job, opt)
    return opt


def step(job: Compressor, opt: torch.optim.Optimizer) -> None:
    inputs = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    opt.zero_grad()
    job.loss(job.model(inputs), torch.arange(6) % 5).backward()
    opt.step()


def test_trains_as_with_dense_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks_of(64, monkeypatch)
    dense, virtual = job_of(network(), virtual=False), job_of(network(), virtual=True)
    train(dense)
    train(virtual)
    for one, other in zip(dense.groups, virtual.groups, strict=True):
        torch.testing.assert_close(one.values, other.values, rtol=1e-4, atol=1e-6)
    dense.finish()
    finished = virtual.finish()
    for name, tensor in dense.model.state_dict().items():
        torch.testing.assert_close(virtual.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    assert all(site.codec is not None for site in finished.content.sites.values())


@pytest.mark.usefixtures("never_whole")
def test_no_weight_matrix_exists_in_training_or_evaluation() -> None:
    job = job_of(network(), virtual=True)
    train(job)
    job.model.eval()
    job.model(torch.randn(2, 3, 6, 6))
    held = [*job.model.parameters(), *job.model.buffers()]
    weights = sum(group.weights for group in job.groups)
    assert sum(tensor.numel() for tensor in held) < weights / 8 + 200
    assert not job.dense
    assert all(group.master_weight(site).is_meta for group in job.groups for site in group.sites)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 20)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.embed(tokens)))
        return logits


def test_a_model_without_memory_is_drawn_layer_by_layer() -> None:
    with torch.device("meta"):
        model = network()
    job = job_of(model, virtual=True)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    spreads = [float(group.codebook().detach().std()) for group in job.groups]
    dense = [float(parameter.detach().std()) for parameter in network().parameters() if parameter.ndim > 1]
    assert spreads == pytest.approx(dense, rel=0.4)
    train(job)
    assert torch.isfinite(job.model(torch.randn(2, 3, 6, 6))).all()
    job.finish()
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize("virtual", [True, False])
def test_a_tied_model_without_memory_stays_tied(virtual: bool) -> None:
    with torch.device("meta"):
        model = Tied()
    job = job_of(model, virtual)
    job.model(torch.tensor([3, 1])).sum().backward()
    assert [group.values.grad is not None for group in job.groups] == [True]
    job.finish()
    assert model.head.weight is model.embed.weight


def test_a_model_without_memory_needs_weights_or_leave_to_draw_them() -> None:
    policy = Policy([Rule("*", scheme="hashed")])
    with pytest.raises(MissingError, match=r"0\.weight is on meta .* from_scratch=True"):
        Compressor(network().to("meta"), policy, teacher=None)
    model = timm.create_model("test_vit", num_classes=10).to("meta")
    with pytest.raises(MissingError, match=r"a \w+ on meta has no reset_parameters\(\)"):
        job_of(model, virtual=True)


def test_the_finished_model_is_the_given_one_and_what_its_file_holds(tmp_path: Path) -> None:
    model = network()
    parameters = dict(model.named_parameters())
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    job = job_of(model, virtual=True)
    train(job)
    packed = job.finish()
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert list(model.state_dict()) == list(shapes)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    packed.save(tmp_path / "net.safetensors")
    loaded = load(tmp_path / "net.safetensors", network())
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert "-" in packed.report().table(), "no dense weights, no noise"


def test_resumes() -> None:
    whole = job_of(network(), virtual=True)
    opt = train(whole, 4)
    model, momentum = copy.deepcopy(whole.state_dict()), copy.deepcopy(opt.state_dict())
    resumed = job_of(network(), virtual=True)
    resumed.load_state_dict(model)
    other = torch.optim.SGD(resumed.param_groups(lr=0.1), lr=0.1, momentum=0.9)
    other.load_state_dict(momentum)
    step(whole, opt)
    step(resumed, other)
    assert resumed.finish().to_bytes() == whole.finish().to_bytes()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_nfnet"])
def test_timm_models_compute_the_same(name: str) -> None:
    """Attention, weight standardisation and all."""
    models = []
    for virtual in (False, True):
        torch.manual_seed(0)
        model: Any = timm.create_model(name, num_classes=10)
        models.append(job_of(model, virtual).model.eval())
    x = torch.randn(1, *model.pretrained_cfg["input_size"])
    torch.testing.assert_close(models[1](x), models[0](x), rtol=1e-4, atol=1e-5)


def test_deep_copies_stand_alone() -> None:
    job = job_of(network(), virtual=True)
    copied, x = copy.deepcopy(job.model).eval(), torch.randn(2, 3, 6, 6)
    before = copied(x)
    train(job)
    assert torch.equal(copied(x), before)


def test_undo_has_nothing_to_go_back_to() -> None:
    job = job_of(network(), virtual=True)
    with pytest.raises(UsageError, match=r"undo\(\): the dense weights of 0\.weight have not been kept"):
        job.undo()
    job.finish()


def test_only_generated_indices_and_no_pruned_weights() -> None:
    for rule, fault in (
        ({"scheme": "kmeans"}, r"no scheme here generates its indices: kmeans"),
        ({"scheme": "hashed", "sparsity": 0.5}, r"0\.weight is pruned"),
    ):
        job = Compressor(network(), Policy([Rule("*", **rule)]), teacher=None)
        with pytest.raises(UsageError, match=fault):
            job.prepare(virtual=True)
