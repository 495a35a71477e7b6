"""The verbs of TensorFlow Model Optimization: what is trained is what is stripped, saved and packed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import compressor
from compressor.api import job_of
from compressor.api.clustering import (
    CentroidInitialization,
    ClusteringConfig,
    cluster_weights,
    cluster_weights_,
    strip_clustering,
)
from compressor.api.quantization import (
    DefaultNBitQuantizeScheme,
    quantize_annotate_layer,
    quantize_annotate_model,
    quantize_apply,
    quantize_model,
)
from compressor.api.sparsity import (
    ConstantSparsity,
    PolynomialDecay,
    UpdatePruningStep,
    prune_low_magnitude,
    strip_pruning,
)
from compressor.codebooks import optimal_codebook
from compressor.formats.errors import CompressorError, PolicyError, UsageError


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))


def sparse_net() -> nn.Sequential:
    model = net()
    with torch.no_grad():
        for weight in weights(model):
            weight *= torch.rand_like(weight) > 0.5
    return model


def images() -> Tensor:
    return torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, steps: int = 5) -> None:
    """A plain loop, which knows nothing of what the model is wrapped in."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(images()), torch.arange(8) % 4).backward()
        optimizer.step()
    model.eval()


def weights(model: nn.Module) -> list[Tensor]:
    return [module.weight.detach() for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


CLUSTERINGS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "tensor": lambda model: cluster_weights(model, 8),
    "channel": lambda model: cluster_weights(model, 8, cluster_per_channel=True),
    "sparse": lambda model: cluster_weights(model, 8, preserve_sparsity=True),
    "sparse channel": lambda model: cluster_weights(model, 8, preserve_sparsity=True, cluster_per_channel=True),
    "quantized": quantize_model,
}


@pytest.mark.parametrize("kind", CLUSTERINGS)
def test_what_trained_is_what_is_stripped_and_packed(kind: str, tmp_path: Path) -> None:
    given_model = sparse_net()
    before = copy.deepcopy(given_model.state_dict())
    wrapped = CLUSTERINGS[kind](given_model)
    first = [weight.clone() for weight in weights(wrapped)]
    train(wrapped)
    assert not any(torch.equal(now, then) for now, then in zip(weights(wrapped), first, strict=True)), "it trains"
    assert all(torch.equal(value, before[name]) for name, value in given_model.state_dict().items())
    if kind != "quantized":
        stripped = strip_clustering(wrapped)
        assert torch.equal(stripped(images()), wrapped(images()))
        assert list(stripped.state_dict()) == list(before)
        assert [type(layer) for layer in stripped.modules()] == [type(layer) for layer in given_model.modules()]
    expected = wrapped(images())
    packed = job_of(wrapped).finish()
    assert torch.equal(wrapped(images()), expected)
    packed.save(tmp_path / "packed.safetensors")
    loaded = compressor.load(tmp_path / "packed.safetensors", model=net(5))
    assert torch.equal(loaded(images()), expected)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in CLUSTERINGS if kind != "quantized"])
def test_strips_after_a_plain_save_of_the_state_dict(kind: str, assign: bool, tmp_path: Path) -> None:
    trained = CLUSTERINGS[kind](sparse_net())
    train(trained)
    torch.save(trained.state_dict(), tmp_path / "model.pt")
    fresh = CLUSTERINGS[kind](net(seed=7))  # other weights, none of them zero
    state = torch.load(tmp_path / "model.pt", weights_only=True)  # noqa: TID251  (as a user would)
    fresh.load_state_dict(state, assign=assign)
    stripped = strip_clustering(fresh).eval()
    assert torch.equal(stripped(images()), trained(images()))


def test_no_more_values_than_clusters() -> None:
    whole, channels = (cluster_weights(net(), 5, cluster_per_channel=per_channel) for per_channel in (False, True))
    for model in (whole, channels):
        train(model)
    assert [len(weight.unique()) for weight in weights(strip_clustering(whole))] == [5, 5]
    for weight in weights(strip_clustering(channels)):
        assert all(len(channel.unique()) <= 5 for channel in weight)
        assert len(weight.unique()) > 5


