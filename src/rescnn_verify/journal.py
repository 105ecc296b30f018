"""The journal: what a worker is about to do, on disk before it does it.

A process that is killed, crashes or hangs leaves its last case here. Lines are only ever added, so
that whatever ends the process, all but the last line are whole. Nothing here imports torch.
"""

from __future__ import annotations

import faulthandler
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rescnn_verify.case import Case

__all__ = ["Entry", "Journal", "last_entry"]

#: How a process's last words begin when a case took too long.
_TIMEOUT = "Timeout"


class Journal:
    """The open journal of one worker.

    Args:
        file: where lines are added.
        case_timeout: seconds after which a case ends its process; 0: never.
    """

    def __init__(self, file: BinaryIO, case_timeout: float) -> None:
        self._file = file
        self._timeout = case_timeout

    @classmethod
    @contextmanager
    def open(cls, path: Path, case_timeout: float = 0.0) -> Iterator[Journal]:
        """A journal in a new file, which is gone when the work is done.

        Where none can be written, as on a full disk, the work goes on without.
        """
        try:
            path.touch()
        except OSError:
            path = Path(os.devnull)
        with path.open("wb", buffering=0) as file:  # nothing is left to be written when it closes
            yield cls(file, case_timeout)
        if path.is_file():
            path.unlink()

    @contextmanager
    def running(self, case: Case, index: int) -> Iterator[None]:
        """Says that a case is about to run, the one with that index in its trial."""
        self._add(case=case.to_json(), index=index)
        if not self._timeout:
            yield
            return
        # A thread of the interpreter's own: it works while the target holds the lock.
        faulthandler.dump_traceback_later(self._timeout, exit=True, file=self._file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def found(self, trial: Iterable[Case], what: str, expected: str, got: str) -> None:
        """Says that a trial falsifies, before anything is tried with it."""
        found = {"what": what, "expected": expected, "got": got}
        self._add(trial=[case.to_json() for case in trial], found=found)

    def _add(self, **entry: Any) -> None:
        text = json.dumps(entry, separators=(",", ":"), allow_nan=False) + "\n"
        with suppress(OSError):
            self._file.write(text.encode())


@dataclass(frozen=True)
class Entry:
    """What a journal says that a process did last.

    Args:
        trial: the cases that ran on the last model, the last one perhaps not to its end.
        found: the comparison that failed last and its trial, None if none did.
        timed_out: whether the last case took too long.
    """

    trial: tuple[Case, ...]
    found: tuple[tuple[Case, ...], dict[str, str]] | None
    timed_out: bool


def last_entry(path: Path) -> Entry | None:
    """The end of a journal; None if it is not there or says nothing."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return None
    trial: tuple[Case, ...] = ()
    found = None
    for line in lines:
        try:
            entry = json.loads(line)
            if "found" in entry:
                found = (tuple(map(Case.from_json, entry["trial"])), entry["found"])
            else:
                trial = (*trial[: entry["index"]], Case.from_json(entry["case"]))
        except (ValueError, TypeError, KeyError):
            continue  # last words, or a line that was cut off
    if not trial:
        return None
    return Entry(trial, found, any(line.startswith(_TIMEOUT) for line in lines))
