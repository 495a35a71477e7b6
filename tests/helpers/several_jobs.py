"""Jobs of the Python interface in two processes, run by ``several.py``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from compressor import SCHEMES, Compressor, Policy, Rule, load_state_dict
from compressor.checkpointing.manager import Checkpoints
from compressor.distributed import collectives
from tests.helpers.pairs import Pair, alone


def curve(scheme: str, batch: int, out: Path) -> int:
    """Fine-tunes a model without BatchNorm; writes its losses by epoch, its outputs, and a hash of its state."""
    torch.manual_seed(0)
    inputs = torch.randn(41, 6)  # so that the last step of an epoch is 3 images for one, 2 for the other
    data = TensorDataset(inputs, (inputs[:, 0] > 0).long() + 2 * (inputs[:, 1] > 0).long())
    loader = DataLoader(data, batch, sampler=RandomSampler(data, generator=torch.Generator().manual_seed(1)))
    net = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 4))
    losses: list[float] = []
    job = Compressor(net, Policy([Rule("*", scheme=scheme)])).prepare()
    job.finetune(
        loader, val=DataLoader(data, 7), epochs=6, lr=0.01, on_epoch=lambda epoch, _: losses.append(epoch.loss)
    )
    out = out.with_suffix("." + os.environ.get("RANK", "alone"))
    out.write_text(json.dumps({"losses": losses, "bytes": job.finish().to_bytes().hex()}))
    collectives.destroy()
    return 0


def the_losses_are_those_of_one_process_with_twice_the_batch(folder: Path) -> None:
    for scheme in SCHEMES:
        with Pair(partial(curve, scheme, 6, folder / f"{scheme}.json"), folder / scheme) as pair:
            assert pair.codes() == [0, 0], pair.said(0) + pair.said(1)
        assert alone(partial(curve, scheme, 12, folder / f"{scheme}.json"), folder / scheme) == 0
        read = {who: json.loads((folder / f"{scheme}.{who}").read_text()) for who in ("0", "1", "alone")}
        assert read["0"] == read["1"], f"{scheme}: codebooks, indices and losses are the same in both"
        pairs = zip(read["0"]["losses"], read["alone"]["losses"], strict=True)
        apart = max(abs(one - other) / other for one, other in pairs)
        assert apart < 1e-3, f"{scheme}: {read['0']['losses']} and {read['alone']['losses']}"


def weights_that_differ_become_those_of_the_first(folder: Path) -> None:
    def trains() -> int:
        from compressor.distributed.devices import init_processes

        init_processes()
        torch.manual_seed(collectives.rank())
        job = Compressor(nn.Sequential(nn.Linear(6, 24)), Policy([Rule("*", scheme="learnt", bits=2)]), teacher=None)
        data = TensorDataset(torch.randn(8, 6), torch.zeros(8, dtype=torch.int64))
        job.prepare().finetune(DataLoader(data, 2), epochs=1)
        Path(f"file{collectives.rank()}").write_bytes(job.finish().to_bytes())
        return 0

    with Pair(trains, folder / "a") as pair:
        assert pair.codes() == [0, 0], pair.said(0)
    assert torch.equal(*(load_state_dict(folder / "a" / f"file{rank}")["0.weight"] for rank in (0, 1)))


def trained_with(trouble: Callable[[int, Tensor], Tensor], checkpoints: bool) -> Callable[[], int]:
    """Fine-tunes with a loss that fails in one process, and writes the outcome."""

    def trains() -> int:
        torch.manual_seed(0)
        inputs = torch.randn(48, 6)
        loader = DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), 6)
        net = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 2))
        job = Compressor(net, Policy([Rule("*", scheme="learnt", bits=2)]), teacher=None).prepare()
        usual, asked = job.loss, 0

        def loss(output: Tensor, target: Tensor, given: Tensor | None = None) -> Tensor:
            nonlocal asked
            asked += 1
            value = usual(output, target, given)
            return trouble(asked, value) if collectives.rank() == 1 else value

        vars(job)["loss"] = loss
        job.finetune(loader, epochs=3, lr=0.01, checkpoints=Checkpoints("kept") if checkpoints else None)
        Path(f"file{collectives.rank()}").write_bytes(job.finish().to_bytes())
        return 0

    return trains


def a_loss_that_is_no_number_in_one_takes_both_back(folder: Path) -> None:
    def trouble(asked: int, value: Tensor) -> Tensor:
        return value * torch.nan if asked == 6 else value  # in the middle of the second epoch

    for kept in (False, True):
        here = folder / f"kept {kept}"
        with Pair(trained_with(trouble, kept), here) as pair:
            assert pair.codes() == [0, 0], pair.said(0) + pair.said(1)
            assert "the loss is nan at step 6: going back to the state after step 4" in pair.said(0)
        assert (here / "file0").read_bytes() == (here / "file1").read_bytes()


def one_that_is_out_of_memory_takes_the_same_step(folder: Path) -> None:
    held = 0

    def trouble(asked: int, value: Tensor) -> Tensor:
        nonlocal held
        held += 1
        if held == 3:
            raise torch.OutOfMemoryError("tried to allocate 8 bytes")
        return value

    for name, what in (("short", trouble), ("ample", lambda _, value: value)):
        with Pair(trained_with(what, False), folder / name) as pair:
            assert pair.codes() == [0, 0], pair.said(0) + pair.said(1)
            assert ("going on with 3" in pair.said(1)) == (name == "short")
        assert (folder / name / "file0").read_bytes() == (folder / name / "file1").read_bytes()
    one, other = (load_state_dict(folder / name / "file0") for name in ("short", "ample"))
    assert all(torch.allclose(one[name], other[name], atol=1e-3) for name in one)


def a_loop_of_ones_own_agrees_under_accelerate(folder: Path) -> None:
    def trains() -> int:
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        inputs = torch.randn(64, 6)
        loader = DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), 8)
        net = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 2))
        job = Compressor(net, Policy([Rule("*", scheme="learnt", bits=2)]), teacher=None).prepare()
        start = job.groups[0].values.clone()
        optimizer = torch.optim.AdamW(job.param_groups(lr=1e-2))
        job.attach(optimizer, total_steps=40)
        model, optimizer, loader = accelerator.prepare(job.model, optimizer, loader)
        for _ in range(10):
            for x, y in loader:
                optimizer.zero_grad()
                accelerator.backward(job.loss(model(x), y, inputs=x))
                optimizer.step()
        assert job.steps == 40
        assert not torch.equal(start, job.groups[0].values)
        assert float((job.model(inputs).argmax(1) == (inputs[:, 0] > 0)).float().mean()) > 0.95
        Path(f"file{accelerator.process_index}").write_bytes(job.finish().to_bytes())
        return 0

    with Pair(trains, folder / "a") as pair:
        assert pair.codes() == [0, 0], pair.said(0)
    assert (folder / "a" / "file0").read_bytes() == (folder / "a" / "file1").read_bytes()


JOBS = (
    the_losses_are_those_of_one_process_with_twice_the_batch,
    weights_that_differ_become_those_of_the_first,
    a_loss_that_is_no_number_in_one_takes_both_back,
    one_that_is_out_of_memory_takes_the_same_step,
    a_loop_of_ones_own_agrees_under_accelerate,
)