def test_zeros_are_kept_where_asked() -> None:
    kept, free = (cluster_weights(sparse_net(), 4, preserve_sparsity=preserve) for preserve in (True, False))
    for model in (kept, free):
        train(model)
    zeros = [weight == 0 for weight in weights(sparse_net())]
    for zero, here, there in zip(zeros, weights(strip_clustering(kept)), weights(strip_clustering(free)), strict=True):
        assert (here[zero] == 0).all()
        assert len(here.unique()) <= 4, "zero is one of the clusters"
        assert not (there[zero] == 0).all()


@pytest.mark.parametrize(
    ("start", "init"),
    [(CentroidInitialization.LINEAR, "linear"), (CentroidInitialization.DENSITY_BASED, "density"),
     (CentroidInitialization.KMEANS_PLUS_PLUS, "optimal"), ("LINEAR", "linear")],
)  # fmt: skip
def test_starts_are_those_of_the_engine(start: CentroidInitialization, init: Any) -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(3)) ** 3
    layer = nn.Linear(80, 50, bias=False)
    with torch.no_grad():
        layer.weight.copy_(values.view(50, 80))
    found = cluster_weights(layer, 6, start).weight
    assert isinstance(found, Tensor)
    assert found.unique().tolist() == optimal_codebook(values.numpy(), 6, init=init).tolist()


def test_patterns_cluster_in_place() -> None:
    model = net()
    dense = weights(model)[1].clone()
    cluster_weights_(model, {r"0": ClusteringConfig(4), r".*\.weight": ClusteringConfig(9, cluster_per_channel=True)})
    assert len(weights(model)[0].unique()) == 4
    assert [len(channel.unique()) for channel in weights(model)[1]] == [9] * 4
    assert not torch.equal(weights(model)[1], dense)
    train(model)
    assert torch.equal(strip_clustering(model)(images()), model(images()))


def test_layers_may_be_wrapped_alone() -> None:
    model = net()
    model[4] = cluster_weights(model.get_submodule("4"), 4)
    train(model)
    stripped = strip_clustering(model)
    assert torch.equal(stripped(images()), model(images()))
    assert [len(weight.unique()) > 4 for weight in weights(stripped)] == [True, False]
    with pytest.raises(UsageError, match="not wrapped itself, but 4 in it"):
        job_of(model)


def reference_sparsity(schedule: PolynomialDecay, steps: int) -> list[float]:
    """The share of zeros before each step, as TFMOT's schedule says it: level and turn."""
    shares, share = [], 0.0
    for step in range(steps):
        begin, end = schedule.begin_step, schedule.end_step
        done = min(1.0, max(0.0, (step - begin) / (end - begin)))
        level = (schedule.initial_sparsity - schedule.final_sparsity) * (1 - done) ** schedule.power
        # On purpose there is one more turn at the end, or a frequency that does not divide misses the final sparsity.
        if begin <= step <= end and ((step - begin) % schedule.frequency == 0 or step == end):
            share = level + schedule.final_sparsity
        shares.append(share)
    return shares


@settings(max_examples=40, deadline=None)
@given(
    begin=st.integers(0, 30), length=st.integers(1, 60), power=st.sampled_from([1, 2, 3, 4]),
    frequency=st.integers(1, 100), initial=st.floats(0, 0.5), final=st.floats(0.5, 0.95),
)  # fmt: skip
def test_the_polynomial_is_tfmots_step_by_step(
    begin: int, length: int, power: int, frequency: int, initial: float, final: float
) -> None:
    schedule = PolynomialDecay(initial, final, begin, begin + length, power, frequency)
    pruned = prune_low_magnitude(nn.Linear(40, 25, bias=False), schedule)
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.0)
    callback = UpdatePruningStep(pruned, optimizer)
    shares = []
    for _ in range(begin + length + 3):
        shares.append(float((weights(pruned)[0] == 0).float().mean()))
        optimizer.step()
    assert callback.step == begin + length + 3
    assert shares == pytest.approx(reference_sparsity(schedule, begin + length + 3), abs=0.00051), "of 1,000 weights"


