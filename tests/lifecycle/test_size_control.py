"""Training to a size: how the price follows the predicted bytes, and that the file keeps to the target."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.compressor import Compressor
from compressor.formats.content import Grid
from compressor.lifecycle.size_control import SizeControl
from compressor.policy.policy import Policy, Rule
from compressor.sharing.code_length import BITS, STEPS_BETWEEN_COUNTS, CodeLength
from compressor.sharing.group import Group
from compressor.training.loop import Epoch
from tests.helpers.sums import batches, net

TARGET = 4_000


def job_of(**options: Any) -> Compressor:
    return Compressor(net(), **{"target_size": TARGET, "distill": 0.0, "teacher": None, **options})


def control_of(size: int, *, target: int = 1_000, measure: Callable[[], int] | None = None) -> SizeControl:
    job = Compressor(net(), Policy([Rule("*", scheme="learnt", rate=1e-4)]), teacher=None).prepare()
    for group in job.groups:
        CodeLength(group).reprice(1e-4, 0.0)
    return SizeControl(job.groups, target, size, lambda: size, measure=measure)


def set_bits(control: SizeControl, predicted: float) -> None:
    """Makes the indices take so many bytes that the file is predicted to take so many."""
    first, *others = control.lengths
    coded = (predicted - control.lengths[0].rest) / control._share
    first.group.get_buffer(BITS).fill_(8 * coded - sum(length.bits for length in others))


def test_where_the_file_is_as_large_as_it_should_be_the_price_stays() -> None:
    control = control_of(998)
    assert control.predicted == 998, "a little less than the target of 1,000"
    for step in range(1, 200):
        control.on_step(step, 1_000)
    assert control.price == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize(("predicted", "rises"), [(1_500, True), (1_010, True), (990, False), (500, False)])
def test_the_price_rises_while_the_file_is_too_large_and_falls_while_it_is_too_small(
    predicted: int, rises: bool
) -> None:
    control, prices = control_of(1_000), [1e-4]
    set_bits(control, predicted)
    for number in range(1, 6):
        control.on_step(number * STEPS_BETWEEN_COUNTS, 10_000)
        prices.append(control.price)
    assert all((later > earlier) == rises for earlier, later in itertools.pairwise(prices))
    assert {length.price for length in control.lengths} == {prices[-1]}


def test_a_file_smaller_than_the_entropy_of_its_indices_is_predicted_in_proportion() -> None:
    """Some codecs code an index by its place."""
    control = control_of(1_000)
    assert sum(length.bits for length in control.lengths) > 8 * 1_000
    for length in control.lengths:
        length.group.get_buffer(BITS).mul_(0.5)
    assert control.predicted == 500
    for length in control.lengths:
        length.group.get_buffer(BITS).zero_()
    control.on_step(STEPS_BETWEEN_COUNTS, 10_000)
    assert control.predicted == 1


def test_the_price_waits_for_pruning_and_predictions_are_those_of_the_pruned_file() -> None:
    model: Any = net()
    with torch.no_grad():  # norms that begin constant take more bytes in the end than at first
        model[1].weight.uniform_(0.5, 1.5)
        model[1].bias.normal_(0, 0.3)
    policy = Policy([Rule("*", scheme="learnt", sparsity=0.7, sparsity_by=0.6)])
    job = Compressor(model, policy, target_size=3_000, teacher=None).prepare()
    control, prices = job.control, list[float]()
    assert control is not None
    assert control.predicted > 3_500, "nothing is pruned yet"
    job.finetune(batches(), epochs=2, lr=3e-3, on_epoch=lambda *_: prices.append(control.price))
    assert prices[0] == control.first_price != prices[1]
    real = control._size_of()
    assert abs(control.predicted - real) < 0.05 * real
    assert 0.97 * 3_000 <= len(job.finish().to_bytes()) <= 3_000


def test_a_loop_that_tells_the_job_nothing_keeps_to_the_target() -> None:
    job = job_of().prepare()
    opt = torch.optim.AdamW(job.param_groups(lr=3e-3))
    for inputs, classes in batches():
        opt.zero_grad()
        job.loss(job.model(inputs), classes).backward()
        opt.step()
    assert len(job.finish().to_bytes()) <= TARGET


@pytest.mark.parametrize("options", [{"fold_norms": False}, {"half_untouched": False, "fold_norms": False}])
def test_options_that_nobody_searched_with_keep_to_the_target(options: dict[str, Any]) -> None:
    assert 0.95 * TARGET <= len(job_of().prepare().finish(**options).to_bytes()) <= TARGET


def test_the_first_change_is_the_error_and_the_others_a_share_of_it() -> None:
    control = control_of(1_000)
    set_bits(control, 1_020)
    error = math.log(control.predicted / 998)
    control.on_step(STEPS_BETWEEN_COUNTS, 10_000)
    assert math.log(control.price / 1e-4) == pytest.approx(8 * error * 1.1)
    control.on_step(2 * STEPS_BETWEEN_COUNTS, 10_000)
    assert math.log(control.price / 1e-4) == pytest.approx(8 * error * 1.2)


def test_the_price_changes_only_when_indices_were_counted() -> None:
    control = control_of(1_000)
    set_bits(control, 2_000)
    for step in (0, 1, STEPS_BETWEEN_COUNTS - 1, STEPS_BETWEEN_COUNTS + 1):
        control.on_step(step, 1_000)
    assert control.price == pytest.approx(1e-4)


def test_a_price_that_nothing_follows_stays_finite() -> None:
    control = control_of(1_000)
    set_bits(control, 1e9)
    for number in range(1, 500):
        control.on_step(number * STEPS_BETWEEN_COUNTS, 10_000)
    assert control.price == pytest.approx(1.0)


def test_what_the_file_takes_corrects_the_prediction() -> None:
    control = control_of(993, measure=lambda: 1_200)
    control.on_step(20, 800)
    assert control.predicted == 993, "it is measured twenty times in a training"
    control.on_step(40, 800)
    assert control.predicted == 1_200
    assert control.price > 1e-4
    set_bits(control, 1_100)
    assert control.predicted == 1_100, "indices count from there"


def test_where_the_price_has_no_grip_grids_become_finer_until_half_the_training() -> None:
    control = control_of(990)
    first = [length.grid for length in control.lengths]
    for price, steps, finer in [(9e-5, 40, False), (1e-5, 20, False), (1e-5, 480, False), (1e-5, 40, True)]:
        set_bits(control, 900)
        for length in control.lengths:
            length.reprice(price, math.log(900 / 998))
        control.on_step(steps, 800)
        assert [length.grid < grid for length, grid in zip(control.lengths, first, strict=True)] == [finer, finer]
    factors = [length.grid[1] / grid[1] for length, grid in zip(control.lengths, first, strict=True)]
    assert factors == pytest.approx([0.9 ** (1 / 0.7)] * 2)
    assert control.predicted > 900
    exported = [group.scheme.export(group) for length in control.lengths if isinstance(group := length.group, Group)]
    books = [book for shared in exported for book in shared.books]
    assert len(books) == len(first)
    assert all(isinstance(book, Grid) for book in books), "three numbers each"


def test_measuring_the_file_leaves_the_job_as_it_is() -> None:
    job = job_of().prepare()
    job.finetune(batches(2), epochs=1)
    control, container = job.control, job.model.get_submodule("weight_sharing")
    before, held = copy.deepcopy(job.state_dict()), [*job.model.parameters()]
    assert control is not None
    assert control._measure is not None
    size = control._measure()
    assert job.model.get_submodule("weight_sharing") is container
    assert all(one is other for one, other in zip(job.model.parameters(), held, strict=True))
    after = job.state_dict()["model"]
    assert all(torch.equal(value, after[name]) for name, value in before["model"].items())
    assert size == control._size_of()


@pytest.mark.parametrize("epochs", [1, 4])
def test_the_file_of_a_training_is_at_most_the_target(epochs: int, tmp_path: Path) -> None:
    job = job_of().prepare()
    job.finetune(batches(), epochs=epochs, lr=3e-3)
    assert 0.98 * TARGET <= job.finish().save(tmp_path / "file") <= TARGET


def test_without_the_price_the_file_would_grow() -> None:
    """A network that learns its task from random weights needs ever more bits for them."""
    images, excess = torch.cat([inputs for inputs, _ in list(batches())[:8]]), []
    for is_held in (True, False):
        job = job_of(target_size=1_800).prepare(calibration=images)
        control = job.control
        assert control is not None
        if not is_held:
            job.control = None
            for length in control.lengths:
                length.reprice(0.0, 0.0)
        job.finetune(batches(), epochs=4, lr=3e-3)
        excess.append(control.predicted - 1_800)
    held, free = excess
    assert free > 150
    assert held < free / 2


def test_a_training_that_is_too_short_to_hold_the_size_says_so(caplog: pytest.LogCaptureFixture) -> None:
    job = job_of(target_size=3_500).prepare()
    with torch.no_grad():
        for group in job.groups:
            group.master_weight(group.sites[0]).add_(0.05 * torch.randn(group.sites[0].tensor.shape))
    copied = job.copied().control
    assert copied is not None
    assert copied._size_of() > 3_500
    told: list[int] = []

    def on_epoch(*_: object) -> None:
        assert len(job.copied().finish().to_bytes()) <= 3_500
        told.append(len(caplog.messages))

    job.finetune(batches(1), epochs=2, lr=0.0, on_epoch=on_epoch)
    assert told == [0, 0], "it has not ended yet, and then the job itself says so"
    assert 0.9 * 3_500 < len(job.finish().to_bytes()) <= 3_500
    assert any("the price of a bit had not converged for a target of 3,500; train longer" in m for m in caplog.messages)


def test_epochs_tell_price_and_predicted_size() -> None:
    job = job_of().prepare()
    told: list[tuple[object, object]] = []

    def tell(epoch: Epoch, _: object) -> None:
        assert epoch.sharing is not None
        told.append((epoch.sharing.price, epoch.sharing.size))

    job.finetune(batches(), epochs=2, on_epoch=tell)
    assert job.control is not None
    assert told[-1] == (job.control.price, job.control.predicted)
    plain = Compressor(net(), Policy([Rule("*", scheme="learnt", bits=2)]), teacher=None).prepare()
    plain.finetune(batches(2), epochs=1, on_epoch=tell)
    assert told.pop() == (None, None)


def test_bits_are_held_as_well() -> None:
    job = job_of(target_size=None, target_bits=5.0).prepare()
    assert job.control is not None
    assert job.control.target == 5 * (64 * 96 + 96 * 4) // 8


def test_with_a_price_there_is_nothing_to_hold() -> None:
    assert job_of(target_size=None, rate=1e-4).prepare().control is None


def test_a_model_of_which_nothing_is_trained_needs_no_control() -> None:
    model = net()
    for layer in (model[0], model[3]):  # type: ignore[index]
        layer.weight.requires_grad_(False)
    assert Compressor(model, target_size=TARGET, teacher=None).prepare().control is None


def test_a_tensor_that_is_frozen_after_prepare_keeps_its_values() -> None:
    job = job_of(target_size=3_500).prepare()
    model: Any = job.model
    model[1].eval()  # new statistics would take bytes that no weight can give
    model[0].parametrizations.weight.original.requires_grad_(False)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        group = job.groups[1]
        group.master_weight(group.sites[0]).add_(0.1 * torch.randn(4, 96))
    job.finetune(batches(2), epochs=1, lr=0.0)
    assert len(job.finish().to_bytes()) <= 3_500
    assert torch.equal(model[0].weight, before)


def test_a_copy_is_finished_while_the_job_goes_on() -> None:
    data, alone, watched = batches(), job_of().prepare(), job_of().prepare()
    files: list[bytes] = []
    alone.finetune(data, epochs=2, lr=3e-3)

    def finish(*_: object) -> None:
        files.append(watched.copied().finish().to_bytes())

    watched.finetune(data, epochs=2, lr=3e-3, on_epoch=finish)
    whole = alone.finish().to_bytes()
    assert watched.finish().to_bytes() == whole
    assert files[1] == whole != files[0]
    assert all(len(file) <= TARGET for file in files)


def test_a_rounding_that_fails_leaves_a_job_that_can_be_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of().prepare()
    job.finetune(batches(2), epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr("compressor.lifecycle.fitting.content_of", fail)
        with pytest.raises(MemoryError):
            job.finish()
    assert len(job.finish().to_bytes()) <= TARGET


def fail(*_: object) -> None:
    raise MemoryError


def test_resumed_training_has_the_same_price_and_ends_in_the_same_bytes() -> None:
    data = list(batches())

    def start() -> tuple[Compressor, torch.optim.Optimizer]:
        job = job_of().prepare()
        opt = torch.optim.AdamW(job.param_groups(lr=3e-3))
        job.attach(opt, 60)
        return job, opt

    def go(job: Compressor, opt: torch.optim.Optimizer, first: int, last: int) -> None:
        for inputs, classes in data[first:last]:
            loss = job.loss(job.model(inputs), classes)
            opt.zero_grad()
            loss.backward()
            opt.step()

    whole, opt = start()
    go(whole, opt, 0, 33)
    state = copy.deepcopy(whole.state_dict()), copy.deepcopy(opt.state_dict())
    go(whole, opt, 33, 60)
    resumed, opt = start()
    assert resumed.control is not None
    first = resumed.control.price
    resumed.load_state_dict(state[0])
    opt.load_state_dict(state[1])
    assert resumed.control.price != first
    go(resumed, opt, 33, 60)
    assert whole.control is not None
    assert resumed.control.price == whole.control.price
    assert resumed.finish().to_bytes() == whole.finish().to_bytes()


@pytest.mark.parametrize("options", [{"model_ema_decay": 0.9}, {"grad_accum": 2}, {"amp": True}, {"layer_decay": 0.8}])
def test_every_feature_of_training_keeps_to_the_target(options: dict[str, Any], tmp_path: Path) -> None:
    job = job_of(teacher="dense", distill=0.5).prepare()
    job.finetune(batches(), epochs=2, lr=3e-3, **options)
    assert job.finish().save(tmp_path / "file") <= TARGET
