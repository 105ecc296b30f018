"""Worker processes. Nothing here imports torch, so that they can start while this process does."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor

__all__ = ["usable_cores", "workers"]


def workers(count: int) -> ProcessPoolExecutor:
    """Processes that have torch imported.

    They are forked from a server that has run nothing yet, so no thread or device context of the
    calling process is copied.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rescnn_verify.campaign"])
    executor = ProcessPoolExecutor(count, mp_context=context, initializer=_end_with_the_parent)
    executor.submit(os.getpid)
    return executor


def _end_with_the_parent() -> None:
    """Ends this worker when the process that started it is gone, killed or not."""
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
