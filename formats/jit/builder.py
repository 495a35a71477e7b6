"""A few lines of arithmetic as machine code: spelled in ``operands`` and ``Code``, compiled by LLVM in milliseconds.

No Python object is in the code that comes out, so the interpreter's lock is not held while it runs. Integers have 64
bits and stay below 2**63; loads widen, stores cut off. Real numbers have 32 and are computed in the order written, as
IEEE 754 says; sums may have 64.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from compressor.formats.jit.values import WORD, Array, Real, Value, Variable

__all__ = ["Code", "MachineCode", "compile_function"]


class Code:
    """The body of a function in the making."""

    def __init__(self, function: ir.Function) -> None:
        self._builder = ir.IRBuilder(function.append_basic_block())
        self._arguments = function.args
        self.used = 0

    def number(self, position: int) -> Value:
        """Give an argument that is a number."""
        return Value(self._builder, self._builder.ptrtoint(self._argument(position), WORD))

    def _argument(self, position: int) -> ir.Argument:
        self.used = max(self.used, position + 1)
        return self._arguments[position]

    def array(self, position: int, bits: int) -> Array:
        """Give an argument that is an array of unsigned items of ``bits`` bits."""
        return Array(self._builder, self._argument(position), bits)

    def constant(self, number: int) -> Value:
        """Give a number known beforehand."""
        return Value(self._builder, WORD(number))

    def real(self, number: float) -> Real:
        """Give a real number known beforehand."""
        return Real(self._builder, ir.FloatType()(number))

    def variable(self, start: Value | int) -> Variable:
        """Make a variable; where it is made it gets its start, in a loop each turn anew."""
        return Variable(self._builder, start)

    @contextmanager
    def loop(self, condition: Callable[[], Value]) -> Iterator[None]:
        """Repeat the body as long as the condition, computed anew each turn, is not 0."""
        head, body, after = (self._builder.append_basic_block() for _ in range(3))
        self._builder.branch(head)
        self._builder.position_at_end(head)
        self._builder.cbranch(self._builder.icmp_unsigned("!=", condition().name, WORD(0)), body, after)
        self._builder.position_at_end(body)
        yield
        self._builder.branch(head)
        self._builder.position_at_end(after)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Run the body only where the condition is not 0."""
        with self._builder.if_then(self._builder.icmp_unsigned("!=", condition.name, WORD(0))):
            yield

    def call(self, address: Value, *arguments: Value) -> Value:
        """Call the function at an address, of int64 numbers and giving one."""
        kind = ir.FunctionType(WORD, [WORD] * len(arguments)).as_pointer()
        function = self._builder.inttoptr(address.name, kind)
        return Value(self._builder, self._builder.call(function, [argument.name for argument in arguments]))

    def give(self, value: Value | int) -> None:
        """Return from the function."""
        self._builder.ret(WORD(value) if isinstance(value, int) else value.name)


class MachineCode:
    """A compiled function of int64 numbers and arrays, giving int64; it lives as long as this."""

    def __init__(self, engine: llvm.ExecutionEngine, arguments: int, used: int) -> None:
        self._engine = engine
        self._arguments, self._used = arguments, used
        self.address: int = engine.get_function_address("f")
        self._run = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * arguments)(self.address)

    def __call__(self, *values: NDArray[Any] | int) -> int:
        """Call it; arrays are passed as they are, by their addresses."""
        return int(self._run(*self.given(values)))

    def given(self, values: Sequence[NDArray[Any] | int]) -> list[int]:
        """Give numbers and addresses, and 0 for the arguments the function does not use."""
        self.expect(len(values))
        given = [value.ctypes.data if isinstance(value, np.ndarray) else value for value in values]
        return given + [0] * (self._arguments - len(given))

    def expect(self, values: int) -> None:
        """Raise TypeError where the function takes another number of values."""
        if values != self._used:
            raise TypeError(f"{values} arguments, expected {self._used}")


def compile_function(write: Callable[[Code], None], arguments: int, vectorise: bool = False) -> MachineCode:
    """Compile what ``write`` writes: a function of at most so many numbers and arrays.

    The caller keeps arrays contiguous, of the item size the code expects, and apart from each other. To ``vectorise``
    takes several times as long; loops have to be without a branch.
    """
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(WORD, [ir.IntType(8).as_pointer()] * arguments), "f")
    for argument in function.args:
        argument.add_attribute("noalias")
    code = Code(function)
    write(code)
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=_features(),
        opt=2,
    )
    parsed = llvm.parse_assembly(str(module))
    (_vectorise if vectorise else _optimise)(parsed, machine)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    return MachineCode(engine, arguments, code.used)


def _features() -> str:
    """List what the processor has: a virtual machine may lack what the name of its processor implies."""
    try:
        return str(llvm.get_host_cpu_features().flatten())
    except RuntimeError:  # not told on some systems
        return ""


def _optimise(module: llvm.ModuleRef, machine: llvm.TargetMachine) -> None:
    """Put variables into registers; what else LLVM has for it takes longer, for no more speed."""
    passes = llvm.create_new_function_pass_manager()
    passes.add_sroa_pass()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options())
    for function in module.functions:
        passes.run(function, builder)


def _vectorise(module: llvm.ModuleRef, machine: llvm.TargetMachine) -> None:
    """Do all that LLVM has, the vectoriser of loops included."""
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = True
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
