"""Virtual weights: results and gradients of the dense matrix, without it; in training and in packed inference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from compressor import Compressor, Policy, Rule, load
from compressor.formats import blockwise, generated
from compressor.formats.codec import Stream, codec_class
from compressor.formats.errors import MissingError, UsageError
from compressor.formats.generated import Generated
from compressor.formats.packed import write
from compressor.formats.record import Content
from compressor.formats.virtual import VirtualTensor, VirtualWeight

CODEC = codec_class("hashed")()


@pytest.fixture
def never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 weights, and no more than a channel, must do."""

    def refuse(self: Generated, codebook: Tensor) -> Tensor:
        raise AssertionError(f"{self.stream.name} was expanded")

    rows = Generated.rows

    def few(self: Generated, codebook: Tensor, part: range) -> tuple[Tensor, Tensor]:
        assert len(part) * self.channel <= max(64, self.channel)
        return rows(self, codebook, part)

    blocks_of(64, monkeypatch)
    monkeypatch.setattr(Generated, "expand", refuse)
    monkeypatch.setattr(Generated, "rows", few)


def blocks_of(weights: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "BLOCK", weights)
    monkeypatch.setattr(generated, "BLOCK", weights)


def source_of(shape: tuple[int, ...], codewords: int = 10, dtype: torch.dtype = torch.float64) -> Generated:
    count = torch.Size(shape).numel()
    return Generated(CODEC, Stream("fc.weight", count, codewords), shape, dtype)


