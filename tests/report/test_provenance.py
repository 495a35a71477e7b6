"""Provenance is validated by itself, whatever the reader of files has checked before."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from compressor.report.provenance import Accuracy, Measured, Provenance


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_shares_from_0_to_1_are_taken(share: float) -> None:
    assert Accuracy(packed=share).packed == share
    assert Accuracy(packed=1, dense=share).dense == share


@pytest.mark.parametrize("share", [-1e-9, 1.0001, 98.0, float("nan"), None])
def test_other_shares_are_refused(share: Any) -> None:
    with pytest.raises(ValidationError, match="packed"):
        Accuracy(packed=share)


@pytest.mark.parametrize("facts", [{"top1": {"packed": 1, "dense": 1.5}}, {"rules": [-1]}, {"parameters": -1}])
def test_other_provenance_is_refused(facts: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Provenance.model_validate(facts)


def test_control_characters_are_escaped() -> None:
    data = {"name": "\x1b[2J", "version": "1", "split": "a\x00", "n": 1}
    read = Provenance.model_validate({"left": {"fc\n": "x\x7f"}, "data": data})
    assert read.left == {"fc\\x0a": "x\\x7f"}
    assert read.data == Measured(name="\\x1b[2J", version="1", split="a\\x00", n=1)


def test_all_of_it_may_be_absent_and_more_may_be_there() -> None:
    assert Provenance.model_validate({}).model_dump() == {
        "sqnr": [], "rules": [], "left": {}, "parameters": None, "seed": 0, "versions": {},
        "top1": None, "data": None,
    }  # fmt: skip
    data = {"name": "digits", "version": "digits-1", "split": "test", "n": 360}
    read = Provenance.model_validate({"versions": {"torch": "2"}, "data": data})
    assert read.data == Measured(name="digits", version="digits-1", split="test", n=360)
    assert read.versions == {"torch": "2"}
    more = Provenance.model_validate({"calibration": {"images": 100}})
    assert more.model_extra == {"calibration": {"images": 100}}
