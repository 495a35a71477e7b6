"""Codebooks for given weights, found without training."""