def both_ways(
    shape: tuple[int, ...], compute: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, bias: Tensor
) -> None:
    """Compare output and all gradients, float64, with those of the weight as an ordinary tensor."""
    torch.manual_seed(0)
    source, codebook = source_of(shape), torch.randn(10, dtype=torch.float64)
    found = []
    for virtual in (True, False):
        leaves = [one.clone().requires_grad_() for one in (codebook, x, bias)]
        indices = source.indices(0, source.stream.count, x.device)
        weight = (
            VirtualTensor(source, leaves[0], torch.float64)
            if virtual
            else leaves[0].index_select(0, indices).view(shape)
        )
        output = compute(leaves[1], weight, leaves[2])
        gradient = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        found.append([output.detach(), *torch.autograd.grad(output, leaves, gradient, allow_unused=True)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@settings(max_examples=40, deadline=None)
@given(
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    batch=st.sampled_from([(), (1,), (5,), (2, 3), (0,)]),
    block=st.sampled_from([1, 7, 20, 1000]),
    biased=st.booleans(),
)
def test_linear(inputs: int, outputs: int, batch: tuple[int, ...], block: int, biased: bool) -> None:
    def compute(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.linear(x, weight, bias if biased else None)

    with pytest.MonkeyPatch.context() as patch:
        blocks_of(block, patch)
        both_ways((outputs, inputs), compute, doubles(*batch, inputs), doubles(outputs))


CONVOLUTIONS: dict[str, tuple[tuple[int, ...], Callable[..., Tensor], tuple[int, ...], dict[str, Any]]] = {
    "1d": ((6, 4, 3), functional.conv1d, (2, 4, 9), {"padding": 1}),
    "2d": ((6, 4, 3, 2), functional.conv2d, (2, 4, 7, 6), {"stride": (2, 1), "dilation": 2}),
    "3d": ((5, 2, 2, 2, 2), functional.conv3d, (1, 2, 4, 4, 4), {}),
    "without a batch": ((6, 4, 3, 3), functional.conv2d, (4, 5, 5), {"padding": 1}),
    "same": ((6, 4, 2, 2), functional.conv2d, (2, 4, 5, 5), {"padding": "same"}),
    "grouped": ((12, 3, 3, 3), functional.conv2d, (2, 9, 5, 5), {"groups": 3}),
    "depthwise": ((8, 1, 3, 3), functional.conv2d, (2, 8, 5, 5), {"groups": 8, "padding": "same"}),
}


@pytest.mark.parametrize("block", [1, 20, 80, 1000])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_convolution(kind: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, convolve, inputs, options = CONVOLUTIONS[kind]
    blocks_of(block, monkeypatch)
    both_ways(shape, lambda x, weight, bias: convolve(x, weight, bias, **options), doubles(*inputs), doubles(shape[0]))


OTHERS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "arithmetic": ((4, 6), lambda x, weight, bias: x @ (weight - weight.mean()).T / weight.std() + bias),
    "keywords": ((4, 6), lambda x, weight, bias: functional.linear(input=x, weight=weight, bias=bias)),
    "standardised": (
        (4, 6),
        lambda x, weight, bias: x @ functional.batch_norm(weight.view(1, 4, -1), None, None, training=True)[0].T + bias,
    ),
    "transposed": ((6, 4, 3), lambda x, weight, bias: functional.conv_transpose1d(x.T[None], weight, bias)),
    "rows": ((9, 4), lambda x, weight, bias: functional.embedding(torch.tensor([3, 0, 3]), weight) + bias + x.sum()),
    "input": ((6, 4), lambda x, weight, bias: functional.linear(weight, x.view(-1, 4)[:4], bias)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_whatever_else_reads_it_sees_an_ordinary_weight(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks_of(7, monkeypatch)
    shape, compute = OTHERS[kind]
    both_ways(shape, compute, doubles(4, 6), doubles(4))


def test_what_it_says_of_itself_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generated, "expand", None)
    weight = VirtualTensor(source_of((3, 4)), torch.zeros(10, requires_grad=True), torch.float32)
    assert (weight.shape, weight.size(1), weight.dim(), weight.numel()) == ((3, 4), 4, 2, 12)
    assert (weight.dtype, weight.device.type, weight.requires_grad) == (torch.float32, "cpu", True)


def test_one_block_gives_the_bits_of_the_dense_layer() -> None:
    source, codebook = source_of((96, 80), 100, torch.float32), torch.randn(100)
    x, bias = torch.randn(5, 80), torch.randn(96)
    weight = VirtualTensor(source, codebook, torch.float32)
    assert torch.equal(functional.linear(x, weight, bias), functional.linear(x, weight.expand_weights(), bias))


def test_saves_input_and_codebook_for_the_backward_pass(never_whole: None) -> None:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    def count(inputs: int, outputs: int) -> int:
        codebook = torch.randn(100, requires_grad=True)
        weight = VirtualTensor(source_of((outputs, inputs), 100, torch.float32), codebook, torch.float32)
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = functional.linear(torch.randn(8, inputs, requires_grad=True), weight, torch.zeros(outputs))
        output.sum().backward()
        return sum(tensor.numel() for tensor in saved)

    assert count(64, 32) == 8 * 64 + 100 + 32
    assert count(64, 512) == 8 * 64 + 100 + 512, "nothing grows with the weights"


def test_autocast_computes_as_with_a_dense_weight() -> None:
    source, x = source_of((16, 24), 10, torch.float32), torch.randn(4, 24)
    codebook = torch.randn(10, requires_grad=True)
    weight, bias = VirtualTensor(source, codebook, torch.float32), torch.randn(16)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [functional.linear(x, one, bias) for one in (weight, weight.expand_weights())]
    assert outputs[0].dtype == torch.bfloat16
    assert torch.equal(*outputs)
    gradients = [torch.autograd.grad(output.float().square().sum(), [codebook])[0] for output in outputs]
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=1e-1)


def test_dtypes_must_agree_as_ever() -> None:
    weight = VirtualTensor(source_of((3, 4), dtype=torch.float32), torch.zeros(10), torch.float32)
    with pytest.raises(RuntimeError, match="same dtype"):
        functional.linear(doubles(2, 4), weight)


# -- training


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=4),
        nn.Flatten(), nn.Linear(12 * 4 * 4, 40), nn.ReLU(), nn.Linear(40, 5),
    )  # fmt: skip


def job_of(model: nn.Module, virtual: bool, **options: Any) -> Compressor:
    policy = Policy([Rule("*", scheme="hashed", compression=8)])
    job = Compressor(model, policy, copy=False, teacher=None, from_scratch=True, **options)
    return job.prepare(virtual=virtual)


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
    assert all(group.latent(site).is_meta for group in job.groups for site in group.sites)


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


# -- packed inference


def saved(path: Path, model: nn.Module, **settings: Any) -> Path:
    policy = Policy([Rule("*", scheme="hashed", **{"compression": 8, **settings})])
    Compressor(model, policy, teacher=None, from_scratch=True).prepare().finish().save(path / "net.safetensors")
    return path / "net.safetensors"


@pytest.mark.usefixtures("never_whole")
def test_packed_inference_holds_values_and_computes_block_by_block(tmp_path: Path) -> None:
    path = saved(tmp_path, network())
    packed = load(path, network(), weights="packed")
    weights = [module for module in packed.modules() if isinstance(module, VirtualWeight)]
    assert len(weights) == 4
    assert [len(one.codebook) for one in weights] == [41, 41, 960, 25]
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(packed(x), load(path, network())(x), rtol=1e-4, atol=1e-5)


def test_packed_inference_of_small_layers_gives_the_same_bits(tmp_path: Path) -> None:
    path, x = saved(tmp_path, network()), torch.randn(2, 3, 6, 6)
    dense, packed = load(path, network()), load(path, network(), weights="packed")
    assert torch.equal(packed(x), dense(x))
    assert torch.equal(copy.deepcopy(packed)(x), dense(x))
    assert torch.equal(packed.half()(x.half()), dense.half()(x.half()))
    assert packed.to("meta")(x.half().to("meta")).shape == (2, 5)


def test_a_layer_becomes_dense_again(tmp_path: Path) -> None:
    path, x = saved(tmp_path, network()), torch.randn(2, 3, 6, 6)
    dense, packed = load(path, network()), load(path, network(), weights="packed")
    layer = packed.get_submodule("5")
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer.weight) is Tensor
    assert torch.equal(layer.weight, dense.state_dict()["5.weight"])
    assert torch.equal(packed(x), dense(x))


def test_gradients_are_not_lost_where_torch_passes_its_overrides() -> None:
    weight = VirtualTensor(source_of((3, 4)), torch.zeros(10, requires_grad=True), torch.float32)
    with pytest.raises(TypeError, match=r"expand_weights\(\)"), torch.no_grad():
        torch.empty(0).set_(weight)  # type: ignore[call-overload]


def test_packed_inference_exports(tmp_path: Path) -> None:
    packed, x = load(saved(tmp_path, network()), network(), weights="packed"), torch.randn(2, 3, 6, 6)
    exported = torch.export.export(packed, (x,)).module()
    torch.testing.assert_close(exported(x), packed(x))


def test_packed_inference_keeps_the_stored_dtype(tmp_path: Path) -> None:
    path = saved(tmp_path, network().bfloat16())
    x = torch.randn(2, 3, 6, 6)
    dense, packed = load(path, network()), load(path, network(), weights="packed")
    assert torch.equal(packed(x), dense(x)), "rounded to bfloat16, then cast to float32"


def test_groups_and_vectors_are_expanded_as_ever(tmp_path: Path) -> None:
    """A file may say more of a generated tensor than a virtual weight can."""
    content = Compressor(
        network(), Policy([Rule("*", scheme="hashed", compression=64)]), teacher=None, from_scratch=True
    ).prepare().finish().content  # fmt: skip
    sites = {
        name: type(site)(**{**vars(site), "scale": torch.full((1,), 2.0).numpy()})
        for name, site in content.sites.items()
    }
    write(tmp_path / "scaled.safetensors", Content(sites, content.books, content.untouched))
    dense, packed = (load(tmp_path / "scaled.safetensors", network(), weights=how) for how in ("dense", "packed"))
    assert not any(isinstance(module, VirtualWeight) for module in packed.modules())
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(packed(x), dense(x))
