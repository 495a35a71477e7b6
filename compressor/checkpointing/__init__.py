"""The state of a training on disk, and what it depends on."""
