"""Devices as a stopwatch sees them: work is enqueued, and marks say when it was done."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

__all__ = ["Cpu", "Cuda", "Device", "device_named", "tensor_floats_allowed"]


class Device(Protocol):
    """Where work runs.

    Args:
        name: as reports name it: ``"cpu"`` or ``"cuda"``.
        timer: what tells the time of the work.
    """

    name: str
    timer: str

    def now(self) -> float:
        """The host's time in seconds."""

    def mark(self) -> Any:
        """A mark behind all work enqueued so far."""

    def wait(self) -> None:
        """Returns when all work enqueued so far is done."""

    def seconds(self, start: Any, stop: Any) -> float:
        """Seconds between two marks, both of them reached."""

    def hold(self, seconds: float) -> None:
        """Enqueues work that pushes earlier data out of the cache and takes at least so long."""

    def peak_memory(self, run: Callable[[], object]) -> int:
        """Most bytes that tensors held at once during a run, beyond what they held before it."""

    def describe(self) -> str:
        """The hardware, in words."""


class Cpu:
    """This machine's processor: work is done when its call returns.

    Nothing is pushed out of its caches: the weights of a model in use are there as far as they fit.
    """

    name = "cpu"
    timer = "perf_counter"

    def now(self) -> float:
        return time.perf_counter()

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self) -> None:
        """Nothing is under way."""

    def seconds(self, start: float, stop: float) -> float:
        return stop - start

    def hold(self, seconds: float) -> None:
        """Nothing: work begins with its call."""

    def peak_memory(self, run: Callable[[], object]) -> int:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        # `profiler.events()` adds up what happens within an operation, where the peak is.
        events = profiler.profiler.kineto_results.events()
        changes = sorted(
            (e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()
        )
        held = itertools.accumulate((event.nbytes() for event in changes), initial=0)
        return int(max(held))

    def describe(self) -> str:
        return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


class Cuda:
    """The current CUDA device; events on its stream tell when work was done.

    It is held by writing twice the size of its L2 cache, again and again.
    """

    name = "cuda"
    timer = "CUDA events"

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties()
        self._written = torch.empty(2 * properties.L2_cache_size, dtype=torch.int8, device="cuda")
        self._write_takes = 0.0
        for _ in range(5):  # the first one builds the kernel; the shortest makes the longest hold
            start = self.mark()
            self._written.zero_()
            stop = self.mark()
            self.wait()
            took = self.seconds(start, stop)
            self._write_takes = min(took, self._write_takes or took)

    def now(self) -> float:
        return time.perf_counter()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def wait(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        return float(start.elapsed_time(stop)) / 1000

    def hold(self, seconds: float) -> None:
        for _ in range(max(1, math.ceil(seconds / self._write_takes))):
            self._written.zero_()

    def peak_memory(self, run: Callable[[], object]) -> int:
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.wait()
        return int(torch.cuda.max_memory_allocated() - before)

    def describe(self) -> str:
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


@contextmanager
def tensor_floats_allowed(allowed: bool) -> Iterator[None]:
    """Products in float32 on CUDA with or without TF32; otherwise torch chooses as by default."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, allowed
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=False, allow_tf32=allowed
        ):
            yield
    finally:
        matmul.allow_tf32 = before


def device_named(name: str) -> Device:
    """The device of that name.

    Raises:
        ValueError: it is neither ``"cpu"`` nor ``"cuda"``.
    """
    known: dict[str, type[Device]] = {"cpu": Cpu, "cuda": Cuda}
    if name not in known:
        raise ValueError(f"device {name!r} is not known; allowed: {', '.join(known)}")
    return known[name]()
