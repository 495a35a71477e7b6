"""Options of ``compress MODEL`` reach what they are about, and what is judged is the packed model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor.cli.configs import Request
from compressor.cli.main import run
from compressor.compressor import Compressor
from compressor.data.datasets import Dataset
from compressor.formats.file.reader import PackedFile
from compressor.training.evaluation import Evaluation
from tests.helpers.runs import OUT, Runs, _here, runs, weights
from tests.helpers.tiny import few_digits

__all__ = ["_here", "runs", "weights"]  # the fixtures

RECIPE = """
[[stage]]
epochs = 2
temperature = {temperature}
distill = 1.0
[[stage.rule]]
scheme = "learnt"
bits = 2
"""


class Finetuning:
    """The arguments of the calls of ``finetune``, which trains nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.jobs: list[Compressor] = []
        self.loaders: list[tuple[Any, Any]] = []
        self.configs: list[Any] = []
        self.options: list[dict[str, Any]] = []
        monkeypatch.setattr("compressor.cli.run.Compressor.finetune", self.method())

    def method(self) -> Any:
        def finetune(job: Compressor, train_loader: Any, val: Any, config: Any, **options: Any) -> Compressor:
            self.jobs.append(job)
            self.loaders.append((train_loader, val))
            self.configs.append(config)
            self.options.append(options)
            return job

        return finetune


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    found = few_digits()
    monkeypatch.setattr("compressor.cli.setup.load_data", lambda *_, **__: found)
    return found


@pytest.fixture
def finetuning(monkeypatch: pytest.MonkeyPatch) -> Finetuning:
    return Finetuning(monkeypatch)


def test_options_of_training_reach_the_fine_tuning(runs: Runs, data: Dataset, finetuning: Finetuning) -> None:
    runs(
        0, "--weight-decay", "0.125", "--layer-decay", "0.75", "--mixup", "0.25", "--cutmix", "0.5", "--smoothing",
        "0.0625", "--seed", "5", "--distill", "0.25", "--opt", "sgd", "--sched", "step", "--grad-accum", "3",
    )  # fmt: skip
    (config,), (mixer,) = finetuning.configs, [options["mixup"] for options in finetuning.options]
    assert (config.weight_decay, config.layer_decay, config.distill) == (0.125, 0.75, 0.25)
    assert (config.opt, config.sched, config.grad_accum, config.epochs, config.lr) == ("sgd", "step", 3, 4, 0.01)
    assert (mixer.mixup_alpha, mixer.cutmix_alpha, mixer.label_smoothing, mixer.num_classes) == (0.25, 0.5, 0.0625, 10)


def test_without_mixing_there_is_no_mixer(runs: Runs, finetuning: Finetuning) -> None:
    runs(0)
    assert finetuning.options[0]["mixup"] is None


def test_the_seed_reaches_job_and_data(runs: Runs, data: Dataset, finetuning: Finetuning) -> None:
    runs(0, "--seed", "5")
    (job,), ((train, _),) = finetuning.jobs, finetuning.loaders
    assert job.seed == 5
    assert train.generator.initial_seed() == 5
    assert train.dataset is data.train
    assert train.batch_size == 16
    with PackedFile.open(OUT) as file:
        assert file.provenance["seed"] == 5


def test_another_seed_gives_another_file(runs: Runs) -> None:
    whole = runs.whole()
    runs(0, "--seed", "1")
    assert OUT.read_bytes() != whole


def test_epochs_are_validated_on_the_validation_split(runs: Runs, data: Dataset, finetuning: Finetuning) -> None:
    runs(0)
    ((_, val),) = finetuning.loaders
    assert val.dataset is data.validation
    assert data.validation is not data.test


