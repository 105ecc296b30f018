"""What else ran on the machine during a measurement."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CONTENDED", "Load", "loads"]

#: Cores used by others from which a measurement is called contended: what an idle desktop uses.
CONTENDED = 0.1

#: Ticks of the system's accounts that must fit into what is called contended: one is too coarse.
TICKS = 2

_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Load:
    """The use of the machine's cores over a time.

    Args:
        own: cores used by this process, on average.
        others: cores used by everything else, what a hypervisor took away included.
    """

    own: float
    others: float

    @property
    def contended(self) -> bool:
        """Whether others used enough to disturb a measurement."""
        return self.others > CONTENDED


@contextmanager
def loads() -> Iterator[Callable[[], Load | None]]:
    """The load within the block, once it has ended.

    None where the system does not tell, and where the block is too short for its accounts.
    """
    began, busy, own = time.monotonic(), _busy(), time.process_time()
    found: list[Load | None] = []
    yield lambda: found[0]
    took, own = time.monotonic() - began, time.process_time() - own
    after = _busy()
    if busy is None or after is None or took * CONTENDED < TICKS * _tick():
        found.append(None)
        return
    others = (after - busy - own) / took
    believable = others > -CONTENDED  # accounts that show less than this process used are none
    found.append(Load(own / took, max(0.0, others)) if believable else None)


def _busy() -> float | None:
    """Seconds for which the machine's cores have been busy since it started."""
    try:
        fields = _STAT.read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, _idle, _wait, irq, softirq, steal = (int(field) for field in fields)
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) * _tick()


def _tick() -> float:
    """Seconds in which the system's accounts count."""
    return 1 / os.sysconf("SC_CLK_TCK")
