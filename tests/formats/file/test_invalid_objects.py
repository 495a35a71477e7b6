"""What a file says of its model, its images, its recipe and its making: each value by type and range, when opened."""

from __future__ import annotations

from typing import Any

import pytest

from compressor.formats.errors import FormatError
from compressor.formats.file.container import canonical_json
from compressor.formats.file.reader import PackedFile
from tests.helpers.forging import forged, refuse

GOOD: dict[str, dict[str, Any]] = {
    "model": {"name": "resnet18", "args": {"num_classes": 10, "act_layer": "silu", "depths": [1, 2]}},
    "preprocessing": {
        "input_size": [3, 224, 224], "mean": [0.5, 0, 1], "std": [0.2, 1, 58.4], "interpolation": "bicubic",
        "crop_pct": 1.15, "crop_mode": "squash", "label_names": ["a cat", "\u732b", ""],
    },
    "recipe": {"stage": [{"epochs": 3, "rule": [{"match": "*", "scheme": "kmeans", "bits": 4}, {"ignore": True}]}, {}]},
    "provenance": {
        "sqnr": [20.5, None, -3], "rules": [0, 1], "left": {"fc.bias": "too small\n"}, "parameters": 12, "seed": -1,
        "top1": {"packed": 1, "dense": None}, "data": {"name": "digits", "version": "1", "split": "test", "n": 0},
        "versions": {"timm": "1.0"}, "anything": [{"else": "\x1b"}],
    },
}  # fmt: skip


def test_good_objects_are_read_as_they_are() -> None:
    with PackedFile.from_bytes(forged(lambda fields: fields.update(GOOD))) as file:
        assert {key: getattr(file, key) for key in GOOD} == GOOD


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("model.name", ["", "x" * 129, 1, None, ["resnet18"], {}]),
        ("model.args", [[], None, "num_classes", 1, {"a b": 1}, {"": 1}, {"x" * 65: 1}, {"a=1);f(": 1}, {"\x1b": 1}]),
        ("model.args.act_layer", ["\x1b[2J", "a\nb", {"\x07": 1}, ["\u202e"]]),
        ("model.other", [1]),
        ("preprocessing.input_size", [5, [], [3, 224], [3, 0, 224], [3, 224.0, 224], [3, 8192, 8192], [4097, 1, 1]]),
        ("preprocessing.mean", [0.5, [], [None], ["0.5"], [True], [1e7], [0.5] * 4097]),
        ("preprocessing.std", [1.0, [0.0], [-1], [1e-7], [1e7], {}]),
        ("preprocessing.interpolation", ["linear", "", 2, None, ["bicubic"]]),
        ("preprocessing.crop_pct", [0, 0.09, -1, 10.1, 1e308, True, "1", None]),
        ("preprocessing.crop_mode", ["middle", 1, {}]),
        ("preprocessing.label_names", [[], "cat", ["a", 1], ["\x1b[2J"], ["x" * 201], {"0": "cat"}, None]),
        ("preprocessing.hue", [1]),
        ("recipe.stage", [{}, "none", [1], [[]], [{"rule": {}}], [{"rule": [1]}], [{"rule": [{"match": 1}]}]]),
        ("recipe.stage", [[{"rule": [{"scheme": ["kmeans"]}]}], [{"rule": [{"match": "\x1b[2J"}]}], [{"\x07": 1}]]),
        ("recipe.other", [1]),
        ("provenance.sqnr", ["much", [True], ["1"], [1e300], {}]),
        ("provenance.rules", [[-1], [0.0], 3, [1 << 40]]),
        ("provenance.left", [["fc"], {"fc": 1}, None]),
        ("provenance.parameters", [-1, 1.5, "1", 10**30]),
        ("provenance.seed", [0.0, "0", 10**30, None]),
        ("provenance.top1", [0.98, {}, {"packed": 7.0}, {"packed": -0.1}, {"packed": "1"}, {"packed": 1, "dense": 2}]),
        ("provenance.data", ["digits", {}, {"name": "digits", "version": "1", "split": "test"}]),
        ("provenance.data.n", [-1, 1.0, None]),
        ("provenance.data.name", [1, None]),
        ("provenance.versions", ["1.0", {"timm": 1}]),
    ],
)  # fmt: skip
def test_each_field(path: str, values: list[Any]) -> None:
    top, *rest = path.split(".")
    for value in values:

        def edit(fields: dict[str, Any], value: Any = value) -> None:
            fields[top] = node = {key: dict(one) if isinstance(one, dict) else one for key, one in GOOD[top].items()}
            for key in rest[:-1]:
                node = node[key]
            node[rest[-1]] = value

        refuse(forged(edit), FormatError, f"metadata: {top}: ")


@pytest.mark.parametrize("model", [{"name": "resnet18"}, {"args": {}}])
def test_a_model_has_name_and_args(model: dict[str, Any]) -> None:
    refuse(forged(lambda fields: fields.update(model=model)), FormatError, "metadata: model: no '")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"version":2}', '"version": 2}'),  # a space
        ('"start":0.5', '"start":0.50'),
        ('"start":0.5', '"start":5e-1'),
        ('"start":0.5', '"start":0.500000000000000000001'),
        ('"end":"e"', '"end":"\\u0065"'),
        ('"end":"e"', '"end":"é"'),  # not ASCII
        ('{"end":"e","start":0.5}', '{"start":0.5,"end":"e"}'),
    ],
)
def test_metadata_has_one_text(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two files of one content would have two hashes."""

    def respelt(fields: object) -> str:
        text = canonical_json(fields)
        assert text.count(old) == 1
        return text.replace(old, new)

    monkeypatch.setattr("tests.helpers.forging.canonical_json", respelt)
    data = forged(lambda fields: fields.update(provenance={"extra": {"start": 0.5, "end": "e"}}))
    refuse(data, FormatError, "not in canonical form")


def test_numbers_beyond_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    def respelt(fields: object) -> str:
        return canonical_json(fields).replace('"x":0', '"x":1e999')

    monkeypatch.setattr("tests.helpers.forging.canonical_json", respelt)
    refuse(forged(lambda fields: fields.update(provenance={"x": 0})), FormatError, "1e999 is beyond the range")
