"""``python -m compressor.cli``, for launchers of processes that take a module."""

from compressor.cli.main import main

if __name__ == "__main__":
    main()
