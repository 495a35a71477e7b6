"""Shared by all tests: nothing here may reach the user's cache or the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is first imported
