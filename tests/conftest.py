"""Shared by all tests: nothing here may reach the network, and small models run fastest on one thread each."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is first imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported
