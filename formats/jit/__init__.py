"""A small language for machine code, compiled by LLVM through llvmlite."""
