"""The numbers that machine code computes with, spelled as Python's: integers, real numbers, variables and arrays."""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir

__all__ = ["WORD", "Array", "Real", "Value", "Variable"]

WORD = ir.IntType(64)
_HALF = ir.IntType(32)
_REAL, _LONG_REAL = ir.FloatType(), ir.DoubleType()


class Value:
    """An integer that the code will compute."""

    def __init__(self, builder: ir.IRBuilder, name: Any) -> None:
        self._builder = builder
        self.name = name

    def _apply(self, operation: str, other: Value | int) -> Value:
        return Value(self._builder, getattr(self._builder, operation)(self.name, self.operand(other)))

    def operand(self, other: Value | int) -> Any:
        """Give the other operand as LLVM knows it."""
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
        """Give 1 where this is less, else 0."""
        less = self._builder.icmp_unsigned("<", self.name, self.operand(other))
        return Value(self._builder, self._builder.zext(less, WORD))

    def choose(self, when: Value | int, otherwise: Value | int) -> Value:
        """Give ``when`` where this is not 0, else ``otherwise``, without a branch."""
        true = self._builder.icmp_unsigned("!=", self.name, WORD(0))
        return Value(self._builder, self._builder.select(true, self.operand(when), self.operand(otherwise)))

    def real(self) -> Real:
        """Give the number as a float32."""
        return Real(self._builder, self._builder.sitofp(self.name, _REAL))

    def as_real(self) -> Real:
        """Take the lower 32 bits for a float32."""
        return Real(self._builder, self._builder.bitcast(self._builder.trunc(self.name, _HALF), _REAL))

    def swap_bytes(self) -> Value:
        """Give the eight bytes in reverse."""
        return Value(self._builder, self._builder.bswap(self.name))


class Real:
    """A float32 that the code will compute."""

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
        """Give 1 where this is less, else 0: also where one is not a number."""
        return self._compare("<", other)

    def __gt__(self, other: Real | float) -> Value:
        """Give 1 where this is more, else 0: also where one is not a number."""
        return self._compare(">", other)

    def _compare(self, sign: str, other: Real | float) -> Value:
        true = self._builder.fcmp_ordered(sign, self.name, self._operand(other))
        return Value(self._builder, self._builder.zext(true, WORD))

    def inverse(self) -> Real:
        """Divide 1 by this."""
        return Real(self._builder, self._builder.fdiv(_REAL(1.0), self.name))

    def where(self, condition: Value, otherwise: Real | float) -> Real:
        """Give this where the condition is not 0, else ``otherwise``, without a branch."""
        true = self._builder.icmp_unsigned("!=", condition.name, WORD(0))
        return Real(self._builder, self._builder.select(true, self.name, self._operand(otherwise)))

    def within(self, low: float, high: float) -> Real:
        """Give the number of this range that is nearest; ``low`` for what is not a number."""
        above = self.where(self > low, low)
        return above.where(above < high, high)

    def at_most(self, high: float) -> Real:
        """Give ``high`` for what is more; what is not a number stays so."""
        return Real(self._builder, _REAL(high)).where(self > high, self)

    def size(self) -> Real:
        """Drop the sign."""
        return (self * -1.0).where(self < 0.0, self)

    def whole(self, most: int) -> Value:
        """Cut off the fraction; 0 for what is less or not a number, ``most`` for what is more."""
        return Value(self._builder, self._builder.fptosi(self.within(0.0, float(most)).name, WORD))

    def exp(self) -> Real:
        """Give e to this power, off by 5e-6 of it at most; 0 below -87.7, e**88 above 88."""
        power = self.within(-100.0, 88.0) * (1 / math.log(2))
        biased = (power + 127.5).whole(254)  # the nearest whole power of two, as a float32's exponent
        rest = power - (biased.real() - 127.0)
        factor: Real | float = 0.0
        for degree in range(6, -1, -1):
            factor = rest * factor + math.log(2) ** degree / math.factorial(degree)
        return (biased << 23).as_real() * factor


class Variable:
    """An integer that the code changes as it runs."""

    def __init__(self, builder: ir.IRBuilder, start: Value | int) -> None:
        self._builder = builder
        with builder.goto_entry_block():  # in a loop the stack would grow with each turn
            self._place = builder.alloca(WORD)
        self.set(start)

    def get(self) -> Value:
        """Give the value it has at this point."""
        return Value(self._builder, self._builder.load(self._place))

    def set(self, value: Value | int) -> None:
        """Change it."""
        self._builder.store(WORD(value) if isinstance(value, int) else value.name, self._place)


class Array:
    """Memory of unsigned items; nothing checks that a place is within it."""

    def __init__(self, builder: ir.IRBuilder, pointer: Any, bits: int) -> None:
        self._builder = builder
        self._bytes = pointer
        self._step = bits // 8
        self._item = ir.IntType(bits)

    def after(self, items: int) -> Array:
        """Give what begins after so many items."""
        pointer = self._builder.gep(self._bytes, [WORD(items * self._step)])
        return Array(self._builder, pointer, 8 * self._step)

    def _at(self, place: Value | int, item: Any, step: int) -> Any:
        offset = WORD(place * step) if isinstance(place, int) else (place * step).name
        return self._builder.bitcast(self._builder.gep(self._bytes, [offset]), item.as_pointer())

    def __getitem__(self, place: Value | int) -> Value:
        item = self._builder.load(self._at(place, self._item, self._step), align=self._step)
        return Value(self._builder, item if self._item == WORD else self._builder.zext(item, WORD))

    def __setitem__(self, place: Value | int, value: Value) -> None:
        cut = value.name if self._item == WORD else self._builder.trunc(value.name, self._item)
        self._builder.store(cut, self._at(place, self._item, self._step), align=self._step)

    def real(self, place: Value | int) -> Real:
        """Read the bits of an item as a float32."""
        return Real(self._builder, self._builder.load(self._at(place, _REAL, 4), align=4))

    def put(self, place: Value | int, number: Real) -> None:
        """Write the bits of a float32 as an item."""
        self._builder.store(number.name, self._at(place, _REAL, 4), align=4)

    def add(self, place: Value | int, term: Real) -> None:
        """Add to an item whose bits are a float64."""
        at = self._at(place, _LONG_REAL, 8)
        longer = self._builder.fpext(term.name, _LONG_REAL)
        self._builder.store(self._builder.fadd(self._builder.load(at, align=8), longer), at, align=8)

    def word_at(self, byte: Value) -> Value:
        """Give the eight bytes from ``byte`` on, which need not be aligned, as one integer."""
        return Value(self._builder, self._builder.load(self._at(byte, WORD, 1), align=1))
