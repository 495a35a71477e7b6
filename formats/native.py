"""A few lines of arithmetic as machine code: spelled in ``Value`` and ``Code``, compiled by LLVM in milliseconds.

No Python object is in the code that comes out, so the interpreter's lock is not held while it runs. Integers have 64
bits and stay below 2**63; loads widen, stores cut off. Real numbers have 32 and are computed in the order written, as
IEEE 754 says; sums may have 64.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

__all__ = ["Array", "Code", "Real", "Value", "Variable", "compile_function"]

_WORD = ir.IntType(64)
_BYTES = ir.IntType(8).as_pointer()
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
        return _WORD(other) if isinstance(other, int) else other.name

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
        return Value(self._builder, self._builder.zext(less, _WORD))

    def choose(self, when: Value | int, otherwise: Value | int) -> Value:
        """Give ``when`` where this is not 0, else ``otherwise``, without a branch."""
        true = self._builder.icmp_unsigned("!=", self.name, _WORD(0))
        return Value(self._builder, self._builder.select(true, self.operand(when), self.operand(otherwise)))

    def swap_bytes(self) -> Value:
        """Give the eight bytes in reverse."""
        return Value(self._builder, self._builder.bswap(self.name))


class Real:
    """A float32 that the code will compute."""

    def __init__(self, builder: ir.IRBuilder, name: Any) -> None:
        self._builder = builder
        self.name = name

    def __sub__(self, other: Real) -> Real:
        return Real(self._builder, self._builder.fsub(self.name, other.name))

    def __mul__(self, other: Real) -> Real:
        return Real(self._builder, self._builder.fmul(self.name, other.name))

    def __lt__(self, other: Real) -> Value:
        """Give 1 where this is less, else 0: also where one is not a number."""
        less = self._builder.fcmp_ordered("<", self.name, other.name)
        return Value(self._builder, self._builder.zext(less, _WORD))

    def whole(self, most: int) -> Value:
        """Cut off the fraction; 0 for what is less or not a number, ``most`` for what is more."""
        low, high = _REAL(0.0), _REAL(float(most))
        within = self._builder.select(self._builder.fcmp_ordered("<", low, self.name), self.name, low)
        within = self._builder.select(self._builder.fcmp_ordered("<", within, high), within, high)
        return Value(self._builder, self._builder.fptosi(within, _WORD))


class Variable:
    """An integer that the code changes as it runs."""

    def __init__(self, builder: ir.IRBuilder, start: Value | int) -> None:
        self._builder = builder
        self._place = builder.alloca(_WORD)
        self.set(start)

    def get(self) -> Value:
        """Give the value it has at this point."""
        return Value(self._builder, self._builder.load(self._place))

    def set(self, value: Value | int) -> None:
        """Change it."""
        self._builder.store(_WORD(value) if isinstance(value, int) else value.name, self._place)


class Array:
    """Memory of unsigned items; nothing checks that a place is within it."""

    def __init__(self, builder: ir.IRBuilder, pointer: Any, bits: int) -> None:
        self._builder = builder
        self._bytes = builder.bitcast(pointer, _BYTES)
        self._step = bits // 8
        self._item = ir.IntType(bits)

    def _at(self, place: Value | int, item: Any, step: int) -> Any:
        offset = _WORD(place * step) if isinstance(place, int) else (place * step).name
        return self._builder.bitcast(self._builder.gep(self._bytes, [offset]), item.as_pointer())

    def __getitem__(self, place: Value | int) -> Value:
        item = self._builder.load(self._at(place, self._item, self._step), align=self._step)
        return Value(self._builder, item if self._item == _WORD else self._builder.zext(item, _WORD))

    def __setitem__(self, place: Value | int, value: Value) -> None:
        cut = value.name if self._item == _WORD else self._builder.trunc(value.name, self._item)
        self._builder.store(cut, self._at(place, self._item, self._step), align=self._step)

    def real(self, place: Value | int) -> Real:
        """Read the bits of an item as a float32."""
        return Real(self._builder, self._builder.load(self._at(place, _REAL, 4), align=4))

    def add(self, place: Value | int, term: Real) -> None:
        """Add to an item whose bits are a float64."""
        at = self._at(place, _LONG_REAL, 8)
        longer = self._builder.fpext(term.name, _LONG_REAL)
        self._builder.store(self._builder.fadd(self._builder.load(at, align=8), longer), at, align=8)

    def word_at(self, byte: Value) -> Value:
        """Give the eight bytes from ``byte`` on, which need not be aligned, as one integer."""
        return Value(self._builder, self._builder.load(self._at(byte, _WORD, 1), align=1))


class Code:
    """The body of a function in the making."""

    def __init__(self, function: ir.Function) -> None:
        self._builder = ir.IRBuilder(function.append_basic_block())
        self._arguments = function.args

    def number(self, position: int) -> Value:
        """Give an argument that is a number."""
        return Value(self._builder, self._arguments[position])

    def array(self, position: int, bits: int) -> Array:
        """Give an argument that is an array of unsigned items of ``bits`` bits."""
        return Array(self._builder, self._builder.inttoptr(self._arguments[position], _BYTES), bits)

    def constant(self, number: int) -> Value:
        """Give a number known beforehand."""
        return Value(self._builder, _WORD(number))

    def variable(self, start: Value | int) -> Variable:
        """Make a variable; outside loops, or the stack grows with each turn."""
        return Variable(self._builder, start)

    @contextmanager
    def loop(self, condition: Callable[[], Value]) -> Iterator[None]:
        """Repeat the body as long as the condition, computed anew each turn, is not 0."""
        head, body, after = (self._builder.append_basic_block() for _ in range(3))
        self._builder.branch(head)
        self._builder.position_at_end(head)
        self._builder.cbranch(self._builder.icmp_unsigned("!=", condition().name, _WORD(0)), body, after)
        self._builder.position_at_end(body)
        yield
        self._builder.branch(head)
        self._builder.position_at_end(after)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Run the body only where the condition is not 0."""
        with self._builder.if_then(self._builder.icmp_unsigned("!=", condition.name, _WORD(0))):
            yield

    def give(self, value: Value | int) -> None:
        """Return from the function."""
        self._builder.ret(_WORD(value) if isinstance(value, int) else value.name)


def compile_function(write: Callable[[Code], None], arguments: int) -> Callable[..., int]:
    """Compile what ``write`` writes: a function of so many int64 numbers and arrays, giving int64.

    Arrays are passed as they are; the caller keeps them contiguous and of the item size the code expects.
    """
    module = ir.Module()
    write(Code(ir.Function(module, ir.FunctionType(_WORD, [_WORD] * arguments), "f")))
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=llvm.get_host_cpu_name(), opt=2)
    parsed = llvm.parse_assembly(str(module))
    _optimise(parsed, machine)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    run = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * arguments)(engine.get_function_address("f"))
    run.engine = engine  # type: ignore[attr-defined] # the code lives as long as its engine

    def call(*values: NDArray[Any] | int) -> int:
        return int(run(*[value.ctypes.data if isinstance(value, np.ndarray) else value for value in values]))

    return call


def _optimise(module: llvm.ModuleRef, machine: llvm.TargetMachine) -> None:
    """Put variables into registers; what else LLVM has for it takes longer, for no more speed."""
    passes = llvm.create_new_function_pass_manager()
    passes.add_sroa_pass()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options())
    for function in module.functions:
        passes.run(function, builder)
