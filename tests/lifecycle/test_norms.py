"""Norms in few bytes: statistics folded, scale, shift and biases on grids, and what can not be folded refused."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import compressor
from compressor import Compressor, Policy, Rule
from compressor.formats.content import Content, Grid, decode
from compressor.formats.errors import UsageError
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack
from compressor.lifecycle.convert import set_state
from compressor.lifecycle.norms import FoldedNorms, check_foldable, fold_norms, minor_tensors, norm_inputs
from tests.helpers.norms import images, network, trained_norms

LEARNT = Policy([Rule("*", scheme="learnt", rate=1e-6)])


def plans(model: nn.Module, policy: Policy = LEARNT) -> Any:
    return policy.plan(model)


def folded_only(model: nn.Module) -> FoldedNorms:
    """Folds with steps so fine that rounding does not show: what is left is the folding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.lifecycle.norms.SPREAD_STEPS", 2.0**13)
        return fold_norms(model, plans(model))


@pytest.mark.parametrize("name", ["network", "test_resnet", "test_efficientnet", "mobilenetv3_small_050", "test_vit"])
def test_logits_stay_as_they_were_within_rounding(name: str) -> None:
    model: Any = network() if name == "network" else trained_norms(timm.create_model(name, num_classes=10))
    batch = images(4) if name == "network" else torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        before = model(batch)
        set_state(model, folded_only(model).values)
        after = model(batch)
    assert float((after - before).abs().max()) < 2e-3 * float(before.abs().max())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            assert not module.running_mean.any()
            assert bool((module.running_var == 1).all())
            assert int(module.num_batches_tracked or 0) == 0


def test_folding_is_exact_in_float64() -> None:
    """Twice the formula of BatchNorm, by hand."""
    norm = nn.BatchNorm1d(64, eps=1e-3)
    trained_norms(nn.Sequential(norm))
    inputs = torch.randn(100, 64)
    mean, var = norm.state_dict()["running_mean"], norm.state_dict()["running_var"]
    expected = (inputs - mean) / (var + 1e-3).sqrt() * norm.weight + norm.bias
    model = nn.Sequential(norm, nn.Linear(64, 2, bias=False)).eval()
    set_state(model, folded_only(model).values)
    assert float((norm(inputs) - expected).detach().abs().max()) < 2e-3


