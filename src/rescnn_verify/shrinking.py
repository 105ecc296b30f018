"""Shrinking: from a counterexample to the smallest one that a greedy search finds.

It works on cases, not on the choices that led to them, so that it serves counterexamples from
everywhere: Hypothesis, uniform sampling, the documented configuration, a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import ROUND_FLOOR, Context, Decimal
from typing import Any

from rescnn_verify.case import Case
from rescnn_verify.space import Choice, Factor, Floats, Integers, Lists, Space, architectural, value

__all__ = ["shrink"]

Trial = tuple[Case, ...]


def shrink(trial: Trial, space: Space, fails: Callable[[Trial], bool]) -> Trial:
    """A trial that still fails and of which no single simplification does.

    Args:
        trial: a failing trial.
        space: where its cases come from; every factor moves towards its simplest value.
        fails: whether a trial fails; it may answer False to everything to end the search.
    """
    improved = True
    while improved:
        improved = False
        for candidate in _simpler(trial, space):
            if fails(candidate):
                trial, improved = candidate, True
                break
    return trial


def _simpler(trial: Trial, space: Space) -> Iterator[Trial]:
    if len(trial) > 1:
        yield trial[-1:]
        yield from (trial[:i] + trial[i + 1 :] for i in range(len(trial) - 1))
    for name, factor in sorted(space.factors, key=_order):
        if architectural(name) or name in ("dtype", "device"):
            for item in _simpler_values(name, value(trial[-1], name), factor):
                changed = tuple(_with(case, name, item) for case in trial)
                if all(space.meets_constraints(case) for case in changed):
                    yield changed
        else:
            for i, case in enumerate(trial):
                for item in _simpler_values(name, value(case, name), factor):
                    changed_case = _with(case, name, item)
                    if space.meets_constraints(changed_case):
                        yield (*trial[:i], changed_case, *trial[i + 1 :])


# What makes a run expensive goes first.
_FIRST = ("num_blocks", "kernel_sizes", "channels", "length", "batch")


def _order(named: tuple[str, Factor]) -> int:
    return _FIRST.index(named[0]) if named[0] in _FIRST else len(_FIRST)


def _simpler_values(name: str, current: Any, factor: Factor) -> Iterator[Any]:
    """Values of a factor that are simpler than the current one, the simplest first."""
    if isinstance(factor, Choice):
        position = factor.values.index(current) if current in factor.values else None
        yield from factor.values[:position]
    elif isinstance(factor, Integers):
        simplest = factor.low
        if name == "batch" and 1 in factor:
            simplest = 1  # simpler than an empty one
            if current == 0:
                yield 1
        gap = current - simplest
        steps = [gap // divisor for divisor in (1, 2, 4, 8, 16)] + [2, 1]
        yield from dict.fromkeys(current - step for step in steps if 0 < step <= gap)
    elif isinstance(factor, Floats):
        exact = Decimal(str(current))
        shorter = (Context(prec=digits, rounding=ROUND_FLOOR).plus(exact) for digits in (1, 2))
        for number in (factor.low, *map(float, shorter)):
            if number < current and number in factor:
                yield number
    elif isinstance(factor, Lists):
        if len(current) > factor.low:
            yield from (current[:i] + current[i + 1 :] for i in range(len(current)))
        for i, item in enumerate(current):
            for simpler in _simpler_values(name, item, factor.element):
                yield (*current[:i], simpler, *current[i + 1 :])


def _with(case: Case, name: str, item: Any) -> Case:
    if name.startswith("option."):
        pairs = dict(case.options) | {name.removeprefix("option."): item}
        return replace(case, options=tuple(sorted(pairs.items())))
    if name in Case.__dataclass_fields__:
        return replace(case, **{name: item})
    return replace(case, extra=tuple(sorted((dict(case.extra) | {name: item}).items())))
