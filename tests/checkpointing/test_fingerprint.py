"""Fingerprints of trainings: every place where two of them differ has its sentence."""

from __future__ import annotations

from typing import Any

import pytest

from compressor.checkpointing.fingerprint import as_json, differences


@pytest.mark.parametrize(
    ("then", "now", "sentences"),
    [
        ({"seed": 0, "lr": 0.1}, {"lr": 0.1, "seed": 0}, []),
        ({"seed": 0}, {"seed": 1}, ["seed was 0, is 1"]),
        ({"a": {"b": None}}, {"a": {"b": "x"}}, ['a.b was null, is "x"']),
        ({"old": 1}, {"new": 2}, ["old was 1, is null", "new was null, is 2"]),
        (
            {"mean": [0.5, 0.5, 0.25]},
            {"mean": [0.5, 0.75, 0.5]},
            ["mean 2 was 0.5, is 0.75", "mean 3 was 0.25, is 0.5"],
        ),
        ({"mean": [0.5]}, {"mean": [0.5, 0.5]}, ["mean was [0.5], is [0.5, 0.5]"]),
        ({"mean": []}, {"mean": [1]}, ["mean was [], is [1]"]),
        ({"mean": 1}, {"mean": [1]}, ["mean was 1, is [1]"]),
        ({"rules": [{"bits": 4}]}, {"rules": [{"bits": 2}]}, ["rules 1.bits was 4, is 2"]),
    ],
)
def test_each_difference_is_a_sentence(then: Any, now: Any, sentences: list[str]) -> None:
    assert list(differences(then, now)) == sentences


def test_tuples_are_compared_as_lists() -> None:
    assert as_json({"mean": (0.5, (1, 2))}) == {"mean": [0.5, [1, 2]]}
