"""Sites: which tensors any rule may share, which need their name, and that layers of every kind compute with them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.data import DataLoader, TensorDataset

import compressor
from compressor import Compressor, Policy, Rule
from compressor.api.clustering import cluster_weights, strip_clustering
from compressor.formats.errors import PolicyError
from compressor.sharing.sites import find_tensors

KMEANS = Policy([Rule("*", scheme="kmeans", bits=2)])


class Conv1D(nn.Module):
    """A linear layer with its weight the other way round, as GPT-2 has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 4)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W + b``."""
        return x @ self.weight + self.bias


class Matrices(nn.Module):
    """Matrices in PyTorch's containers of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ParameterList([nn.Parameter(torch.randn(16, 16) / 4) for _ in range(2)])
        self.named = nn.ParameterDict({"last": nn.Parameter(torch.randn(16, 16) / 4)})

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with all of them."""
        for matrix in self.listed:
            x = x @ matrix
        return torch.as_tensor(x @ self.named["last"])


class Recurrent(nn.Module):
    """A recurrent layer over sequences of two steps."""

    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(8, 16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the last step."""
        return torch.as_tensor(self.rnn(x.view(-1, 2, 8))[0][:, -1])


LAYERS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "conv1d": (lambda: Conv1D(16, 16), ["weight"]),
    "containers": (Matrices, ["listed.0", "listed.1", "named.last"]),
    "rnn": (lambda: Recurrent(nn.RNN), [f"rnn.weight_{kind}_l{n}" for n in range(2) for kind in ("ih", "hh")]),
    "lstm": (lambda: Recurrent(nn.LSTM), [f"rnn.weight_{kind}_l{n}" for n in range(2) for kind in ("ih", "hh")]),
    "gru": (lambda: Recurrent(nn.GRU), [f"rnn.weight_{kind}_l{n}" for n in range(2) for kind in ("ih", "hh")]),
    "weight_norm": (lambda: weight_norm(nn.Linear(16, 16)), ["parametrizations.weight.original1"]),
    "spectral_norm": (lambda: spectral_norm(nn.Linear(16, 16)), ["parametrizations.weight.original"]),
}


