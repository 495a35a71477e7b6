"""Whole compressions without training: targets and calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import compressor
from compressor import Compressor, Policy, Rule
from compressor.formats.content import Grid
from compressor.formats.errors import PolicyError, UsageError
from compressor.formats.file.deflate import deflate
from compressor.formats.file.reader import PackedFile
from compressor.lifecycle.packed import Packed
from tests.helpers.tiny import tiny

LEARNT = Policy([Rule("*", scheme="learnt")])


def network() -> Any:
    """Returns a network of 12,000 weights of many scales, with BatchNorm."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 40),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.mul_(torch.randn(len(parameter), *[1] * (parameter.ndim - 1)).exp())
    return net


def images(count: int = 48) -> Tensor:
    """Returns smooth images, whose pixels depend on each other as those of photographs do."""
    noise = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(noise, size=(12, 12), mode="bilinear")


def labelled(model: nn.Module, count: int = 256) -> list[tuple[Tensor, Tensor]]:
    """Returns batches with the answers of a model as labels: its own top-1 is 1."""
    inputs = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return [(part, model(part).argmax(1)) for part in inputs.split(64)]


def job_of(policy: Policy | None = None, **target: Any) -> Compressor:
    return Compressor(network(), policy, teacher=None, **target)


def weight(job: Compressor, layer: str = "") -> Tensor:
    """Returns what a layer computes with."""
    module: Any = job.model.get_submodule(layer)
    tensor: Tensor = module.weight
    return tensor.detach()


def saved(job: Compressor, folder: Path, **options: Any) -> tuple[int, dict[str, Any]]:
    """Returns the size of the file, and its provenance; loaded, it is the model of the job bit for bit."""
    path = folder / "model.safetensors"
    size = job.finish(**options).save(path)
    assert size == path.stat().st_size
    loaded = compressor.load(path, model=network()).state_dict()
    assert loaded.keys() == job.model.state_dict().keys()
    for name, tensor in job.model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
    with PackedFile.open(path) as file:
        return size, dict(file.content().provenance)


@pytest.mark.parametrize("target", [6000, 10_000])
@pytest.mark.parametrize("calibrated", [True, False])
def test_the_file_has_the_size_asked_for(target: int, calibrated: bool, tmp_path: Path) -> None:
    job = job_of(target_size=target)
    job.prepare(images() if calibrated else None)
    assert job.search is not None
    expected = job.search
    size, provenance = saved(job, tmp_path)
    assert 0.98 * target <= size <= target
    assert 0 <= expected.size - size <= 28  # the margin for facts that were not known yet, and their digits
    assert expected.passes <= 6
    assert provenance["target"] == {"rate": expected.rate, "predicted": expected.predicted}
    assert provenance.get("calibration") == ({"images": 48, "source": "data"} if calibrated else None)


def test_a_timm_model_is_compressed_to_a_size_and_built_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    job = Compressor(timm.create_model(tiny.__name__), target_size=3000, teacher=None)
    inputs = torch.randn(48, 1, 28, 28)
    size = job.prepare(inputs).finish().save(tmp_path / "model.safetensors")
    assert 2940 <= size <= 3000
    loaded = compressor.load(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(inputs), job.model.eval()(inputs))


def test_bits_are_those_of_the_file_for_each_shared_weight(tmp_path: Path) -> None:
    job = job_of(target_bits=5.0)
    weights = sum(site.tensor.numel() for site in job.sites)
    size, _ = saved(job.prepare(images()), tmp_path)
    assert 4.9 <= 8 * size / weights <= 5.0


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_pruned_weights_that_others_make_up_for_leave_a_grid_that_a_file_can_hold(sparsity: float) -> None:
    policy = Policy([Rule("*", scheme="learnt", sparsity=sparsity, rate=1e-16)])
    model = nn.Sequential(nn.Linear(64, 192), nn.ReLU(), nn.Linear(192, 4))
    job = Compressor(model, policy, teacher=None).prepare(torch.randn(64, 64))
    assert max(group.codeword_count for group in job.groups) <= 65_536
    master = [group.master_weight(group.sites[0]).detach().clone() for group in job.groups]
    pruned = [group.pruned(group.sites[0]).clone() for group in job.groups]
    assert job.finish().to_bytes()
    for layer, before, zero in zip(("0", "2"), master, pruned, strict=True):
        expected = before.masked_fill(zero, 0)
        assert float((weight(job, layer) - expected).abs().max()) < 3e-5 * float(expected.abs().max())


def test_label_names_are_deflated_once_in_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[bytes] = []

    def noted(text: bytes) -> bytes:
        texts.append(text)
        return deflate(text)

    monkeypatch.setattr("compressor.formats.file.opening.deflate", noted)
    model = network()
    model.num_classes, model.pretrained_cfg = 40, {"label_names": [f"kind {number}" for number in range(40)]}
    job = Compressor(model, target_size=6_500, teacher=None).prepare()
    with_names = [text for text in texts if b"kind 17" in text]
    assert len(with_names) == 1 < len(texts)
    packed = job.finish()
    assert 0.98 * 6_500 <= len(packed.to_bytes()) <= 6_500
    assert b"kind 17" in texts[-1]


