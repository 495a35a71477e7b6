"""What the steps of a kernel compute with: integers, real numbers, variables and arrays; see ``jit.builder``.

These objects are returned by the methods of ``Code`` and by each other's operators; kernels construct none themselves.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir

__all__ = ["WORD", "Array", "Real", "Value", "Variable"]

WORD = ir.IntType(64)
"""LLVM's type of integers and addresses."""

_HALF = ir.IntType(32)
_REAL, _LONG_REAL = ir.FloatType(), ir.DoubleType()


class Value:
    """An unsigned integer of 64 bits that the kernel computes.

    Operators +, -, *, //, &, |, << and >> write a step and return its result; the right operand may be an int. The only
    comparison is ``<``, whose result is 1 or 0.

    Args:
        builder: LLVM's builder of the kernel.
        name: LLVM's name of the number.

    Example:
        >>> from compressor.formats.jit.builder import Code, compile_function
        >>> def write_larger(code: Code) -> None:
        ...     one, two = code.number(0), code.number(1)
        ...     code.give((one < two).choose(two, one))
        >>> compile_function(write_larger, 2)(3, 5)
        5
    """

    def __init__(self, builder: ir.IRBuilder, name: Any) -> None:
        self._builder = builder
        self.name = name

    def _apply(self, operation: str, other: Value | int) -> Value:
        return Value(self._builder, getattr(self._builder, operation)(self.name, self.operand(other)))

    def operand(self, other: Value | int) -> Any:
        """Returns LLVM's name of the other operand."""
        return WORD(other) if isinstance(other, int) else other.name

    def __add__(self, other: Value | int) -> Value:
        return self._apply("add", other)

    def __sub__(self, other: Value | int) -> Value:
        return self._apply("sub", other)

    def __mul__(self, other: Value | int) -> Value:
        return self._apply("mul", other)

    def __floordiv__(self, other: Value | int) -> Value:
        return self._apply("udiv", other)

    def __and__(self, other: Value | int) -> Value:
        return self._apply("and_", other)

    def __or__(self, other: Value | int) -> Value:
        return self._apply("or_", other)

    def __lshift__(self, other: Value | int) -> Value:
        return self._apply("shl", other)

    def __rshift__(self, other: Value | int) -> Value:
        return self._apply("lshr", other)

    def __lt__(self, other: Value | int) -> Value:
        """Returns 1 where this is less than the other as an unsigned number, else 0."""
        less = self._builder.icmp_unsigned("<", self.name, self.operand(other))
        return Value(self._builder, self._builder.zext(less, WORD))

    def choose(self, when: Value | int, otherwise: Value | int) -> Value:
        """Returns ``when`` where this is not 0, else ``otherwise``; both are computed, and there is no branch."""
        true = self._builder.icmp_unsigned("!=", self.name, WORD(0))
        return Value(self._builder, self._builder.select(true, self.operand(when), self.operand(otherwise)))

    def real(self) -> Real:
        """Returns the number as a float32, rounded to nearest."""
        return Real(self._builder, self._builder.sitofp(self.name, _REAL))

    def as_real(self) -> Real:
        """Returns the float32 whose bits are the low 32 bits of this."""
        return Real(self._builder, self._builder.bitcast(self._builder.trunc(self.name, _HALF), _REAL))

    def swap_bytes(self) -> Value:
        """Returns the eight bytes in reverse order."""
        return Value(self._builder, self._builder.bswap(self.name))


