"""Layers whose weights stay packed, or are generated from a seed, while they compute."""