def test_what_is_left_out_of_the_file_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    model.pretrained_cfg = {"crop_pct": 1e308}
    Compressor(model, target_size=6_500, teacher=None).prepare().finish()
    assert [message.partition(" of ")[0] for message in caplog.messages] == ["crop_pct"]


def test_a_job_begins_anew_after_undo_and_not_after_finish() -> None:
    job = job_of(LEARNT).prepare()
    job.steps = 60
    job.undo()
    assert job.prepare().steps == 0
    job.finish()
    with pytest.raises(UsageError, match=r"^prepare\(\) has been called: the model is shared already; make a new"):
        job.prepare()


def test_a_policy_may_say_which_tensors_have_a_price(tmp_path: Path) -> None:
    policy = Policy([Rule("9", scheme="kmeans", codewords=8), Rule("0", scheme="dense"), Rule("*", scheme="learnt")])
    job = job_of(policy, target_size=7000).prepare(images())
    assert job.search is not None
    size, _ = saved(job, tmp_path)
    assert 0.98 * 7000 <= size <= 7000
    assert len(weight(job, "9").unique()) == 8
    with torch.no_grad():  # the first layer is not shared, but halved
        assert torch.equal(weight(job, "0"), network()[0].weight.half().float())


def test_tensors_of_other_schemes_are_not_finished_by_the_search() -> None:
    policy = Policy([Rule("3", scheme="inq", bits=4), Rule("*", scheme="learnt")])
    job = job_of(policy, target_size=9000).prepare(images())
    (group,) = [group for group in job.groups if group.scheme.id == "inq"]
    assert int(group.indices(group.sites[0]).max()) == -1  # all are free yet


def test_a_pruned_tensor_keeps_the_zeros_that_are_due() -> None:
    policy = Policy([Rule("*", scheme="learnt", sparsity=0.5)])
    job = job_of(policy, target_size=6000).prepare(images())
    size = len(job.finish().to_bytes())
    assert size <= 6000
    for number in (0, 3, 5, 9):
        assert float((weight(job, str(number)) == 0).float().mean()) >= 0.499


def test_a_rate_alone_is_one_pass(tmp_path: Path) -> None:
    job = job_of(rate=1e-5).prepare(images())
    assert job.search is not None
    assert (job.search.rate, job.search.predicted, job.search.passes) == (1e-5, None, 1)
    size, provenance = saved(job, tmp_path)
    assert provenance["target"] == {"rate": 1e-5, "predicted": None}
    assert abs(job.search.size - size) <= 16
    rule = job_of(Policy([Rule("*", scheme="learnt", rate=1e-5)])).prepare(images())
    rule.finish()
    for name, tensor in job.model.state_dict().items():
        assert torch.equal(tensor, rule.model.state_dict()[name])


def test_the_recipe_says_the_price_that_was_found() -> None:
    job = job_of(target_size=7000).prepare(images())
    assert job.search is not None
    recipe = job.finish().content.recipe
    assert recipe is not None
    assert recipe["stage"][0]["rule"][0]["rate"] == job.search.rate


def test_a_drop_is_kept_on_validation_batches() -> None:
    job = job_of(max_drop=5.0)
    val = labelled(job.model)
    job.prepare(images(), val=val)
    job.finish()
    with torch.no_grad():
        right = sum(int((job.model(inputs).argmax(1) == labels).sum()) for inputs, labels in val)
    assert 95 <= 100 * right / 256 < 100


def test_a_drop_needs_validation_batches_that_can_be_gone_through_again() -> None:
    job = job_of(max_drop=5.0)
    with pytest.raises(UsageError, match=r"^max_drop is measured on validation batches: prepare\(val=\.\.\.\)$"):
        job.prepare(images())
    with pytest.raises(UsageError, match=r"^val: batches that can be gone through only once; give a list or a DataLo"):
        job.prepare(images(), val=iter(labelled(job.model)))


def test_a_target_that_is_refused_leaves_the_model_dense() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    job = Compressor(model, teacher=None, copy=False, target_size=300)
    with pytest.raises(UsageError, match=r"^a target of 300 bytes cannot be reached: with all weights zero the file"):
        job.prepare(images())
    job = Compressor(model, teacher=None, copy=False, max_drop=1.0)
    wrong = [(inputs, labels) for inputs, labels in labelled(model, 64)]

    class Fails(list[Any]):
        calls = 0

        def __iter__(self) -> Any:
            self.calls += 1
            if self.calls > 1:
                raise UsageError("no more")
            return super().__iter__()

    with pytest.raises(UsageError, match="no more"):
        job.prepare(images(), val=Fails(wrong))
    assert job.groups == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("target", [{"rate": 1e-7}, {"target_size": 9000}, {"target_bits": 2.0}, {"max_drop": 1.0}])
