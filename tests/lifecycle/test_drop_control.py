"""Training to a drop of top-1: how the target moves from epoch to epoch, what follows it, and what is said."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from compressor.compressor import Compressor
from compressor.lifecycle.drop_control import DropControl
from compressor.policy.policy import Policy, Rule
from compressor.sharing.code_length import BITS, STEPS_BETWEEN_COUNTS, CodeLength
from compressor.training.evaluation import evaluate
from compressor.training.loop import Epoch

SIZE, RATE = 1_000, 1e-4


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 4))


def batches(count: int, seed: int = 1) -> DataLoader[Any]:
    """Returns inputs whose class is the largest of four sums of them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(32, 32, generator=generator) for _ in range(count)]
    pairs = [(one, one.view(32, 4, 8).sum(dim=2).argmax(dim=1)) for one in inputs]
    return DataLoader(pairs, batch_size=None)  # type: ignore[arg-type]


VAL = batches(10, seed=2)
IMAGES = torch.cat([inputs for inputs, _ in batches(8, seed=3)])


@pytest.fixture(scope="module")
def dense() -> nn.Sequential:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for inputs, classes in [*batches(60)] * 2:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), classes).backward()
        optimizer.step()
    assert evaluate(model, VAL).top1 > 0.9
    return model


def control_of(allowed: float = 0.5, dense: float = 0.9) -> DropControl:
    job = Compressor(net(), Policy([Rule("*", scheme="learnt", rate=RATE)]), teacher=None).prepare()
    for group in job.groups:
        CodeLength(group).reprice(RATE, 0.0)
    return DropControl(job.groups, SIZE, lambda: SIZE, None, None, allowed, dense)


def set_bits(control: DropControl, predicted: float) -> None:
    first, *others = control.lengths
    coded = (predicted - first.rest) / control._share
    first.group.get_buffer(BITS).fill_(8 * coded - sum(length.bits for length in others))


def steps(control: DropControl) -> list[float]:
    return [length.grid[1] for length in control.lengths]


def slow_shares(drops: list[float], allowed: float, errors: float, epochs: int) -> list[float]:
    """Returns by which shares the target changes, before the first epoch and after each but the last."""
    times = [done for done in range(epochs) if done < epochs * 2 / 3]
    fall = max(math.pow(0.4, 1 / len(times)), 0.65)
    shares = [fall]
    for done in range(1, epochs):
        drop, over = drops[done - 1], 0.1 * errors * (epochs - done) / epochs
        if drop - allowed > 4 * over:
            shares.append(min(fall**-0.5, 1 / math.prod(shares)))
        elif drop - allowed > over or done not in times:
            shares.append(1.0)
        else:
            shares.append(fall)
    return shares


@pytest.mark.parametrize(
    ("drops", "signs"),
    [
        ([0.0, 0.0, 0.0], "--="),  # signs: before it, and after each epoch but the last
        ([0.0] * 6, "----=="),
        ([5.0] * 6, "-++==="),  # no larger than post-training
        ([1.2, 1.2, 1.2, 1.2, 0.9, 0.4], "--===="),
        ([0.0, 2.9, 0.7], "--+"),
        ([9.0], "-"),
    ],
)
def test_the_target_falls_while_top1_allows_it_and_rises_where_it_does_not(drops: list[float], signs: str) -> None:
    epochs, control = len(drops), control_of()
    after = control.following(None, VAL, epochs)
    assert after is not None
    targets = [float(SIZE), control.lengths[0].target]
    for number, drop in enumerate(drops[:-1], 1):
        set_bits(control, targets[-1])
        after(Epoch(number, epochs, loss=1.0), 0.9 - drop / 100)
        targets.append(control.lengths[0].target)
    rest = control.lengths[0].rest
    shares = [(later - rest) / (before - rest) for before, later in itertools.pairwise(targets)]
    assert shares == pytest.approx(slow_shares(drops, 0.5, 10.0, epochs), rel=1e-2)
    assert "".join("+" if share > 1.02 else "-" if share < 0.98 else "=" for share in shares) == signs


def test_what_training_frees_by_itself_is_kept() -> None:
    control = control_of()
    after = control.following(None, VAL, 4)
    assert after is not None
    rest = control.lengths[0].rest
    set_bits(control, rest + 0.3 * (SIZE - rest))
    after(Epoch(1, 4, loss=1.0), 0.9)
    assert control.lengths[0].target - rest == pytest.approx(0.3 * 0.4 ** (1 / 3) * (SIZE - rest), rel=1e-2)


def test_grids_become_coarser_little_by_little_until_the_file_is_as_small_as_it_should_be() -> None:
    control = control_of()
    control.following(None, VAL, 1)
    before, price, sizes = steps(control), control.price, [control.predicted]
    for count in range(1, 21):
        control.on_step(count * STEPS_BETWEEN_COUNTS, 4_000)  # ten counts are a twentieth
        sizes.append(control.predicted)
        coarser = steps(control)[0] / before[0]
        assert coarser <= 3 ** (count / 10) * 1.001
    assert sizes[1] < sizes[0]
    assert sizes[-1] <= 1.04 * control.target
    assert steps(control) == pytest.approx([coarser * step for step in before], rel=1e-5)
    assert coarser > 1.2
    assert 0.2 < control.price / (price * coarser**2) < 5


def test_in_a_training_of_few_counts_grids_become_coarser_by_a_few_per_cent_at_once() -> None:
    control = control_of()
    control.following(None, VAL, 1)
    before = steps(control)
    control.on_step(STEPS_BETWEEN_COUNTS, 3 * STEPS_BETWEEN_COUNTS)
    assert 1.05 < steps(control)[0] / before[0] < 1.2


def test_where_top1_has_fallen_too_far_grids_become_finer_at_once() -> None:
    control = control_of()
    after = control.following(None, VAL, 4)
    assert after is not None
    fallen = control.target
    set_bits(control, fallen)
    before, price = steps(control), control.price
    after(Epoch(3, 4, loss=1.0), 0.8)
    finer = 0.4 ** (0.5 / 3 / 0.7)
    assert steps(control) == pytest.approx([finer * step for step in before], rel=1e-5)
    assert control.price == pytest.approx(price * finer**2)
    assert fallen < control.target < SIZE


def test_a_file_within_the_drop_beats_a_smaller_one_beyond_it() -> None:
    control = control_of(allowed=0.5, dense=0.9)
    files = [(0.898, 500), (0.897, 400), (0.893, 300), (0.88, 200), (0.91, 900)]
    assert max(files, key=lambda file: control.rank(*file)) == (0.897, 400)
    assert max(files[2:4], key=lambda file: control.rank(*file)) == (0.893, 300)


def trained(dense: nn.Sequential, allowed: float, epochs: int, val: Any = VAL, lr: float = 3e-3) -> Compressor:
    job = Compressor(dense, max_drop=allowed).prepare(IMAGES, val=VAL)
    return job.finetune(batches(60), val=val, epochs=epochs, lr=lr)


def test_a_training_makes_the_file_smaller_and_keeps_top1(dense: nn.Sequential) -> None:
    before = Compressor(dense, max_drop=6.0).prepare(IMAGES, val=VAL).finish()
    job = trained(dense, 6.0, epochs=4)
    found = job.search
    assert found is not None
    targets = [row["target_size"] for row in job.history]
    assert min(targets) < max(targets) <= found.size
    packed = job.finish()
    assert len(packed.to_bytes()) < len(before.to_bytes())
    assert 100 * (evaluate(dense, VAL).top1 - evaluate(job.model, VAL).top1) <= 6.0


def test_without_validation_images_in_training_the_price_is_held(dense: nn.Sequential) -> None:
    job = trained(dense, 6.0, epochs=1, val=None)
    assert job.control is not None
    assert job.control.price == job.control.first_price > 0
    assert job.history[-1]["target_size"] is None


def test_a_drop_that_is_missed_is_told(dense: nn.Sequential, caplog: pytest.LogCaptureFixture) -> None:
    job = Compressor(dense, max_drop=6.0).prepare(IMAGES, val=VAL)
    wrong = [(inputs, (classes + 1) % 4) for inputs, classes in VAL]
    job.finetune(batches(2), val=wrong, epochs=1)
    (line,) = [message for message in caplog.messages if "training ended" in message]
    lost = 100 * (evaluate(dense, VAL).top1 - job.history[-1]["top1"])
    assert line.startswith(f"training ended with top-1 {lost:.2f} points below that of the dense model, which is more")


def test_the_target_is_in_the_state_of_a_job(dense: nn.Sequential) -> None:
    job = trained(dense, 6.0, epochs=2)
    other = Compressor(dense, max_drop=6.0).prepare(IMAGES, val=VAL)
    assert job.control is not None
    assert other.control is not None
    assert other.control.target != job.control.target
    other.load_state_dict(job.state_dict())
    assert other.control.target == job.control.target
    assert [length.grid for length in other.control.lengths] == [length.grid for length in job.control.lengths]
