"""How many images calibration takes; nothing here imports torch, so that the command line can say it."""

__all__ = ["DEFAULT_IMAGES", "FEWEST_IMAGES", "MOST_IMAGES"]

DEFAULT_IMAGES = 256
"""Images that are taken where there are more, and that are made where there are none."""

FEWEST_IMAGES = 16
"""Images that are needed: with fewer, the moments of hardly any layer can be told."""

MOST_IMAGES = 1024
"""Images that are taken from batches in Python."""