class Real:
    """A float32 that the kernel computes.

    Operators +, - and * write a step, rounded to nearest, and return its result; the right operand may be a float.
    Comparisons ``<`` and ``>`` return a ``Value``, 1 or 0.

    Args:
        builder: LLVM's builder of the kernel.
        name: LLVM's name of the number.

    Example:
        >>> import numpy as np
        >>> from compressor.formats.jit.builder import Code, compile_function
        >>> def write_clipped_double(code: Code) -> None:
        ...     numbers = code.array(0, 32)
        ...     numbers.put(0, (numbers.real(0) * 2.0).within(-1.0, 1.0))
        ...     code.give(0)
        >>> numbers = np.array([0.25, 3.0], np.float32)
        >>> compile_function(write_clipped_double, 1)(numbers), numbers.tolist()
        (0, [0.5, 3.0])
    """

    def __init__(self, builder: ir.IRBuilder, name: Any) -> None:
        self._builder = builder
        self.name = name

    def _apply(self, operation: str, other: Real | float) -> Real:
        return Real(self._builder, getattr(self._builder, operation)(self.name, self._operand(other)))

    def _operand(self, other: Real | float) -> Any:
        return _REAL(other) if isinstance(other, int | float) else other.name

    def __add__(self, other: Real | float) -> Real:
        return self._apply("fadd", other)

    def __sub__(self, other: Real | float) -> Real:
        return self._apply("fsub", other)

    def __mul__(self, other: Real | float) -> Real:
        return self._apply("fmul", other)

    def __lt__(self, other: Real | float) -> Value:
        """Returns 1 where this is less than the other, else 0; 0 where either is NaN."""
        return self._compare("<", other)

    def __gt__(self, other: Real | float) -> Value:
        """Returns 1 where this is greater than the other, else 0; 0 where either is NaN."""
        return self._compare(">", other)

    def _compare(self, sign: str, other: Real | float) -> Value:
        true = self._builder.fcmp_ordered(sign, self.name, self._operand(other))
        return Value(self._builder, self._builder.zext(true, WORD))

    def inverse(self) -> Real:
        """Returns 1 divided by this."""
        return Real(self._builder, self._builder.fdiv(_REAL(1.0), self.name))

    def where(self, condition: Value, otherwise: Real | float) -> Real:
        """Returns this where the condition is not 0, else ``otherwise``; both are computed, and there is no branch."""
        true = self._builder.icmp_unsigned("!=", condition.name, WORD(0))
        return Real(self._builder, self._builder.select(true, self.name, self._operand(otherwise)))

    def within(self, low: float, high: float) -> Real:
        """Returns this limited to [low, high]; ``low`` for NaN."""
        above = self.where(self > low, low)
        return above.where(above < high, high)

    def at_most(self, high: float) -> Real:
        """Returns the smaller of this and ``high``; NaN for NaN."""
        return Real(self._builder, _REAL(high)).where(self > high, self)

    def size(self) -> Real:
        """Returns the absolute value; -0.0 for -0.0."""
        return (self * -1.0).where(self < 0.0, self)

    def whole(self, most: int) -> Value:
        """Returns this limited to [0, most] and truncated to an integer; 0 for NaN."""
        return Value(self._builder, self._builder.fptosi(self.within(0.0, float(most)).name, WORD))

    def exp(self) -> Real:
        """Returns e to the power of this, with a relative error of at most 5e-6; 0 below -87.7, e**88 above 88.

        With n the integer nearest to x / log 2 and r = x / log 2 - n, e**x = 2**n * 2**r: 2**n is a float32 whose
        exponent is n, 2**r the Taylor polynomial of degree 6 around 0.
        """
        power = self.within(-100.0, 88.0) * (1 / math.log(2))
        biased = (power + 127.5).whole(254)  # n + 127, as a float32 stores its exponent
        remainder = power - (biased.real() - 127.0)
        factor: Real | float = 0.0
        for degree in range(6, -1, -1):
            factor = remainder * factor + math.log(2) ** degree / math.factorial(degree)
        return (biased << 23).as_real() * factor


