"""Layers whose weights stay packed, or are generated, while they compute."""
