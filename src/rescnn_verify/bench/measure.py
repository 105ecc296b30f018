"""Measuring how long work takes on a device, beside what it takes to enqueue it."""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from rescnn_verify.bench.devices import Device
from rescnn_verify.bench.load import Load, loads

__all__ = [
    "HEAD_START",
    "Measurement",
    "Single",
    "in_turn",
    "measure",
    "no_collection",
    "timed",
    "warm_up",
]

#: Rounds that are enqueued before the device is waited for.
BATCH = 64

#: For how many times as long as a round takes to enqueue the device is held before it, so that all
#: of the round is enqueued when the device comes to it.
HEAD_START = 1.5

T = TypeVar("T")


@dataclass(frozen=True)
class Measurement:
    """What was measured of one piece of work.

    Args:
        device, timer: where, and what told the time.
        seconds: device time of each round, from its first operation to the end of its last.
        enqueue: host seconds for which a call kept its caller, the device idle before.
        latency: host seconds from a call to its result, the device idle before.
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


class Single(NamedTuple):
    """One round on an idle device: host seconds until its call returned, and until it was done."""

    enqueue: float
    latency: float


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

    Rounds are enqueued in batches, each between two marks, and the device is waited for once for
    each batch: what is reported is the work, not the wait. Before each round the device is held
    until all of the round must be enqueued: what is reported is not the pace of the host, either.

    Args:
        device: where.
        work: called with one of the inputs; what it returns is dropped.
        inputs: taken in turn, so that no round finds its data in the cache; random ones, as zeros
            cost less power and time on real devices.
        seconds: about how long to measure.
        most, least: bounds on the number of rounds.

    Raises:
        ValueError: there are no inputs.
    """
    supply = in_turn(inputs)
    before = warm_up(device, work, supply)
    one = statistics.median(single.latency for single in before[-3:])
    enqueue = max(single.enqueue for single in before[-3:])
    rounds = max(least, min(most, round(seconds / max(one, 1e-9))))
    times: list[float] = []
    with loads() as load, no_collection():
        while len(times) < rounds:
            count = min(BATCH, rounds - len(times))
            data = [next(supply) for _ in range(count)]
            times += timed(device, work, data, hold=HEAD_START * enqueue)
        singles = [_single(device, work, next(supply)) for _ in range(least)]
    one_more = next(supply)
    return Measurement(
        device.name,
        device.timer,
        tuple(times),
        tuple(single.enqueue for single in singles),
        tuple(single.latency for single in singles),
        device.peak_memory(lambda: work(one_more)),
        len(before),
        load(),
    )


def timed(
    device: Device, work: Callable[[T], object], inputs: Sequence[T], *, hold: float
) -> list[float]:
    """Device seconds of a round for each input, enqueued together.

    Args:
        device: where.
        work: called with one of the inputs.
        inputs: of the rounds.
        hold: seconds for which the device is held before each round.
    """
    marks = []
    for data in inputs:
        device.hold(hold)
        start = device.mark()
        work(data)
        marks.append((start, device.mark()))
    device.wait()
    return [device.seconds(start, stop) for start, stop in marks]


def in_turn(inputs: Sequence[T]) -> Iterator[T]:
    """The inputs again and again.

    Raises:
        ValueError: there are none.
    """
    if not inputs:
        raise ValueError("inputs must hold at least one input for the work, got none")
    return itertools.cycle(inputs)


def warm_up(
    device: Device, work: Callable[[T], object], supply: Iterator[T], *, seconds: float = 0.3
) -> list[Single]:
    """Runs work until the kernels are built and the clocks are up: three rounds at least."""
    rounds: list[Single] = []
    began = device.now()
    while len(rounds) < 3 or device.now() - began < seconds:
        rounds.append(_single(device, work, next(supply)))
    return rounds


def _single(device: Device, work: Callable[[T], object], data: T) -> Single:
    device.wait()
    start = device.now()
    work(data)
    called = device.now()
    device.wait()
    return Single(called - start, device.now() - start)


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage is collected while something is timed."""
    before = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
