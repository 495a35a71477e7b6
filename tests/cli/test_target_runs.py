"""Runs with a target: what is searched on which images, how large the file is, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.calibration.image_counts import DEFAULT_IMAGES, FEWEST_IMAGES
from compressor.cli import search
from compressor.cli.main import run
from compressor.compressor import Compressor
from compressor.data.datasets import Dataset
from compressor.formats.file.reader import PackedFile
from compressor.rng import seeded
from tests.helpers.runs import FOLDER, OUT, Runs, _here, killed, weights
from tests.helpers.tiny import few_digits

__all__ = ["_here", "weights"]  # the fixtures

KMEANS = '[[stage]]\nepochs = 0\n[[stage.rule]]\nscheme = "kmeans"\nbits = 3\n'
TWO_STAGES = KMEANS + '[[stage]]\nepochs = 0\n[[stage.rule]]\nscheme = "learnt"\n'
LEAST = 300  # bytes, that the file of the small network has with all weights zero, at the very least


@pytest.fixture
def runs(weights: Path, capsys: pytest.CaptureFixture[str]) -> Runs:
    return Runs(weights, capsys).without_bits("--epochs", "0")


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    found = few_digits()
    monkeypatch.setattr("compressor.cli.setup.load_data", lambda *_, **__: found)
    return found


class Prepared:
    """The jobs of a run, and what each was prepared with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.jobs: list[Compressor] = []
        self.images: list[Any] = []
        self.options: list[dict[str, Any]] = []
        original = Compressor.prepare

        def prepare(job: Compressor, calibration: Any = None, **options: Any) -> Compressor:
            self.jobs.append(job)
            self.images.append(calibration)
            self.options.append(options)
            return original(job, calibration, **options)

        monkeypatch.setattr(Compressor, "prepare", prepare)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Prepared:
    return Prepared(monkeypatch)


@pytest.mark.parametrize(
    "more", [(), ("--untouched", "f32"), ("--calibration", "none"), ("--calibration", "synthetic")]
)
def test_the_file_is_as_large_as_the_target(runs: Runs, more: tuple[str, ...]) -> None:
    runs(0, "--target-size", "6KB", *more)
    assert 5_880 <= OUT.stat().st_size <= 6_000


def test_bits_are_all_of_the_file_over_all_shared_weights(runs: Runs) -> None:
    runs(0, "--target-bits", "12")
    assert 11.6 <= 8 * OUT.stat().st_size / (400 + 2304 + 640) <= 12


def test_what_is_not_shared_is_halved_for_a_target_only(runs: Runs) -> None:
    stored = {}
    for name, words in {
        "target": ("--target-size", "6KB"), "float32": ("--target-size", "6KB", "--untouched", "f32"),
        "price": ("--rate", "1e-7"),
    }.items():  # fmt: skip
        runs(0, "--force", "--no-fold-norms", *words)
        with PackedFile.open(OUT) as file:
            stored[name] = {raw.stored for raw in file.untouched.values() if raw.value is None}
    assert stored == {"target": {"F16"}, "float32": {"F32"}, "price": {"F32"}}


def test_what_is_said(runs: Runs) -> None:
    assert run([*runs.words, "--target-size", "6KB"]) == 0
    said = runs.capsys.readouterr()
    with PackedFile.open(OUT) as file:
        found, images = file.provenance["target"], file.provenance["calibration"]
    assert images == {"images": 96, "source": "data"}
    rate, predicted, size = f"{found['rate']:.2g}", f"{found['predicted']:,}", f"{OUT.stat().st_size:,}"
    (step,) = [line for line in said.err.splitlines() if line.startswith("2/3 codebooks")]
    assert f"3 tensors, 3.3 k weights  rate {rate} in " in step
    assert f" passes, {predicted} of 6,000 bytes predicted  96 images" in step
    (line,) = [line for line in said.out.splitlines() if line.startswith("target")]
    assert line.startswith("target --target-size 6KB  rate ")
    assert line.endswith(f"  {predicted} predicted, {size} bytes written")


def test_json_has_target_rate_predicted_and_real_bytes(runs: Runs) -> None:
    assert run([*runs.words, "--rate", "1e-7", "--json"]) == 0
    document = json.loads(runs.capsys.readouterr().out)
    assert document["target"] == {
        "rate": 1e-7, "predicted": None, "size": OUT.stat().st_size, "calibration": {"images": 96, "source": "data"},
    }  # fmt: skip
    assert run([*runs.words, "--bits", "2", "--force", "--json"]) == 0
    assert json.loads(runs.capsys.readouterr().out)["target"] is None


def test_images_are_the_first_of_training_in_the_order_of_the_seed(
    runs: Runs, data: Dataset, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "DEFAULT_IMAGES", 40)
    runs(0, "--rate", "1e-7", "--seed", "5")
    runs(0, "--rate", "1e-7", "--seed", "5", "--force", "--calibration-images", "20")
    runs(0, "--rate", "1e-7", "--force", "--calibration", "synthetic")
    runs(0, "--rate", "1e-7", "--force", "--calibration", "none")
    with seeded(5):
        first = torch.cat([images for images, _ in data.train_loader(16, 5)])
    forty, twenty, *words = prepared.images
    assert isinstance(forty, Tensor)
    assert torch.equal(forty, first[:40])
    assert torch.equal(twenty, first[:20])
    assert words == ["synthetic", None]


