"""Schemes, one a file: how codebook and indices are found while training."""
