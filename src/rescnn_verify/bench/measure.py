"""Measuring how long work takes on a device, beside what it takes to enqueue it."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rescnn_verify.bench.devices import Device
from rescnn_verify.bench.load import Load, loads

__all__ = ["Measurement", "measure", "warm_up"]

#: Rounds that are enqueued before the device is waited for: fewer than a stream holds (1024
#: launches), so that enqueuing does not have to wait for the device.
BATCH = 64

T = TypeVar("T")


@dataclass(frozen=True)
class Measurement:
    """What was measured of one piece of work.

    Args:
        device, timer: where, and what told the time.
        seconds: device time of each round, from its first operation to the end of its last.
        enqueue: host seconds for which each round's call kept its caller.
        latency: host seconds from the call to its result, one round at a time.
        peak_memory: bytes that its tensors held at most, in a round of its own.
        warm_up: rounds before the first one that counts.
        load: what else ran on the machine, None if that is not known.
    """

    device: str
    timer: str
    seconds: tuple[float, ...]
    enqueue: tuple[float, ...]
    latency: tuple[float, ...]
    peak_memory: int
    warm_up: int
    load: Load | None

    @property
    def median(self) -> float:
        """The median device time in seconds."""
        return statistics.median(self.seconds)

    @property
    def noise(self) -> float:
        """The interquartile range over the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


def measure(
    device: Device,
    work: Callable[[T], object],
    inputs: Sequence[T],
    *,
    seconds: float = 1.0,
    most: int = 1000,
    least: int = 10,
) -> Measurement:
    """Measures work on a device.

    Rounds are enqueued in batches, each round between two marks and behind a flush of the cache,
    and the device is waited for once for each batch: what is reported is the work, not the wait.
    On an asynchronous device the first mark is reached only when all before it is done, so a round
    that the device finishes sooner than the host can enqueue it is measured as what the host
    needs, and `Measurement.enqueue` shows that.

    Args:
        device: where.
        work: called with one of the inputs; what it returns is dropped.
        inputs: taken in turn, so that no round finds its data in the cache; random ones, as zeros
            cost less power and time on real devices.
        seconds: about how long to measure.
        most, least: bounds on the number of rounds.
    """
    supply = itertools.cycle(inputs)
    one, before = warm_up(device, work, supply)
    rounds = max(least, min(most, round(seconds / max(one, 1e-9))))
    times: list[float] = []
    enqueue: list[float] = []
    with loads() as load:
        while len(times) < rounds:
            marks = []
            for _ in range(min(BATCH, rounds - len(times))):
                data = next(supply)
                device.flush()
                start = device.mark()
                called = device.now()
                work(data)
                enqueue.append(device.now() - called)
                marks.append((start, device.mark()))
            device.wait()
            times += [device.seconds(start, stop) for start, stop in marks]
        latency = [_latency(device, work, next(supply)) for _ in range(least)]
    data = next(supply)
    return Measurement(
        device.name,
        device.timer,
        tuple(times),
        tuple(enqueue),
        tuple(latency),
        device.peak_memory(lambda: work(data)),
        before,
        load(),
    )


def warm_up(
    device: Device, work: Callable[[T], object], supply: itertools.cycle[T], *, seconds: float = 0.3
) -> tuple[float, int]:
    """Runs work until the kernels are built and the clocks are up.

    Returns:
        About how many seconds a round takes, and how many were run.
    """
    rounds, began = 0, device.now()
    while True:
        last = _latency(device, work, next(supply))
        rounds += 1
        if rounds >= 3 and device.now() - began > seconds:
            return last, rounds


def _latency(device: Device, work: Callable[[T], object], data: T) -> float:
    device.wait()
    start = device.now()
    work(data)
    device.wait()
    return device.now() - start
