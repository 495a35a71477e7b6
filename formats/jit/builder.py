"""Kernels in machine code: a Python function describes the steps, and LLVM compiles them within milliseconds.

A kernel is written by a Python function that takes a ``Code`` and describes, step by step, what the kernel is to
compute. Its objects stand for numbers that exist only when the kernel runs:

* ``Value``: an integer of 64 bits, the result of one step. It has Python's operators and never changes.
* ``Real``: the same for a float32.
* ``Variable``: an integer that steps may change, such as a counter: ``get`` gives its value at this point as a
  ``Value``, ``set`` changes it.
* ``Array``: an argument in memory, with items that are read by ``array[position]`` and written by assignment to it.

Python's own ``if`` and ``for`` run while the kernel is written, and so choose or repeat the steps that are written.
What is decided or repeated when the kernel runs is written by ``Code.when`` and ``Code.loop``, or without a branch by
``Value.choose`` and ``Real.where``. A kernel that adds up the items below a bound:

    >>> def write_sum(code: Code) -> None:
    ...     numbers, count, bound = code.array(0, 32), code.number(1), code.number(2)  # the arguments
    ...     position, total = code.variable(0), code.variable(0)
    ...     with code.loop(lambda: position.get() < count):
    ...         number = numbers[position.get()]
    ...         with code.when(number < bound):
    ...             total.set(total.get() + number)
    ...         position.set(position.get() + 1)
    ...     code.give(total.get())
    >>> kernel = compile_function(write_sum, 3)
    >>> kernel(np.array([5, 1, 7, 2], np.uint32), 4, 7)
    8

Rules: nothing checks that a position is within its array. Integers are unsigned and wrap around at 2**64; only those
that are returned or converted to real numbers must be below 2**63. Loads widen items to 64 bits, stores keep the low
bits. Real numbers have 32 bits and are computed in the order written, each step rounded as IEEE 754 requires; sums in
memory may have 64. The left operand must be an object of this language: ``code.constant(1) << value`` works,
``1 << value`` does not.

Kernels use no Python object, so the interpreter lock is released while one runs.
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

from compressor.formats.jit.values import WORD, Array, Real, Value, Variable

__all__ = ["Code", "MachineCode", "compile_function"]


class Code:
    """The kernel that is being written: its arguments, constants, variables, loops and result.

    Attributes:
        used: the number of arguments the kernel takes: one more than the highest position asked for so far.

    Example:
        >>> def write_distance(code: Code) -> None:
        ...     one, two = code.number(0), code.number(1)
        ...     distance = code.variable(one - two)
        ...     with code.when(one < two):
        ...         distance.set(two - one)
        ...     code.give(distance.get())
        >>> compile_function(write_distance, 2)(3, 8)
        5
    """

    def __init__(self, function: ir.Function) -> None:
        self._builder = ir.IRBuilder(function.append_basic_block())
        self._arguments = function.args
        self.used = 0

    def number(self, position: int) -> Value:
        """Returns the argument at a position as a number."""
        return Value(self._builder, self._builder.ptrtoint(self._argument(position), WORD))

    def _argument(self, position: int) -> ir.Argument:
        self.used = max(self.used, position + 1)
        return self._arguments[position]

    def array(self, position: int, bits: int) -> Array:
        """Returns the argument at a position as an array of unsigned items.

        Args:
            position: the position of the argument, from 0.
            bits: the bits of an item: 8, 16, 32 or 64. An array of 32 also holds float32, one of 64 float64.
        """
        return Array(self._builder, self._argument(position), bits)

    def constant(self, number: int) -> Value:
        """Returns an integer that is known when the kernel is written."""
        return Value(self._builder, WORD(number))

    def real(self, number: float) -> Real:
        """Returns a real number that is known when the kernel is written."""
        return Real(self._builder, ir.FloatType()(number))

    def variable(self, start: Value | int) -> Variable:
        """Returns a new variable.

        Args:
            start: its value at this point of the kernel; in the body of a loop, at the beginning of each turn.
        """
        return Variable(self._builder, start)

    @contextmanager
    def loop(self, condition: Callable[[], Value]) -> Iterator[None]:
        """Repeats the steps of the ``with`` block as long as a condition is not 0.

        Args:
            condition: a function, since its steps are written into the loop, to be computed before each turn.
        """
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
        """Runs the steps of the ``with`` block only where the condition is not 0."""
        with self._builder.if_then(self._builder.icmp_unsigned("!=", condition.name, WORD(0))):
            yield

    def call(self, address: Value, *arguments: Value) -> Value:
        """Calls another function of machine code.

        Args:
            address: its address in memory.
            arguments: the int64 numbers it takes.

        Returns:
            The int64 number it returns.
        """
        kind = ir.FunctionType(WORD, [WORD] * len(arguments)).as_pointer()
        function = self._builder.inttoptr(address.name, kind)
        return Value(self._builder, self._builder.call(function, [argument.name for argument in arguments]))

    def give(self, value: Value | int) -> None:
        """Ends the kernel with its result; every kernel ends with one ``give``."""
        self._builder.ret(WORD(value) if isinstance(value, int) else value.name)


class MachineCode:
    """A compiled kernel, which is called with numbers and arrays and returns an integer.

    Its machine code is freed together with this object.

    Args:
        engine: the engine that holds the code.
        arguments: the number of arguments of the compiled function.
        used: the number of those that the kernel reads, which are the first.

    Attributes:
        address: the address of the function in memory; all its arguments and its result are int64.
    """

    def __init__(self, engine: llvm.ExecutionEngine, arguments: int, used: int) -> None:
        self._engine = engine
        self._arguments, self._used = arguments, used
        self.address: int = engine.get_function_address("f")
        self._run = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * arguments)(self.address)

    def __call__(self, *values: NDArray[Any] | int) -> int:
        """Runs the kernel and returns its result.

        Args:
            values: for each argument a number, an address, or an array, of which the address is passed: it must be
                contiguous and have items of the size that the kernel expects.

        Raises:
            TypeError: the kernel takes another number of arguments.
        """
        self.expect(len(values))
        integers = [value.ctypes.data if isinstance(value, np.ndarray) else value for value in values]
        return int(self._run(*integers, *[0] * (self._arguments - len(integers))))

    def expect(self, values: int) -> None:
        """Raises TypeError unless the kernel takes this number of arguments."""
        if values != self._used:
            raise TypeError(f"{values} arguments, expected {self._used}")


def compile_function(write: Callable[[Code], None], arguments: int, vectorise: bool = False) -> MachineCode:
    """Compiles a kernel.

    Args:
        write: the function that writes the kernel.
        arguments: the number of arguments of the compiled function; the kernel may use fewer.
        vectorise: whether LLVM vectorises loops, which must be free of branches; compilation then takes several times
            as long. By default only registers are allocated.

    Returns:
        The compiled kernel. Arrays passed to it must not overlap.
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
    """Returns the features of the processor; a virtual machine may lack some that the name of its processor implies."""
    try:
        return str(llvm.get_host_cpu_features().flatten())
    except RuntimeError:  # some systems do not report them
        return ""


def _optimise(module: llvm.ModuleRef, machine: llvm.TargetMachine) -> None:
    """Puts variables into registers (SROA); LLVM's other passes take longer and make these kernels no faster."""
    passes = llvm.create_new_function_pass_manager()
    passes.add_sroa_pass()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options())
    for function in module.functions:
        passes.run(function, builder)


def _vectorise(module: llvm.ModuleRef, machine: llvm.TargetMachine) -> None:
    """Runs all of LLVM's passes of level 3, with the loop vectoriser."""
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = True
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
