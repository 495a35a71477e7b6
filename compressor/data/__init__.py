"""Data sets: opening, splitting and reading them, and sharing them out among processes."""
