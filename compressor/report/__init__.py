"""Figures of a packed file, computed from the bytes that were written."""
