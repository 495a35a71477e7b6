"""Sweeps: many compressions of one model, each a process of its own, recorded as they end and shared out to workers."""