def test_schemes_that_gain_start_from_data_that_are_named(
    data: Dataset, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["tiny", "--baseline-epochs", "0", "--epochs", "0", "--bits", "3", "--force", "-o", "out"]
    named = ["--dataset", "digits"]
    for more in (
        [*named, "--scheme", "kmeans"], [*named, "--scheme", "learnt"], [*named, "--scheme", "uniform"],
        [*named, "--scheme", "kmeans", "--calibration", "none"], ["--scheme", "kmeans"],
    ):  # fmt: skip
        assert run([*words, *more]) == 0
    assert [None if images is None else len(images) for images in prepared.images] == [96, 96, None, None, None]


def test_random_weights_are_not_judged(
    data: Dataset, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["tiny", "--from-scratch", "--dataset", "digits", "--epochs", "0", "-o", "out"]) == 0
    assert prepared.images == [None]


def test_the_memory_of_measurements_is_what_was_named(runs: Runs, prepared: Prepared) -> None:
    files = []
    for words in ((), ("--calibration-memory", "1kB"), ("--calibration-memory", "512MiB")):
        runs(0, "--rate", "1e-7", "--force", *words)
        files.append(OUT.read_bytes())
    assert [options.get("memory") for options in prepared.options] == [None, 1_000, 512 << 20]
    assert files[1] != files[0], "the layers are measured by their diagonals alone"
    assert files[2] == files[0], "the default"


def test_there_are_256_images_and_at_least_as_many_as_the_calibrator_wants() -> None:
    assert DEFAULT_IMAGES == 256
    assert FEWEST_IMAGES == 16


def test_only_the_last_stage_has_the_target(runs: Runs, prepared: Prepared) -> None:
    Path("two.toml").write_text(TWO_STAGES)
    runs(0, "--recipe", "two.toml", "--rate", "1e-7")
    assert [job.target.is_given for job in prepared.jobs] == [False, True]
    assert [len(images) for images in prepared.images] == [96, 96], "the first stage gains from them without a target"


def test_a_drop_is_measured_on_validation_images(runs: Runs, data: Dataset, prepared: Prepared) -> None:
    runs(0, "--max-drop", "100")
    (options,) = prepared.options
    assert options["val"].dataset is data.validation
    runs(0, "--rate", "1e-7", "--force")
    assert prepared.options[1]["val"] is None


def test_the_recipe_in_the_file_has_the_price(runs: Runs) -> None:
    runs(0, "--target-size", "6KB")
    with PackedFile.open(OUT) as file:
        recipe, found = file.recipe, file.provenance["target"]["rate"]
    assert recipe is not None
    assert recipe["stage"][0]["rule"][0]["rate"] == found
    assert recipe["stage"][0]["epochs"] == 0


def test_a_dry_run_searches_nothing(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.lifecycle.fitting.Fitting.search", None)
    assert run([*runs.words, "--target-size", "6KB", "--dry-run"]) == 0
    _, first, *_, least, last = runs.capsys.readouterr().out.splitlines()
    assert "learnt --target-size 6KB" in first
    assert last == "predicted  14,576 -> 6,000 bytes (2.4x) for --target-size 6KB, not searched; nothing was written"
    assert int(least.removeprefix("least      ").removesuffix(" bytes, with all weights zero").replace(",", "")) > LEAST
    assert run([*runs.words, "--target-bits", "8", "--dry-run", "--json"]) == 0
    document = json.loads(runs.capsys.readouterr().out)
    assert (document["target"], document["predicted"]["file"]) == ({"target_bits": 8.0}, 3344)
    assert run([*runs.words, "--max-drop", "1", "--dry-run"]) == 0
    last = runs.capsys.readouterr().out.splitlines()[-1]
    assert last == "predicted  14,576 -> unknown for --max-drop 1, not searched; nothing was written"


def test_a_target_that_no_price_reaches(runs: Runs) -> None:
    assert "with all weights zero the file takes" in runs.refused(2, "--target-size", "300")
    assert not OUT.exists()
    for words in (("--target-size", "300"), ("--target-bits", "0.001")):
        assert "with all weights zero the file takes" in runs.refused(2, *words, "--dry-run")


def test_a_target_refused_after_the_baseline_leaves_nothing_to_resume(runs: Runs) -> None:
    given = runs.words.index("--checkpoint-path")
    runs.words = (*runs.words[:given], *runs.words[given + 2 :], "--baseline-epochs", "1")
    assert "cannot be reached" in runs.refused(2, "--target-size", "450")
    assert not FOLDER.exists()
    said = runs(0, "--target-size", "700")  # neither --force nor another training of the baseline
    assert "reused from" in said
    assert OUT.stat().st_size <= 700


def test_a_recipe_without_a_price_is_refused(runs: Runs) -> None:
    Path("kmeans.toml").write_text(KMEANS)
    said = runs.refused(2, "--recipe", "kmeans.toml", "--rate", "1e-7")
    assert said == "--rate: nothing that the recipe shares last has a price of bits; schemes with a price: learnt"


def test_resuming_with_another_target_is_refused(runs: Runs) -> None:
    runs.words = (*runs.words, "--epochs", "4")
    killed(runs, 9, "--target-size", "2KB")
    said = runs.refused(2, "--resume", "--target-size", "3KB")
    assert said.startswith("out.checkpoints holds another run: target.target_size was 2000, is 3000.")
    runs(0, "--resume", "--target-size", "2KB")