class Variable:
    """An integer that the kernel changes as it runs, such as the counter of a loop.

    Args:
        builder: LLVM's builder of the kernel.
        start: the value it has at this point of the kernel.

    Example:
        >>> from compressor.formats.jit.builder import Code, compile_function
        >>> def write_factorial(code: Code) -> None:
        ...     factor, product = code.variable(code.number(0)), code.variable(1)
        ...     with code.loop(lambda: code.constant(1) < factor.get()):
        ...         product.set(product.get() * factor.get())
        ...         factor.set(factor.get() - 1)
        ...     code.give(product.get())
        >>> compile_function(write_factorial, 1)(5)
        120
    """

    def __init__(self, builder: ir.IRBuilder, start: Value | int) -> None:
        self._builder = builder
        with builder.goto_entry_block():  # allocated in a loop, the stack would grow with each turn
            self._slot = builder.alloca(WORD)
        self.set(start)

    def get(self) -> Value:
        """Returns the value it has at this point of the kernel; later changes do not affect the result."""
        return Value(self._builder, self._builder.load(self._slot))

    def set(self, value: Value | int) -> None:
        """Changes it to a value."""
        self._builder.store(WORD(value) if isinstance(value, int) else value.name, self._slot)


class Array:
    """Consecutive unsigned items in memory, read as ``array[position]`` and written as ``array[position] = value``.

    Nothing checks that a position is within the array. Items of 32 bits may be used as float32 by ``real`` and ``put``,
    items of 64 as float64 by ``add``.

    Args:
        builder: LLVM's builder of the kernel.
        pointer: LLVM's name of the address of its first byte.
        bits: the bits of an item.

    Example:
        >>> import numpy as np
        >>> from compressor.formats.jit.builder import Code, compile_function
        >>> def write_swap(code: Code) -> None:
        ...     items = code.array(0, 8)
        ...     first = items[0]
        ...     items[0] = items[1]
        ...     items[1] = first
        ...     code.give(first)
        >>> items = np.array([3, 200], np.uint8)
        >>> compile_function(write_swap, 1)(items), items.tolist()
        (3, [200, 3])
    """

    def __init__(self, builder: ir.IRBuilder, pointer: Any, bits: int) -> None:
        self._builder = builder
        self._bytes = pointer
        self._step = bits // 8
        self._item = ir.IntType(bits)

    def after(self, items: int) -> Array:
        """Returns the array that begins ``items`` items further on."""
        pointer = self._builder.gep(self._bytes, [WORD(items * self._step)])
        return Array(self._builder, pointer, 8 * self._step)

    def _pointer(self, position: Value | int, item: Any, step: int) -> Any:
        offset = WORD(position * step) if isinstance(position, int) else (position * step).name
        return self._builder.bitcast(self._builder.gep(self._bytes, [offset]), item.as_pointer())

    def __getitem__(self, position: Value | int) -> Value:
        item = self._builder.load(self._pointer(position, self._item, self._step), align=self._step)
        return Value(self._builder, item if self._item == WORD else self._builder.zext(item, WORD))

    def __setitem__(self, position: Value | int, value: Value) -> None:
        low_bits = value.name if self._item == WORD else self._builder.trunc(value.name, self._item)
        self._builder.store(low_bits, self._pointer(position, self._item, self._step), align=self._step)

    def real(self, position: Value | int) -> Real:
        """Returns an item of 32 bits as a float32."""
        return Real(self._builder, self._builder.load(self._pointer(position, _REAL, 4), align=4))

    def put(self, position: Value | int, number: Real) -> None:
        """Writes a float32 as an item of 32 bits."""
        self._builder.store(number.name, self._pointer(position, _REAL, 4), align=4)

    def add(self, position: Value | int, term: Real) -> None:
        """Adds a float32 to an item of 64 bits, which is a float64."""
        pointer = self._pointer(position, _LONG_REAL, 8)
        longer = self._builder.fpext(term.name, _LONG_REAL)
        self._builder.store(self._builder.fadd(self._builder.load(pointer, align=8), longer), pointer, align=8)

    def word_at(self, byte: Value) -> Value:
        """Returns the eight bytes from ``byte`` on, at any alignment, as one little-endian integer."""
        return Value(self._builder, self._builder.load(self._pointer(byte, WORD, 1), align=1))
