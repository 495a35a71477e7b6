"""Packed files for other runtimes: the contract of export targets, and what every export does."""
