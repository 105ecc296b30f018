"""Which of two is faster, from interleaved pairs of measurements."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rescnn_verify.bench.devices import Device
from rescnn_verify.bench.measure import warm_up

__all__ = ["AMBIGUOUS", "FASTER", "MARGIN", "SAME", "SLOWER", "Pairs", "interleaved", "judged"]

FASTER, SLOWER, SAME, AMBIGUOUS = "faster", "slower", "same", "ambiguous"

#: What differs by less is called the same.
MARGIN = 0.01

#: Probability with which the interval of a comparison misses the median.
ALPHA = 1e-4

T = TypeVar("T")


@dataclass(frozen=True)
class Pairs:
    """How long one takes relative to another.

    Args:
        ratio: the median over pairs of the first one's time over the second one's.
        low, high: an interval that holds that median with a probability of at least 1 − α.
        count: the number of pairs.
        verdict: of the first one: faster, slower, same or ambiguous.
    """

    ratio: float
    low: float
    high: float
    count: int
    verdict: str

    def __str__(self) -> str:
        return (
            f"{self.verdict}: {self.ratio:.3f} times as long "
            f"({self.low:.3f} to {self.high:.3f}, {self.count} pairs)"
        )


def interleaved(
    device: Device,
    first: Callable[[T], object],
    second: Callable[[T], object],
    inputs: Sequence[T],
    *,
    seconds: float = 4.0,
    least: int = 40,
    seed: int = 0,
) -> Pairs:
    """Compares two pieces of work on the same inputs.

    They are measured in turn, the order within each pair random, so that what changes slowly
    (clocks, temperature, other users) changes both alike. Short ones are repeated within a
    measurement until it takes a millisecond.

    Args:
        device: where.
        first, second: called with one of the inputs.
        inputs: taken in turn.
        seconds: about how long to measure both together.
        least: pairs at least.
        seed: of the order.
    """
    supply = itertools.cycle(inputs)
    one = min(warm_up(device, work, supply)[0] for work in (first, second))
    repeats = max(1, math.ceil(1e-3 / max(one, 1e-9)))
    count = max(least, min(1000, round(seconds / (2 * repeats * max(one, 1e-9)))))
    order = random.Random(seed)
    ratios = []
    for _ in range(count):
        data = next(supply)
        times = {}
        for turn in order.sample((0, 1), 2):
            times[turn] = _seconds(device, (first, second)[turn], data, repeats)
        ratios.append(times[0] / times[1])
    return judged(ratios)


def judged(ratios: Sequence[float], *, margin: float = MARGIN, alpha: float = ALPHA) -> Pairs:
    """What the ratios of pairs say.

    The interval is that of the sign test: between order statistics k and n + 1 − k of n the median
    lies unless fewer than k of n fair coins fall on one side, whatever the distribution. The first
    one is called faster or slower only if the whole interval is beyond the margin, and the same
    only if all of it is within.

    Args:
        ratios: the first one's time over the second one's, pair by pair.
        margin: what differs by less is the same.
        alpha: probability with which the interval may miss the median.
    """
    ordered, n = sorted(ratios), len(ratios)
    below, rank = 0.0, 0
    while rank < n // 2 and below + math.comb(n, rank) / 2**n <= alpha / 2:
        below += math.comb(n, rank) / 2**n
        rank += 1
    low, high = (ordered[rank - 1], ordered[n - rank]) if rank else (0.0, math.inf)
    if high < 1 - margin:
        verdict = FASTER
    elif low > 1 + margin:
        verdict = SLOWER
    elif 1 - margin <= low and high <= 1 + margin:
        verdict = SAME
    else:
        verdict = AMBIGUOUS
    return Pairs(statistics.median(ordered), low, high, n, verdict)


def _seconds(device: Device, work: Callable[[T], object], data: T, repeats: int) -> float:
    device.flush()
    start = device.mark()
    for _ in range(repeats):
        work(data)
    stop = device.mark()
    device.wait()
    return device.seconds(start, stop)
