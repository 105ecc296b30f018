"""A crew on other machines, by way of ``dask.distributed`` (the extra ``cluster``)."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

__all__ = ["Cluster", "ClusterError"]


#: Seconds in which a scheduler that went away may come back.
PATIENCE = 10.0


class ClusterError(ValueError):
    """There is no scheduler to talk to."""


class Cluster:
    """The workers of a running scheduler.

    The scheduler itself gives the unit of a worker that ended to another one; a unit whose workers
    end again and again is lost, and is then run alone in a process of this machine.

    Args:
        address: of the scheduler, such as ``tcp://10.0.0.1:8786``.

    Raises:
        ClusterError: there is no such scheduler, it has no workers, or the extra is not installed.
    """

    together = False

    def __init__(self, address: str) -> None:
        try:
            distributed: Any = importlib.import_module("distributed")
        except ImportError as error:
            raise ClusterError(
                f"--scheduler needs the extra: pip install 'rescnn-verify[cluster]' ({error})"
            ) from error
        try:
            self._client = distributed.Client(address, timeout="10s", set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            raise ClusterError(f"--scheduler {address}: no scheduler there: {error}") from error
        try:
            self._client.wait_for_workers(1, timeout=10)
            threads = self._client.nthreads()
        except TimeoutError as error:
            self._client.close()
            raise ClusterError(f"--scheduler {address}: no workers there: {error}") from error
        if max(threads.values()) > 1:
            self._client.close()
            raise ClusterError(
                f"--scheduler {address}: it has workers with several threads, but properties "
                "change settings of the whole process; give each one: dask worker --nthreads 1"
            )
        self.lost: tuple[type[BaseException], ...] = (distributed.KilledWorker,)
        self.size = len(threads)
        self._executor = self._client.get_executor(pure=False)
        self._address, self._since = address, math.inf

    def submit(self, run: Callable[[str], str], unit: str) -> Future[str]:
        future: Future[str] = self._executor.submit(run, unit)
        return future

    def restart(self) -> None:
        """The scheduler replaces what ended."""

    def gone(self) -> str | None:
        """Why nothing can run any more, None if it can."""
        if self._client.status == "running":
            self._since = math.inf
            return None
        self._since = min(self._since, time.monotonic())
        if time.monotonic() - self._since < PATIENCE:
            return None  # it may come back
        return f"the scheduler at {self._address} is gone"

    def kill(self) -> None:
        self._executor.shutdown(wait=False)
        self._executor = self._client.get_executor(pure=False)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()
