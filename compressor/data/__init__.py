"""Data sets: what they are, how they are split, read and shared out among processes."""