def model_of(layer: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(LAYERS[layer][0](), nn.Linear(16, 10))


def batches() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(16, 16, generator=generator)
    return DataLoader(TensorDataset(inputs, torch.randint(10, (16,), generator=generator)), 8)


def shared(policy: Policy, model: nn.Module) -> list[str]:
    return [plan.site.name for plan in policy.plan(model) if plan.scheme]


@pytest.mark.parametrize("layer", LAYERS)
def test_matrices_of_every_module_are_sites(layer: str) -> None:
    assert shared(KMEANS, model_of(layer)) == [*(f"0.{name}" for name in LAYERS[layer][1]), "1.weight"]


@pytest.mark.parametrize("scheme", ["learnt", "inq"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_every_kind_train_and_reload(layer: str, scheme: str, tmp_path: Path) -> None:
    model = model_of(layer)
    job = Compressor(model, Policy([Rule("*", scheme=scheme, bits=2)])).prepare()
    codebooks = [group.codebook().detach().clone() for group in job.groups]
    job.finetune(batches(), epochs=2, lr=0.01)
    if scheme == "learnt":  # the codebook is trained, so the layer computes with it
        assert not any(torch.equal(group.codebook(), old) for group, old in zip(job.groups, codebooks, strict=True))
    copy.deepcopy(job.model)
    (inputs, _), *_ = batches()
    job.model.eval()
    before = job.model(inputs)
    packed = job.finish()
    assert torch.equal(job.model(inputs), before)
    assert list(job.model.state_dict()) == list(model.state_dict())
    for name in LAYERS[layer][1]:
        assert len(job.model.state_dict()[f"0.{name}"].unique()) <= 4
    packed.save(tmp_path / "small.safetensors")
    loaded = compressor.load(tmp_path / "small.safetensors", model=model_of(layer))
    assert torch.equal(loaded(inputs), before)
    looked_up = compressor.load(tmp_path / "small.safetensors", model=model_of(layer), weights="packed")
    assert torch.equal(looked_up(inputs), before)


@pytest.mark.parametrize("match", ["0", "0.rnn", "0.rnn.*", "re:0[.]rnn", "*.weight_?h_l?", "0.rnn.weight*"])
def test_natural_patterns_reach_recurrent_weights(match: str) -> None:
    assert shared(Policy([Rule(match, scheme="kmeans", bits=2)]), model_of("lstm")) == [
        f"0.{name}" for name in LAYERS["lstm"][1]
    ]


@pytest.mark.parametrize("match", ["0", "0.weight", "*.weight", "0.parametrizations.weight.original1"])
def test_parametrised_weights_are_matched_by_their_layer_s_name(match: str) -> None:
    assert "0.parametrizations.weight.original1" in shared(
        Policy([Rule(match, scheme="kmeans", bits=2)]), model_of("weight_norm")
    )


def test_recurrent_layers_are_wrapped_and_stripped() -> None:
    wrapped = cluster_weights(model_of("lstm"), number_of_clusters=4)
    (inputs, _), *_ = batches()
    wrapped(inputs).sum().backward()
    stripped = strip_clustering(wrapped)
    assert len(stripped.state_dict()["0.rnn.weight_hh_l1"].unique()) == 4


class Zoo(nn.Module):
    """Tensors of two and more dimensions that are no weights, and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((8, 8))
        self.pos_embed1 = nn.Parameter(torch.randn(1, 8, 8))
        self.reg_token = nn.Parameter(torch.randn(1, 4, 8))
        self.rel_pos_h = nn.Parameter(torch.randn(8, 8))
        self.attention_biases = nn.Parameter(torch.randn(8, 8))
        self.temperature = nn.Parameter(torch.randn(64, 1, 1))
        self.scale = nn.Parameter(torch.ones(8))
        self.embedding = nn.Parameter(torch.randn(8, 8))
        self.phases = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))
        self.counts = nn.Parameter(torch.ones(8, 8, dtype=torch.int64), requires_grad=False)


REASONS = {
    "norm.weight": "of a normalisation",
    "norm.bias": "of a normalisation",
    "pos_embed1": "a position or token, by its name",
    "reg_token": "a position or token, by its name",
    "rel_pos_h": "a position or token, by its name",
    "attention_biases": "a bias",
    "temperature": "a vector",
    "phases": "holds torch.complex64, not floating point",
    "counts": "holds torch.int64, not floating point",
}


def test_norms_positions_biases_and_vectors_stay_dense_with_a_reason() -> None:
    plans = {plan.site.name: plan for plan in KMEANS.plan(Zoo())}
    dense = {name: plan.reason for name, plan in plans.items() if not plan.scheme}
    assert dense == {name: f"{reason}; shared only by a rule that names it" for name, reason in REASONS.items()}
    assert [name for name, plan in plans.items() if plan.scheme] == ["embedding"]


@pytest.mark.parametrize("name", ["norm.weight", "pos_embed1", "attention_biases", "temperature"])
def test_a_rule_that_names_them_shares_them(name: str) -> None:
    assert shared(Policy([Rule(name, scheme="kmeans", bits=2)]), Zoo()) == [name]


SITES_OF_TIMM = {  # tensors of two and more dimensions outside the six classes, and whether they are sites
    "tf_efficientnet_cc_b0_4e": {"blocks.4.0.conv_pw.weight": True, "blocks.4.0.conv_dw.weight": True},
    "sequencer2d_s": {"stages.0.blocks.0.rnn_tokens.rnn_v.weight_ih_l0": True},
    "test_vit": {"pos_embed": False, "cls_token": False},
    "test_nfnet": {"final_conv.gain": False},
    "samvit_base_patch16": {"pos_embed": False, "blocks.0.attn.rel_pos_h": False},
    "xcit_nano_12_p16_224": {"blocks.0.attn.temperature": False, "cls_token": False},
    "swin_tiny_patch4_window7_224": {"layers.0.blocks.0.attn.relative_position_bias_table": False},
    "levit_128s": {"stages.0.blocks.0.attn.attention_biases": False},
    "botnet26t_256": {"stages.2.1.self_attn.pos_embed.height_rel": False},
}


@pytest.mark.parametrize("name", SITES_OF_TIMM)
def test_sites_of_timm_models(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    found = {one.name: one.default for one in find_tensors(model)}
    assert {tensor: found[tensor] for tensor in SITES_OF_TIMM[name]} == SITES_OF_TIMM[name]


def test_a_warning_names_what_stays_dense(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64).double())
    model.pos_embed = nn.Parameter(torch.zeros(64, 64))
    Compressor(model, KMEANS, teacher=None)
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    # 4 bytes x 4096 of pos_embed and 8 x 4096 of the second layer, of 16384 + 256 + 32768 + 512 + 16384 = 66304 in all
    assert line == (
        "74 % of the parameters' bytes stay dense: 1.weight (holds torch.float64, which a packed file stores "
        "untouched), pos_embed (a position or token, by its name; shared only by a rule that names it)"
    )


def test_no_warning_for_what_is_ignored_or_small(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.LayerNorm(64))
    Compressor(model, Policy([Rule.ignore("1"), *KMEANS.given]), teacher=None)
    model.pos_embed = nn.Parameter(torch.zeros(4, 64))  # 1,024 of 34,816 bytes: 2.9 %
    Compressor(model, KMEANS, teacher=None)
    assert not caplog.records


def test_nothing_but_norms() -> None:
    with pytest.raises(PolicyError, match="nothing to share: no weights of two or more dimensions"):
        KMEANS.plan(nn.LayerNorm((4, 4)))
