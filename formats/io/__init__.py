"""Files on disk and on the hub: atomic writing, locking, fetching, and memory for decoded data."""