def test_what_is_printed_is_of_validation_and_what_is_judged_of_test(
    runs: Runs, data: Dataset, finetuning: Finetuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def evaluate(model: nn.Module, loader: Any) -> Evaluation:
        del model
        split = "validation" if loader.dataset is data.validation else "test"
        seen.append(split)
        return Evaluation(torch.arange(10) < (9 if split == "validation" else 4), torch.zeros(10, dtype=torch.int32))

    monkeypatch.setattr("compressor.cli.run.evaluate", evaluate)
    said = runs(0, "--force", "--require-top1", "40")
    assert seen == ["test", "validation", "validation", "test", "test"]  # dense, before, after, packed, loaded
    assert "4 epochs  validation 90.0 %" in said


@pytest.mark.parametrize("temperature", [2.0, 3.5])
def test_the_temperature_of_a_recipe_reaches_loss_and_job(
    runs: Runs, finetuning: Finetuning, temperature: float
) -> None:
    Path("warm.toml").write_text(RECIPE.format(temperature=temperature))
    runs.words = (*[word for word in runs.words if word not in ("--bits", "2")], "--recipe", "warm.toml")
    runs(0)
    assert finetuning.jobs[0].temperature == temperature
    assert finetuning.configs[0].temperature == temperature


def test_untouched_tensors_are_stored_in_half_precision(runs: Runs, finetuning: Finetuning) -> None:
    runs(0)
    with PackedFile.open(OUT) as file:
        whole = {name: raw.stored for name, raw in file.untouched.items()}
    runs(0, "--force", "--untouched", "f16")
    with PackedFile.open(OUT) as file:
        half = {name: raw.stored for name, raw in file.untouched.items()}
        kept = {raw.stored for raw in file.untouched.values() if raw.value is None}  # not of one value
    assert set(whole.values()) == {"F32", "I64"}
    assert kept - {"I64"} == {"F16"}
    assert half.keys() == whole.keys()
    for tensor in compressor.load_state_dict(OUT).values():
        if tensor.ndim == 1:
            assert torch.equal(tensor, tensor.half().to(tensor.dtype))


def test_norms_are_folded_where_that_is_asked_for(runs: Runs, finetuning: Finetuning) -> None:
    runs(0, "--calibration", "none")  # with images, statistics that answer them no better would stay
    plain = compressor.load_state_dict(OUT)
    runs(0, "--calibration", "none", "--force", "--fold-norms")
    folded = compressor.load_state_dict(OUT)
    statistics = [name for name in folded if name.endswith(("running_mean", "num_batches_tracked"))]
    assert statistics
    assert any(plain[name].any() for name in statistics)
    assert not any(folded[name].any() for name in statistics)


def half_right(model: nn.Module, loader: Any) -> Evaluation:
    """Judges by the number of values of the first layer: dense models have many, and are right nine times of ten."""
    del loader
    first: Any = next(model.parameters())
    return Evaluation(torch.arange(10) < (9 if len(first.unique()) > 16 else 5), torch.zeros(10, dtype=torch.int32))


@pytest.mark.parametrize(
    ("gate", "missed"),
    [(("--require-top1", "75"), "top-1 is 50.00 %, --require-top1 75"),
     (("--require-drop", "30"), "top-1 fell by 40.00 points, --require-drop 30")],
)  # fmt: skip
def test_gates_judge_the_packed_model(
    runs: Runs, finetuning: Finetuning, monkeypatch: pytest.MonkeyPatch, gate: tuple[str, str], missed: str
) -> None:
    monkeypatch.setattr("compressor.cli.run.evaluate", half_right)
    assert runs.refused(5, *gate).startswith(missed)
    assert not OUT.exists()


@pytest.mark.parametrize("gate", [("--require-top1", "50"), ("--require-drop", "40")])
def test_gates_that_the_packed_model_meets(
    runs: Runs, finetuning: Finetuning, monkeypatch: pytest.MonkeyPatch, gate: tuple[str, str]
) -> None:
    monkeypatch.setattr("compressor.cli.run.evaluate", half_right)
    assert run([*runs.words, "--json", *gate]) == 0
    top1 = json.loads(runs.capsys.readouterr().out)["top1"]
    assert (top1["dense"], top1["packed"], top1["lost"], top1["gained"], top1["n"]) == (0.9, 0.5, 4, 0, 10)


def test_a_file_that_answers_otherwise_is_an_error(
    runs: Runs, finetuning: Finetuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = compressor.load

    def another(path: Any) -> nn.Module:
        model = load(path)
        last: Tensor = list(model.parameters())[-1].data  # the biases of the ten classes
        last.copy_(torch.arange(10) * 1000.0)
        return model

    monkeypatch.setattr("compressor.load", another)
    assert runs.refused(1) == "out answers otherwise than the model it was written from"


def test_from_scratch_trains_longer_at_a_higher_rate_without_a_teacher() -> None:
    request = Request.from_command_line("test_resnet", {"from_scratch": True, "weight_decay": 0.5})
    assert request.training_overrides() == {"epochs": 12, "lr": 3e-3, "weight_decay": 0.5, "distill": 0.0}
    taught = Request.from_command_line("test_resnet", {"from_scratch": True, "teacher": "test_vit", "epochs": 2})
    assert taught.training_overrides() == {"epochs": 2, "lr": 3e-3}
