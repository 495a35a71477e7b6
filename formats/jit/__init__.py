"""A small language in which kernels are written in Python and compiled to machine code by LLVM, through llvmlite."""
