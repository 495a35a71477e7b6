"""The list of faults: small changes of the code, each of which some test must see."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FOLDER", "ROOT", "Fault", "read_faults"]

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent / "faults"


@dataclass(frozen=True)
class Fault:
    """One small change of one file.

    Args:
        name: what the fault does, in a few words; unique.
        file: the file, from the root of the tree.
        old: text that the file has exactly once.
        new: what the fault has in its place.
        tests: arguments of pytest, separated by spaces: the tests that must see the fault.
        equivalent: where no test can see it, the argument why; "" for all others.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    equivalent: str = ""

    def apply(self, root: Path) -> str:
        """Writes the fault into a copy of the tree, and returns the file's text without it.

        Raises:
            ValueError: the file does not have the text exactly once.
        """
        path = root / self.file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: {self.file} has {count} times {self.old!r}, expected once")
        write(path, text.replace(self.old, self.new))
        return text


def write(path: Path, text: str) -> None:
    """Writes a module, and removes its bytecode, which Python takes for current where size and second are the same."""
    path.write_text(text, encoding="utf-8")
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


def read_faults(folder: Path = FOLDER) -> list[Fault]:
    """Returns the faults of all files of a folder.

    Raises:
        ValueError: two faults have one name.
    """
    faults = [
        Fault(**entry)
        for path in sorted(folder.glob("*.toml"))
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["fault"]
    ]
    if doubled := {fault.name for fault in faults if sum(fault.name == other.name for other in faults) > 1}:
        raise ValueError(f"two faults have one name: {', '.join(sorted(doubled))}")
    return faults
