"""Atomic writing and locking of files on disk, and memory for decoded data."""
