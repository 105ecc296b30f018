"""Evidence: what the outcomes of many runs of one property come to."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace

from rescnn_verify.outcome import (
    BAD_TARGET,
    FALSIFIED,
    HELD,
    INTERNAL_ERROR,
    KNOWN,
    NOT_APPLICABLE,
    NOT_RUN,
    NOTHING_ASSERTED,
    UNFINISHED,
    Outcome,
)

__all__ = ["failure_rate_bound", "merged"]

#: Which verdict tells the most: any run of a property may falsify it, all have to assert nothing.
_WEIGHT = (
    NOTHING_ASSERTED,
    NOT_RUN,
    NOT_APPLICABLE,
    HELD,
    KNOWN,
    UNFINISHED,
    BAD_TARGET,
    INTERNAL_ERROR,
    FALSIFIED,
)


def merged(outcomes: Iterable[Outcome]) -> Outcome:
    """One outcome for several of the same property on the same device.

    The verdict is the one that tells the most, with its reason and counterexample; the counts are
    sums, and a configuration or a pair of classes that was met twice counts once.
    """
    return functools.reduce(_both, outcomes)


def _both(a: Outcome, b: Outcome) -> Outcome:
    more = _WEIGHT.index(b.verdict) > _WEIGHT.index(a.verdict)
    telling = b if more or a.verdict == NOTHING_ASSERTED else a  # the last one knows best why
    ratios = [ratio for ratio in (a.worst_ratio, b.worst_ratio) if ratio is not None]
    configs = a.configs | b.configs
    return replace(
        telling,
        cases=a.cases + b.cases,
        assertions=a.assertions + b.assertions,
        architectures=len(configs),
        seconds=a.seconds + b.seconds,
        worst_ratio=max(ratios, default=None),
        sampled=a.sampled + b.sampled,
        discarded=a.discarded + b.discarded,
        known=a.known + b.known,
        signatures=tuple(sorted({*a.signatures, *b.signatures})),
        pairs=a.pairs | b.pairs,
        configs=configs,
        remarkable=(),
    )


def failure_rate_bound(trials: int) -> float | None:
    """The 95 % upper confidence bound on the rate of failing trials, after ``trials`` without one.

    The exact bound 1 − 0.05^(1/n) of n independent trials (Clopper and Pearson 1934), about 3/n;
    None without a trial. It is about the distribution that trials are sampled from, which favours
    corners, and about no other.
    """
    return None if trials == 0 else 1.0 - 0.05 ** (1.0 / trials)
