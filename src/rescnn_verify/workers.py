"""Crews: where units run; each is an executor and what a campaign has to know about it.

Nothing here imports torch, so that workers start while this process does.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from types import TracebackType
from typing import Protocol

from rescnn_verify.exits import exits_raise

__all__ = ["CONTEXT", "Crew", "Here", "Processes", "end_with_the_parent", "usable_cores", "workers"]

#: Workers are forked from a server that has run nothing yet, so no thread or device context of the
#: calling process is copied.
CONTEXT = multiprocessing.get_context("forkserver")


class Crew(Protocol):
    """Where units run.

    Args:
        size: how many units run at once.
        lost: the exceptions of a future whose worker has ended.
        together: whether all workers end when one does; they then are processes of this machine.
    """

    together: bool
    size: int
    lost: tuple[type[BaseException], ...]

    def submit(self, run: Callable[[str], str], unit: str) -> Future[str]:
        """Begins a unit."""

    def restart(self) -> None:
        """Makes the crew usable again after a worker has ended."""

    def gone(self) -> str | None:
        """Why nothing can run any more, None if it can."""

    def kill(self) -> None:
        """Ends every worker at once, whatever it does."""


class Here:
    """This process, one unit after the other: for debuggers and single devices."""

    together = False
    size = 1
    lost: tuple[type[BaseException], ...] = ()

    def submit(self, run: Callable[[str], str], unit: str) -> Future[str]:
        future: Future[str] = Future()
        try:
            with exits_raise():
                future.set_result(run(unit))
        except Exception as error:
            future.set_exception(error)
        return future

    def restart(self) -> None:
        """Nothing can have ended."""

    def gone(self) -> str | None:
        return None

    def kill(self) -> None:
        """Nothing runs on."""

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to close."""


class Processes:
    """Processes of this machine, started at once.

    Args:
        count: how many.
    """

    together = True
    lost: tuple[type[BaseException], ...] = (BrokenExecutor,)

    def __init__(self, count: int) -> None:
        self.size = count
        self._executor = workers(count)

    def submit(self, run: Callable[[str], str], unit: str) -> Future[str]:
        return self._executor.submit(run, unit)

    def gone(self) -> str | None:
        return None

    def restart(self) -> None:
        self.kill()
        self._executor = workers(self.size)

    def kill(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        for worker in multiprocessing.active_children():
            worker.kill()

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._executor.shutdown(cancel_futures=True)
        else:
            self.kill()


def workers(count: int) -> ProcessPoolExecutor:
    """Processes that have torch imported."""
    CONTEXT.set_forkserver_preload(["rescnn_verify.unit", "rescnn_verify.strategies"])
    executor = ProcessPoolExecutor(count, mp_context=CONTEXT, initializer=_begin)
    executor.submit(os.getpid)
    return executor


def _begin() -> None:
    """What each worker does first."""
    end_with_the_parent()
    # Modules are cyclic garbage, so it is collected often: what is imported need not be searched.
    gc.freeze()


def end_with_the_parent() -> None:
    """Ends this process when the process that started it is gone, and only then.

    Ctrl-C in a terminal reaches workers, too, but it is the parent's to say what ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def usable_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
