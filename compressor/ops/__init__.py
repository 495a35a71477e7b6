"""Tensor operations with a gradient, and the machine code and memory they run on."""
