"""What machine code computes with real numbers, against numpy."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from compressor.formats.jit.builder import Code
from compressor.formats.jit.cache import compiled_kernel
from compressor.formats.jit.values import Real

RESULTS = 6
anything = arrays(np.float32, st.integers(1, 50), elements=st.floats(width=32))


def _write(code: Code, item: int) -> None:
    numbers, results, count, place = code.array(0, item), code.array(1, item), code.number(2), code.variable(0)
    with code.loop(lambda: place.get() < count):
        at, number = place.get(), numbers.real(place.get())
        for position, result in enumerate(_compute(number)):
            results.put(at * RESULTS + position, result)
        place.set(at + 1)
    code.give(0)


def _compute(number: Real) -> list[Real]:
    either = (number * 0.0).where(number > 1.0, number.inverse())
    return [
        number.exp(),
        number.size(),
        number.within(-2.0, 3.0),
        number.whole(200).real(),
        either,
        number.at_most(2.0),
    ]


@given(anything)
@example(np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 87.7, 88.1, -87.3, -87.8], np.float32))
def test_real_numbers(numbers: NDArray[np.float32]) -> None:
    results = np.full((len(numbers), RESULTS), 7, np.float32)
    native = compiled_kernel(_write, 32)
    assert native is not None
    native(numbers, results, len(numbers))
    exp, size, within, whole, either, at_most = results.T
    with np.errstate(all="ignore"):
        real = np.nan_to_num(numbers.astype(np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        expected = np.where(real < -87.5, exp, np.exp(np.minimum(real, 88)))
        np.testing.assert_allclose(exp, expected, rtol=5e-6)
        assert ((exp[real < -87.5] >= 0) & (exp[real < -87.5] < 2e-38)).all()
        assert (exp[real < -88] == 0).all()
        np.testing.assert_array_equal(size, np.abs(numbers))
        np.testing.assert_array_equal(within, np.clip(real, -2, 3))
        np.testing.assert_array_equal(whole, np.floor(np.clip(real, 0, 200)))
        np.testing.assert_array_equal(at_most, np.minimum(numbers, 2))
        np.testing.assert_array_equal(either, np.where(numbers > 1, numbers * np.float32(0), 1 / numbers))