def test_the_model_is_not_changed() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    fold_norms(model, plans(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_values_are_those_that_a_file_decodes_to() -> None:
    model = network()
    norms = fold_norms(model, plans(model))
    with PackedFile.from_bytes(pack(Content(norms.tensors, tuple(norms.books)))) as file:
        for name in file.slices:
            assert torch.equal(torch.from_numpy(file.tensor(name)), norms.values[name])
            assert norms.values[name].count_nonzero()


def test_steps_are_powers_of_two_of_about_the_spread() -> None:
    model = network()
    norms = fold_norms(model, plans(model))
    singles = {name: norms.books[tensor.book] for name, tensor in norms.tensors.items() if " " not in name}
    assert singles
    for name, book in singles.items():
        assert isinstance(book, Grid)
        assert torch.tensor(book.step).log2().frac() == 0
        spread = float(norms.values[name].std(correction=0))
        assert spread / 64 / 1.5 < book.step < spread / 64 * 1.5


def test_a_price_makes_steps_coarser_and_costs_bits() -> None:
    """With images; norms that errors cost much of get finer steps."""
    sizes = []
    for rate in (1e-9, 1e-6, 1.0):
        job = Compressor(network(), Policy([Rule("*", scheme="learnt", rate=rate)]), teacher=None)
        job.prepare(calibration=images())
        norms = fold_norms(job.model, job.plans, rate, job._measured)
        sizes.append(len(pack(Content(norms.tensors, tuple(norms.books)))))
        used = [len(value.unique()) for name, value in norms.values.items() if name in ("4.weight", "4.bias", "3.bias")]
        assert min(used) >= 4  # no price takes all that a norm says
    assert sizes[0] > sizes[1] > sizes[2]


def test_images_without_a_price_make_no_steps_finer() -> None:
    job = Compressor(network(), Policy([Rule("*", scheme="learnt", bits=4)]), teacher=None)
    content = job.prepare(calibration=images()).finish(fold_norms=True).content
    grids = [content.books[site.book] for site in content.sites.values()]
    assert max(grid.count for grid in grids if isinstance(grid, Grid)) < 1_000


def test_no_price_asks_for_more_values_than_a_grid_may_have() -> None:
    model = network()
    with torch.no_grad():  # values of both signs, of which no two are near
        model.state_dict()["3.bias"][:], model.state_dict()["8.bias"][:] = (
            torch.linspace(-1, 1, 32),
            -torch.arange(32.0),
        )
    policy = Policy([Rule("*", scheme="learnt", rate=1e-30)])
    job = Compressor(model, policy, copy=False, teacher=None).prepare(calibration=images())
    norms = fold_norms(model, job.plans, 1e-30, job._measured)
    assert max(book.shape[1] for book in norms.books) in range(20_000, 65_537)
    assert len(pack(Content(norms.tensors, tuple(norms.books))))


def test_curvature_is_the_mean_squared_gradient_of_the_same_draws() -> None:
    """Against one image after the other."""
    from compressor.calibration.calibrator import Calibrator, _sampled_loss

    model = network()
    sites = [plan.site for plan in plans(model) if plan.scheme]
    dense = {site.name: site.tensor.detach().clone() for site in sites}
    measured = Calibrator(model, sites, images(256), dense, minor=minor_tensors(model, plans(model)))
    assert set(measured.importance) == {n for n, p in model.named_parameters() if p.ndim == 1}
    total, generator = torch.zeros(10), torch.Generator().manual_seed(7)
    for image in images(256):
        model.zero_grad()
        _sampled_loss(model(image[None]), generator).backward()
        total += model[9].bias.grad.square() / 256
    assert torch.allclose(measured.importance["9.bias"].mean(), total.mean(), rtol=0.2)


@pytest.mark.parametrize("calibrated", [False, True])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, calibrated: bool) -> None:
    model = trained_norms(timm.create_model("test_resnet", num_classes=10, in_chans=3))
    job = Compressor(model, LEARNT, model_args={"num_classes": 10, "in_chans": 3}, teacher=None)
    job.prepare(calibration=torch.randn(16, 3, 32, 32) if calibrated else None)
    packed = job.finish(fold_norms=True)
    packed.save(tmp_path / "a.safetensors")
    for weights in ("dense", "packed"):
        loaded = compressor.load(tmp_path / "a.safetensors", weights=weights)
        batch = torch.randn(2, 3, 32, 32)
        assert torch.equal(loaded(batch), job.model.eval()(batch))
    loaded = compressor.load(tmp_path / "a.safetensors")
    assert {n: t.tolist() for n, t in loaded.state_dict().items()} == {
        n: t.tolist() for n, t in job.model.state_dict().items()
    }
    report = packed.report()
    assert report.totals.untouched == 0
    assert report.totals.file == (tmp_path / "a.safetensors").stat().st_size
    assert sum(row.indices for row in report.rows) == report.totals.indices
    minor = [row for row in report.rows if not row.scheme]
    assert sum(row.weights for row in minor) == sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert report.rows[-len(minor) :] == minor


def test_folding_makes_the_file_smaller_than_halving() -> None:
    sizes = {}
    for fold in (False, True):
        model = trained_norms(timm.create_model("test_resnet", num_classes=10))
        job = Compressor(model, LEARNT, teacher=None).prepare()
        sizes[fold] = len(job.finish(half_untouched=True, fold_norms=fold).to_bytes())
    assert sizes[True] < sizes[False] - 3_000


def test_it_is_done_where_a_price_is_searched_for_and_not_else() -> None:
    targets: list[tuple[dict[str, Any], bool | None, bool]] = [
        ({"target_bits": 6.0}, None, True), ({"rate": 1e-6}, None, False), ({"target_bits": 6.0}, False, False)
    ]  # fmt: skip
    for target, options, expected in targets:
        job = Compressor(network(), None, teacher=None, **target)
        job.prepare(calibration=images())
        job.finish(fold_norms=options)
        assert (not job.model.state_dict()["1.running_mean"].any()) is expected


def test_the_size_that_is_searched_for_counts_it() -> None:
    job = Compressor(network(), None, teacher=None, target_size=3_600)
    job.prepare(calibration=images())
    assert job.search is not None
    assert (
        abs(len(job.finish().to_bytes()) - job.search.size) <= 40
    )  # the margin, and digits of the prediction that is noted
    assert job.search.size <= 3_600


# -- what is not folded


def test_a_norm_without_affine_parameters_is_refused_by_name_and_before_anything_is_changed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, affine=False), nn.Flatten(), nn.Linear(1600, 4))
    job = Compressor(trained_norms(model), LEARNT, teacher=None).prepare()
    fault = r"fold_norms: 1 \(BatchNorm2d\) has no scale and shift to fold its statistics into \(affine=False\)"
    with pytest.raises(UsageError, match=fault):
        job.finish(fold_norms=True)
    assert job.groups
    job.finish()


class OwnNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's word)
        return super().forward(input) * self.running_mean.sum()  # type: ignore[union-attr]


def test_what_cannot_be_folded_keeps_its_statistics() -> None:
    """By default; asked for, it is refused."""
    tied = nn.Sequential(nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1))
    tied[1].weight = tied[0].weight
    named = Policy([Rule("1.weight", scheme="kmeans", bits=2), Rule("*", scheme="kmeans", bits=4)])
    cases: list[tuple[nn.Module, Policy, str]] = [
        (nn.Sequential(nn.Conv2d(3, 16, 1), OwnNorm(16)), LEARNT, "computes in a way of its own"),
        (tied, LEARNT, "has a scale that is tied to another's"),
        (nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)), named, "has a scale or shift that a rule shares"),
        (nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16).double()), LEARNT, "has parameters of torch.float64"),
    ]
    for model, policy, fault in cases:
        trained_norms(model)
        decided = policy.plan(model)
        with pytest.raises(UsageError, match=fault):
            check_foldable(model, [plan.site.name for plan in decided if plan.scheme])
        assert not any("running" in name for name in fold_norms(model, decided).values)


def test_norms_without_statistics_are_no_fault() -> None:
    model = trained_norms(nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16, track_running_stats=False)))
    check_foldable(model, [])
    assert set(fold_norms(model, plans(model)).values) == {"0.bias", "1.weight", "1.bias"}


def test_tensors_that_a_rule_ignores_stay_as_they_are() -> None:
    model = network()
    policy = Policy([Rule.ignore("3.bias"), Rule.ignore("4.weight"), Rule("*", scheme="kmeans", bits=4)])
    values = fold_norms(model, plans(model, policy)).values
    assert "3.bias" not in values
    assert "4.weight" not in values
    assert "4.running_mean" not in values
    assert "1.weight" in values


def test_short_constant_and_infinite_tensors_are_not_put_on_grids() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.LayerNorm(16), nn.Conv2d(16, 7, 1), nn.LayerNorm(32), nn.LayerNorm(16)
    )
    with torch.no_grad():
        model.state_dict()["3.weight"][5], model.state_dict()["3.bias"][1] = float("inf"), 1.0
    names = set(fold_norms(model, plans(model)).tensors)
    assert names == {"0.bias", "3.bias"}


# -- channels that say nothing


