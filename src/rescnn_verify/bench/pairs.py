"""Which of two is faster, from interleaved pairs of measurements."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rescnn_verify.bench.devices import Device
from rescnn_verify.bench.measure import HEAD_START, in_turn, no_collection, timed, warm_up

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
) -> Pairs:
    """Compares two pieces of work on the same inputs, measured as `measure` does.

    They are measured in turn: first, second, second, first. The ratio of a pair is the geometric
    mean of the ratios of both halves, so that what changes steadily (clocks, temperature) and what
    the second of two finds in the caches cancel. Short ones are repeated within a measurement until
    it takes a millisecond.

    Args:
        device: where.
        first, second: called with one of the inputs.
        inputs: taken in turn.
        seconds: about how long to measure both together.
        least: pairs at least.

    Raises:
        ValueError: there are no inputs.
    """
    supply = in_turn(inputs)
    works = (first, second)
    before = [warm_up(device, work, supply)[-3:] for work in works]
    takes = [statistics.median(single.latency for single in singles) for singles in before]
    holds = [HEAD_START * max(single.enqueue for single in singles) for singles in before]
    repeats = max(1, math.ceil(1e-3 / max(min(takes), 1e-9)))
    count = max(least, min(1000, round(seconds / (2 * repeats * max(sum(takes), 1e-9)))))
    ratios = []
    with no_collection():
        for _ in range(count):
            data = [next(supply) for _ in range(repeats)]
            a, b, c, d = (
                sum(timed(device, works[turn], data, hold=holds[turn])) for turn in (0, 1, 1, 0)
            )
            ratios.append(math.sqrt(a / b * d / c))
    return judged(ratios)


def judged(ratios: Sequence[float], *, margin: float = MARGIN, alpha: float = ALPHA) -> Pairs:
    """What the ratios of pairs say.

    The interval is that of the sign test: between order statistics k and n + 1 − k of n the median
    lies unless fewer than k of n fair coins fall on one side, whatever the distribution of
    independent pairs. The first one is called faster or slower only if the whole interval is beyond
    the margin, and the same only if all of it is within.

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
