"""Float dtypes: values between two of a dtype become the nearest, those in the middle the even one."""

from __future__ import annotations

import numpy as np
import pytest

from compressor.formats.dtypes import from_storage, round_to, to_storage

STEP = 2.0**-7  # between 1 and 2, of bfloat16
ROUNDED = [
    (1.0, 1.0),
    (1.0 + STEP / 2, 1.0),
    (1.0 + STEP / 2 + 2.0**-23, 1.0 + STEP),
    (1.0 + STEP * 3 / 2 - 2.0**-23, 1.0 + STEP),
    (1.0 + STEP * 3 / 2, 1.0 + STEP * 2),
    (2.0 - STEP / 2, 2.0),
    (254.25 * 2.0**120, 254 * 2.0**120),
    (255.5 * 2.0**120, np.inf),
    (np.inf, np.inf),
    (0.0, 0.0),
]


@pytest.mark.parametrize(("value", "rounded"), ROUNDED)
def test_bfloat16_is_rounded_to_nearest_ties_to_even(value: float, rounded: float) -> None:
    found = round_to(np.array([value, -value], np.float32), "BF16")
    assert found.tolist() == np.array([rounded, -rounded], np.float32).tolist()


def test_nan_stays_nan() -> None:
    for bits in (0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF):  # the sum of the last and 0x7FFF has 33 bits
        assert np.isnan(round_to(np.array([bits], np.uint32).view(np.float32), "BF16")).all()


@pytest.mark.parametrize(("dtype", "data"), [("F32", "0000803f 000000c0"), ("F16", "003c 00c0"), ("BF16", "803f 00c0")])
def test_stored_values_are_little_endian(dtype: str, data: str) -> None:
    assert to_storage(np.array([1.0, -2.0], np.float32), dtype) == bytes.fromhex(data)
    assert from_storage(bytes.fromhex(data), dtype).tolist() == [1.0, -2.0]