@pytest.mark.parametrize("begin", [0, 4])
def test_constant_sparsity_prunes_the_smallest_from_a_step_on(begin: int) -> None:
    pruned = prune_low_magnitude(net(), ConstantSparsity(0.75, begin_step=begin))
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.01)
    UpdatePruningStep(pruned, optimizer)
    train(pruned, optimizer, begin)
    dense, now = weights(net()), weights(pruned)
    for before, after in zip(dense, now, strict=True):
        assert int((after == 0).sum()) == round(0.75 * after.numel())
        if begin == 0:
            assert before[after == 0].abs().max() <= before[after != 0].abs().min()


def test_pruned_weights_stay_pruned_and_strip_to_zeros(tmp_path: Path) -> None:
    def wrapped(seed: int) -> nn.Module:
        return prune_low_magnitude(net(seed), PolynomialDecay(0.2, 0.8, begin_step=2, end_step=10, frequency=1))

    pruned = wrapped(0)
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=0.01, weight_decay=0.1)
    UpdatePruningStep(pruned, optimizer)
    train(pruned, optimizer, 6)
    with pytest.raises(UsageError, match=r"0\.weight: .* pruned, not yet 80\.0%: train up to step 10 with Update"):
        strip_pruning(pruned)
    half_way = [weight == 0 for weight in weights(pruned)]
    train(pruned, optimizer, 6)
    stripped = strip_pruning(pruned)
    for zero, weight in zip(half_way, weights(stripped), strict=True):
        assert (weight[zero] == 0).all()
        assert int((weight == 0).sum()) == round(0.8 * weight.numel())
    assert torch.equal(stripped(images()), pruned(images()))
    torch.save(pruned.state_dict(), tmp_path / "model.pt")
    fresh = wrapped(9)
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))  # noqa: TID251  (as a user would)
    assert torch.equal(strip_pruning(fresh).eval()(images()), pruned(images()))


def test_only_annotated_layers_are_quantized() -> None:
    model = net()
    model[4] = quantize_annotate_layer(model[4], DefaultNBitQuantizeScheme(num_bits_weight=2))
    quantized = quantize_apply(model)
    dense, rounded = weights(model), weights(quantized)
    assert torch.equal(rounded[0], dense[0])
    assert len(rounded[1].unique()) <= 4 * 2, "four values for each of two runs of 256 weights"
    both = quantize_apply(quantize_annotate_model(model), DefaultNBitQuantizeScheme(num_bits_weight=4))
    assert 4 < len(weights(both)[0].unique()) <= 16
    assert torch.equal(weights(both)[1], rounded[1]), "a mark set before stands"
    train(both)
    expected = both(images())
    job_of(both).finish()
    assert torch.equal(both(images()), expected)
    assert not any("quantize" in name for layer in both.modules() for name in vars(layer))


def test_a_mark_within_a_mark_counts() -> None:
    inner = quantize_annotate_layer(nn.Linear(16, 16), DefaultNBitQuantizeScheme(1))
    quantized = quantize_apply(quantize_annotate_layer(nn.Sequential(inner, nn.Linear(16, 16))))
    first, second = (len(weight.unique()) for weight in weights(quantized))
    assert first == 2
    assert second > 100


def test_timm_models_are_packed_with_their_arguments(tmp_path: Path) -> None:
    import timm

    args: dict[str, Any] = {"num_classes": 10, "in_chans": 1}
    clustered = cluster_weights(timm.create_model("test_resnet", **args), 4)
    job = job_of(clustered)
    job.model_args = args
    job.finish().save(tmp_path / "packed.safetensors")
    loaded, x = compressor.load(tmp_path / "packed.safetensors"), torch.randn(1, 1, 32, 32)
    assert torch.equal(loaded(x), clustered.eval()(x))


