"""Files that a disk or a person has changed since they were written."""

from __future__ import annotations

from pathlib import Path


def cut(file: Path) -> None:
    """Leaves all but the end of a file."""
    file.write_bytes(file.read_bytes()[:-100])


def empty(file: Path) -> None:
    """Leaves nothing of a file."""
    file.write_bytes(b"")


def flip(file: Path) -> None:
    """Turns one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
