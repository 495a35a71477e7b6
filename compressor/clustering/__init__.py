"""Codebooks for weights as they stand, without training."""
