"""Files that nobody ever sees half of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

__all__ = ["write_whole"]


def write_whole(path: Any, text: str) -> None:
    """Writes a file at once: whatever ends the process, it has its old content or its new one.

    Args:
        path: a `Path`, or what behaves like one; stores of objects show an object only when it is
            complete.
        text: what it is to hold.

    Raises:
        OSError: it cannot be written.
    """
    if not isinstance(path, Path):
        path.write_text(text)
        return
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