def test_channels_that_are_always_zero_need_no_scale() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[[2, 5]] = 0
    assert norm_inputs(model, images(1)) == {"1": model[0], "4": model[3]}
    job = Compressor(model, Policy([Rule("*", scheme="learnt", rate=1e-9)]), teacher=None, copy=False)
    job.prepare(calibration=images())
    with torch.no_grad():
        before = model[1](model[0](images()))[:, [2, 5]]
    values = fold_norms(job.model, job.plans, 1e-9, job._measured).values
    assert values["1.weight"][[2, 5]].tolist() == [0, 0]
    assert values["1.weight"].count_nonzero() >= 12  # some may say nothing by chance
    step = float(values["1.bias"].abs().unique()[1])
    assert float((values["1.bias"][[2, 5]] - before[0, :, 0, 0]).abs().max()) <= step / 2 + 1e-6


def test_a_norm_that_does_not_follow_its_convolution_has_no_such_channels() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)

        def forward(self, inputs: Tensor) -> Tensor:
            out: Tensor = self.norm(self.conv(inputs) + 1)
            return out

    assert norm_inputs(Shifted().eval(), images(1)) == {}
    twice = nn.BatchNorm2d(3)
    both = nn.Sequential(nn.Conv2d(3, 3, 1), twice, nn.Conv2d(3, 3, 1), twice)
    assert norm_inputs(both, images(1)) == {}


@pytest.mark.parametrize("inference", [False, True])
def test_a_shortcut_that_is_added_in_place_feeds_the_channels_whose_weights_are_zero(inference: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1, bias=False)
            self.norm, self.head = nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            shortcut = self.stem(inputs)
            out: Tensor = self.conv(shortcut)
            out += shortcut
            out = self.head(self.norm(out))
            return out.mean(dim=(2, 3))

    model: Any = trained_norms(Block())
    with torch.no_grad():
        model.conv.weight[4:] = 0
    job = Compressor(model, Policy([Rule("*", scheme="learnt", rate=1e-12)]), teacher=None)
    job.prepare(calibration=images())
    with torch.inference_mode(inference):
        job.finish(fold_norms=True)
    assert job.model.state_dict()["norm.weight"].count_nonzero() >= 12
    with torch.no_grad():
        before, after = model(images()), job.model(images())
    assert float((after - before).norm() / before.norm()) < 0.05


def test_what_was_measured_on_another_device_folds_a_model_that_was_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from CPU to GPU: operators refuse tensors of ``meta`` and of the CPU together, too."""
    monkeypatch.setattr("compressor.lifecycle.norms._on_grid", lambda *_: None)  # it moves all to the CPU
    importance = {"0.bias": torch.ones(16), "1.weight": torch.ones(16), "1.bias": torch.ones(16)}
    measured: Any = SimpleNamespace(calibrator=SimpleNamespace(importance=importance, batches=(images(2),)))
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)).eval().to("meta")
    assert fold_norms(model, [], 1e-6, measured).values["1.weight"].device.type == "meta"


def test_dead_channels_do_not_widen_the_grid() -> None:
    """Their variance is 0, so that folding multiplies their scale by hundreds."""
    model = network()
    with torch.no_grad():
        model[1].running_var[3] = 0
    norms = fold_norms(model, plans(model))
    assert float(norms.values["1.weight"][3]) == 0
    assert float(norms.values["1.weight"].abs().max()) < 20


# -- stacks


def test_tensors_of_one_shape_are_stacked_where_that_is_smaller() -> None:
    """Many alike are; two of other scales are not."""
    torch.manual_seed(0)
    alike = nn.ModuleList(nn.LayerNorm(16) for _ in range(30))
    model = nn.Sequential(alike, nn.Linear(16, 4, bias=False))
    with torch.no_grad():
        for norm in alike:
            norm.state_dict()["weight"].normal_()
    norms = fold_norms(model, plans(model))
    ((name, stack),) = norms.tensors.items()
    assert name.split(" ") == [f"0.{number}.weight" for number in range(30)]
    assert stack.shape == (30, 16)
    weights = torch.from_numpy(decode(stack, norms.books[0]))
    assert all(torch.equal(weights[place], norms.values[f"0.{place}.weight"]) for place in range(30))