FAULTS: dict[str, tuple[Callable[[], Any], type[CompressorError], str]] = {
    "clusters": (lambda: cluster_weights(net(), 0), UsageError, "number_of_clusters must be .* got 0"),
    "truth": (lambda: cluster_weights(net(), True), UsageError, "number_of_clusters must be .* got True"),
    "random": (lambda: cluster_weights(net(), 4, CentroidInitialization.RANDOM), UsageError, "RANDOM is not offered"),
    "start": (lambda: cluster_weights(net(), 4, "LINEARR"), UsageError, "got 'LINEARR'. Did you mean 'LINEAR'"),
    "list": (lambda: cluster_weights([nn.Linear(9, 9)], 4), UsageError, "got list"),  # type: ignore[arg-type]
    "nothing": (lambda: cluster_weights(nn.ReLU(), 4), PolicyError, "nothing to share"),
    "twice": (lambda: cluster_weights(cluster_weights(net(), 4), 4), UsageError, "the model is wrapped by cluster_"),
    "pattern": (lambda: cluster_weights_(net(), {"conv.*": ClusteringConfig()}), PolicyError, "matches no tensor"),
    "regex": (lambda: cluster_weights_(net(), {"(": ClusteringConfig()}), PolicyError, "not a regular expression"),
    "mixed": (lambda: cluster_weights_(net(), {"0": ClusteringConfig(), "4": ClusteringConfig(preserve_sparsity=True)}),
              UsageError, "preserve_sparsity must be the same"),
    "no patterns": (lambda: cluster_weights_(net(), {}), PolicyError, "at least one rule"),
    "strip": (lambda: strip_clustering(net()), UsageError, "not wrapped by cluster_weights: it is an ordinary module"),
    "strip other": (lambda: strip_pruning(cluster_weights(net(), 4)), UsageError, "it is wrapped by cluster_weights"),
    "job": (lambda: job_of(net()), UsageError, "not wrapped itself, or has been stripped"),
    "target": (lambda: ConstantSparsity(1.0, 0), UsageError, "target_sparsity must be .* got 1.0"),
    "begin": (lambda: ConstantSparsity(0.5, -1), UsageError, "begin_step must be .* got -1"),
    "final": (lambda: PolynomialDecay(0, -0.1, 0, 9), UsageError, "final_sparsity must be"),
    "end": (lambda: PolynomialDecay(0, 0.5, 10, 9), UsageError, "end_step must be .* at least 10, got 9"),
    "forever": (lambda: PolynomialDecay(0, 0.5, 0, -1), UsageError, "end_step must be .* got -1"),
    "power": (lambda: PolynomialDecay(0, 0.5, 0, 9, power=0), UsageError, "power must be"),
    "frequency": (lambda: PolynomialDecay(0, 0.5, 0, 9, frequency=0), UsageError, "frequency must be"),
    "schedule": (lambda: prune_low_magnitude(net(), 0.5), UsageError, "must be ConstantSparsity .* got 0.5"),  # type: ignore[arg-type]
    "callback": (lambda: UpdatePruningStep(net(), torch.optim.SGD(net().parameters())), UsageError, "by prune_low"),
    "falling": (lambda: PolynomialDecay(0.6, 0.5, 0, 9), UsageError, "initial_sparsity 0.6 is above final"),
    "bits": (lambda: DefaultNBitQuantizeScheme(17), UsageError, "num_bits_weight must be .* got 17"),
    "unmarked": (lambda: quantize_apply(net()), UsageError, "no layer is marked"),
    "marked": (lambda: quantize_apply(quantize_annotate_layer(nn.ReLU())), PolicyError, "nothing to share"),
    "no layer": (lambda: quantize_annotate_layer("fc"), UsageError, "got str"),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_one_clear_line(fault: str) -> None:
    call, kind, message = FAULTS[fault]
    with pytest.raises(kind, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", CLUSTERINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_wrapped_model_may_be_moved_to_another_dtype(kind: str, dtype: torch.dtype) -> None:
    wrapped = CLUSTERINGS[kind](sparse_net()).to(dtype)
    moved = [weight.clone() for weight in weights(wrapped)]
    job_of(wrapped).finish()
    assert all(torch.equal(now, then) for now, then in zip(weights(wrapped), moved, strict=True))
