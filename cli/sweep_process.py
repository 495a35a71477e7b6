"""``python -m compressor.cli.sweep_process WORDS... DESCRIPTOR``: one of the processes that train one row of a sweep.

It runs ``compress WORDS...``, and ends, as at SIGTERM, when the descriptor is closed at the other end.
"""

from __future__ import annotations

import sys

from compressor.cli.main import main
from compressor.sweep.watched import end_with

if __name__ == "__main__":
    end_with(int(sys.argv[-1]))
    main(sys.argv[1:-1])
