"""Checkpoints of one's own, as trainings and this package write them: by which names, and what is said of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compressor import Compressor, Policy, Rule
from compressor.formats.errors import MissingError, UnsupportedError
from compressor.models.checkpoint import load_checkpoint, read_checkpoint

MODEL = "test_resnet"
State = Mapping[str, Tensor]

pytestmark = pytest.mark.usefixtures("own_folder")


def model_of(seed: int = 0, name: str = MODEL, **args: Any) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(name, **args)
    return model


def loaded(path: str, pickles: bool = True) -> nn.Module:
    model = model_of(9)
    load_checkpoint(read_checkpoint(Path(path), pickles), model, MODEL)
    return model


def same(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), two.state_dict().items(), strict=True)
    return all(a == b and torch.equal(v, w) for (a, v), (b, w) in pairs)


def refused(path: str, pickles: bool = True) -> str:
    with pytest.raises((MissingError, UnsupportedError)) as caught:
        loaded(path, pickles)
    said = str(caught.value)
    assert "\n" not in said
    assert "weights_only" not in said
    assert len(said) < 1000
    return said


PREFIXES = "module.", "model.", "backbone.", "timm_model.", "_orig_mod.", "model.module.", "model.backbone._orig_mod."


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_names_with_the_prefix_of_a_wrapper(prefix: str, ending: str) -> None:
    model = model_of()
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    save_file(state, "a.safetensors") if ending == "safetensors" else torch.save(state, "a.pth")
    assert same(loaded(f"a.{ending}"), model)
    if ending == "safetensors":
        assert same(loaded("a.safetensors", pickles=False), model)


def test_names_of_the_model_that_begin_like_a_prefix_are_left() -> None:
    """Such as those of timm's hybrid models, whose own stem is a ``backbone``."""
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "model": nn.Linear(2, 3)})
    save_file({f"module.{name}": tensor for name, tensor in model.state_dict().items()}, "a.safetensors")
    other = nn.ModuleDict({"backbone": nn.Linear(2, 2), "model": nn.Linear(2, 3)})
    load_checkpoint(read_checkpoint(Path("a.safetensors"), pickles=False), other, "own")
    assert same(other, model)


def test_two_models_in_one_file_are_not_mixed() -> None:
    state = model_of().state_dict()
    pairs = [(f"{prefix}.{name}", tensor.clone()) for prefix in ("model", "backbone") for name, tensor in state.items()]
    torch.save(dict(pairs), "two.pth")
    first = next(iter(state))
    assert refused("two.pth") == (f"two.pth holds two models: both model.{first} and backbone.{first} are its {first}")


SAVED: dict[str, Callable[[State], dict[str, Any]]] = {
    "timm": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}},
    "timm, averaged": lambda state: {"state_dict": {}, "state_dict_ema": state},
    "lightning": lambda state: {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}, "epoch": 3},
    "tutorial": lambda state: {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"state": {}}},
    "with numbers": lambda state: {**state, "epoch": 3},
}


@pytest.mark.parametrize("kind", SAVED)
def test_checkpoints_of_trainings(kind: str) -> None:
    model = model_of()
    torch.save(SAVED[kind](model.state_dict()), "a.pth")
    assert same(loaded("a.pth"), model)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_packed_file_is_a_checkpoint(ending: str) -> None:
    job = Compressor(model_of(), Policy([Rule("*", scheme="kmeans", bits=3)]), teacher=None)
    job.prepare().finish().save(f"packed.{ending}")
    assert same(loaded(f"packed.{ending}"), job.model)


@pytest.mark.parametrize("pickles", [False, True])
def test_the_classes_of_a_checkpoint_are_said_with_their_option(pickles: bool) -> None:
    save_file(model_of(num_classes=5).state_dict(), "five.safetensors")
    line = "five.safetensors: 5 classes in the checkpoint: --num-classes 5"
    assert refused("five.safetensors", pickles) == line
    state = {f"backbone.{name}": tensor for name, tensor in model_of(num_classes=5).state_dict().items()}
    save_file(state, "prefixed.safetensors")
    assert refused("prefixed.safetensors", pickles) == line.replace("five", "prefixed")


def test_few_names_are_listed() -> None:
    save_file(model_of(name="test_vit").state_dict(), "vit.safetensors")
    said = refused("vit.safetensors")
    assert said.startswith("vit.safetensors holds no test_resnet: ")
    assert said.count(" is missing") + said.count(" is unknown") <= 10
    assert "conv1.0.weight is missing" in said


class Odd(nn.Module):
    """A class of one's own, which a pickle of the whole model names."""


def test_what_torch_advises_is_not_repeated() -> None:
    torch.save(nn.Sequential(Odd(), model_of()), "whole.pth")
    said = refused("whole.pth")
    assert said.startswith("whole.pth: damaged, or no checkpoint (it holds more than tensors: ")
    assert "tests.models.test_checkpoint.Odd" in said or " and " in said
    assert said.endswith("; write them alone, torch.save(model.state_dict(), FILE))")
    assert said.count(",") == 3 + 9, "ten classes"
    for number, saved in enumerate(([1, 2], torch.zeros(3), "text")):
        torch.save(saved, f"{number}.pth")
        assert refused(f"{number}.pth").startswith(f"{number}.pth: damaged, or no checkpoint (")
    Path("words.pth").write_text("not a checkpoint")
    assert refused("words.pth").startswith("words.pth: damaged, or no checkpoint (")
    Path("table.pth").write_text("epoch,train_loss\n0,2.25\n")  # instructions of a pickle that pop from an empty list
    assert refused("table.pth").startswith("table.pth: damaged, or no checkpoint (")
