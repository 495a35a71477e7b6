"""Files on disk: written whole or not at all, locked, and memory for what is read."""