def test_schemes_without_a_price_are_refused(target: dict[str, Any]) -> None:
    message = r"^a target needs a scheme with a price, such as learnt: kmeans, uniform has none$"
    with pytest.raises(PolicyError, match=message):
        job_of(Policy([Rule("0", scheme="uniform"), Rule("*", scheme="kmeans")]), **target)


def test_no_policy_and_no_target_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^policy: name the rules, or give rate, target_size, target_bits or max_dro"):
        job_of()
    with pytest.raises(
        UsageError, match=r"^policy: expected a Policy, got \[Rule\('\*', scheme='learnt'\)\]: write Policy"
    ):
        job_of([Rule("*", "learnt")])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^rate and target_size: ask for one$"):
        job_of(rate=1e-7, target_size=100)


def test_calibration_that_does_not_suit_is_refused_and_prepare_can_be_called_again() -> None:
    job = job_of(LEARNT)
    for wrong in (images(4), images()[:, :2], [{"x": images()}], "synthetic"):
        with pytest.raises(UsageError, match=r"^calibration"):
            job.prepare(wrong)
    job.prepare(images())
    with pytest.raises(UsageError, match=r"^prepare\(\) has been called"):
        job.prepare(images())


@pytest.mark.parametrize("scheme", ["learnt", "kmeans", "uniform", "inq", "fixed"])
def test_undo_gives_the_dense_weights_back(scheme: str) -> None:
    job = job_of(Policy([Rule("*", scheme=scheme)]), **({"rate": 1e-5} if scheme == "learnt" else {}))
    dense = network().state_dict()
    job.prepare(images())
    with torch.no_grad():
        assert not torch.equal(weight(job, "3"), dense["3.weight"])
    undone = job.undo().state_dict()
    assert all(torch.equal(tensor, dense[name]) for name, tensor in undone.items())


def test_synthetic_images_are_noted(tmp_path: Path) -> None:
    model = network()
    model.pretrained_cfg = {"input_size": (3, 12, 12)}
    _, provenance = saved(Compressor(model, rate=1e-6, teacher=None).prepare("synthetic"), tmp_path)
    assert provenance["calibration"] == {"images": 256, "source": "batch-norm statistics"}


def test_without_calibration_the_weights_are_rounded_to_nearest(tmp_path: Path) -> None:
    job = job_of(rate=1e-5).prepare()
    _, provenance = saved(job, tmp_path)
    assert "calibration" not in provenance
    step = (12 * 1e-5 / 0.6931471805599453) ** 0.5  # squared errors count as the loss
    dense = network()[9].weight.detach()
    torch.testing.assert_close(weight(job, "9"), (dense / step).round() * step)


@pytest.mark.parametrize("calibrated", [True, False])
def test_the_same_call_gives_the_same_bytes(calibrated: bool) -> None:
    files = [job_of(target_size=8000).prepare(images() if calibrated else None).finish().to_bytes() for _ in range(2)]
    assert files[0] == files[1]


def test_with_a_price_less_is_lost_in_as_many_bytes() -> None:
    losses = []
    inputs = images()
    with torch.no_grad():
        expected = network()(inputs).log_softmax(1)
    for calibration in (inputs, None):
        job = job_of(target_size=6000).prepare(calibration)
        assert len(job.finish().to_bytes()) <= 6000
        with torch.no_grad():
            answers = job.model(inputs).log_softmax(1)
        losses.append(float((expected.exp() * (expected - answers)).sum(1).mean()))
    assert losses[0] < losses[1] / 3


def books(packed: Packed) -> list[type]:
    return [type(book) for book in packed.content.books]


def test_a_grid_is_stored_as_one_after_training_too(tmp_path: Path) -> None:
    assert books(job_of(rate=1e-5).prepare(images()).finish()) == [Grid] * 4
    job = job_of(rate=1e-5).prepare(images())
    before = [
        group.weight(site, group.master_weight(site)).detach().clone() for group in job.groups for site in group.sites
    ]
    optimizer = torch.optim.SGD(job.param_groups(lr=1.0), lr=1.0)
    job.attach(optimizer, total_steps=1)
    inputs = images()
    job.loss(job.model(inputs), torch.arange(48) % 40).backward()
    optimizer.step()
    after = [group.weight(site, group.master_weight(site)).detach() for group in job.groups for site in group.sites]
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))
    packed = job.finish()
    assert books(packed) == [Grid] * 4
    packed.save(tmp_path / "model.safetensors")
    loaded = compressor.load(tmp_path / "model.safetensors", model=network())
    with torch.no_grad():
        assert torch.equal(loaded(inputs), job.model.eval()(inputs))


def test_frozen_tensors_are_compressed_too(tmp_path: Path) -> None:
    model = network()
    model[3].requires_grad_(False)
    job = Compressor(model, teacher=None, target_size=7000).prepare(images())
    size, _ = saved(job, tmp_path)
    assert 0.98 * 7000 <= size <= 7000
