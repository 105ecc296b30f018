"""Enumeration: the cases of a space one after the other, the smallest first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Generic, TypeVar

from rescnn_verify.case import Case, Config
from rescnn_verify.space import (
    A_CHANNEL_PER_BRANCH,
    Choice,
    Factor,
    Floats,
    Integers,
    Lists,
    Space,
    SpaceError,
    architectural,
    case_of,
)

__all__ = ["architectures", "batched", "every_case", "every_input", "smallest_first"]

T = TypeVar("T")

#: After so many combinations in a row that the constraints forbid, there is taken to be no other.
PATIENCE = 2000


def every_case(space: Space) -> Iterator[Case]:
    """Every case of a bounded space, once: the last factor varies fastest, each from its simplest.

    Raises:
        SpaceError: a factor has too many values to go through (real numbers).
    """
    names = [name for name, _ in space.factors]
    for values in itertools.product(*(values_of(name, factor) for name, factor in space.factors)):
        case = case_of(dict(zip(names, values, strict=True)))
        if space.meets_constraints(case):
            yield case


def values_of(name: str, factor: Factor) -> Iterable[Any]:
    """All values of a factor, the simplest first.

    Raises:
        SpaceError: they are real numbers.
    """
    if isinstance(factor, Choice):
        return factor.values
    if isinstance(factor, Integers):
        return range(factor.low, factor.high + 1)
    if isinstance(factor, Lists):
        elements = tuple(values_of(name, factor.element))
        sizes = range(factor.low, factor.high + 1)
        return itertools.chain.from_iterable(itertools.product(elements, repeat=n) for n in sizes)
    raise SpaceError(f"{name}: the reals from {factor.low} to {factor.high} cannot all be tried")


def architectures(space: Space) -> Iterator[Config]:
    """The configurations of a space, once each, those that are simple in every factor first.

    Its constraints tie whole cases, so some configurations may turn out to have none.

    Raises:
        SpaceError: a factor has too many values to go through (real numbers).
    """
    for values in _simplest_first(*_part(space, architectural)):
        yield case_of(values).config


def every_input(space: Space, config: Config) -> Iterator[Case]:
    """Every case of a bounded space that has the given configuration, once.

    Raises:
        SpaceError: a factor has too many values to go through (real numbers).
    """
    names, factors = _part(space, _of_the_input)
    for values in itertools.product(*map(values_of, names, factors)):
        case = _with_input(config, dict(zip(names, values, strict=True)))
        if space.meets_constraints(case):
            yield case


def smallest_first(space: Space, *, size: int = 4, seed: int = 0) -> Iterator[tuple[Case, ...]]:
    """Trials of a space, the smallest cases first, until no more are found.

    A trial has up to ``size`` cases of one configuration. Seeds are counted up from ``seed``, so
    that data differ from trial to trial.
    """
    seeds = space.get("seed")
    space = _without_reals(space)
    names, factors = _part(space, lambda name: _of_the_input(name) and name != "seed")
    narrow = A_CHANNEL_PER_BRANCH in space.where
    configs = _Lazily(c for c in architectures(space) if not narrow or c.channels >= c.branches)
    inputs = _Lazily(batched(_simplest_first(names, factors), size))
    last = 0
    for rank, (config, chunk) in enumerate(_diagonally([configs, inputs])):
        data = {"seed": _nth(seeds, seed + rank)} if seeds else {}
        cases = (_with_input(config, values | data) for values in chunk)
        if trial := tuple(case for case in cases if space.meets_constraints(case)):
            yield trial
            last = rank
        elif rank - last > PATIENCE:
            return


def batched(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """The items in groups of ``size``, the last one perhaps smaller."""
    rest = iter(items)
    while group := tuple(itertools.islice(rest, size)):
        yield group


def _part(
    space: Space, wanted: Callable[[str], bool]
) -> tuple[tuple[str, ...], tuple[Factor, ...]]:
    chosen = [(name, factor) for name, factor in space.factors if wanted(name)]
    return tuple(name for name, _ in chosen), tuple(factor for _, factor in chosen)


def _of_the_input(name: str) -> bool:
    return not architectural(name)


def _without_reals(space: Space) -> Space:
    """The space with both ends in place of each range of real numbers."""

    def ends(factor: Factor) -> Factor:
        if isinstance(factor, Floats):
            return Choice(*dict.fromkeys((factor.low, factor.high)))
        return factor

    return Space({name: ends(factor) for name, factor in space.factors}, where=space.where)


def _with_input(config: Config, values: Mapping[str, Any]) -> Case:
    known = {name: item for name, item in values.items() if name in _CASE_FIELDS}
    extra = {name: item for name, item in values.items() if name not in _CASE_FIELDS}
    return Case(**vars(config), **known, extra=tuple(sorted(extra.items())))


_CASE_FIELDS = {f.name for f in fields(Case)}


def _nth(seeds: Factor, rank: int) -> int:
    """A seed of a factor, another one for each rank as far as there are any."""
    if isinstance(seeds, Integers):
        return seeds.low + rank % (seeds.high - seeds.low + 1)
    assert isinstance(seeds, Choice)
    return int(seeds.values[rank % len(seeds.values)])


def _simplest_first(names: Sequence[str], factors: Sequence[Factor]) -> Iterator[dict[str, Any]]:
    """All combinations of the factors' values, by the sum of their ranks."""
    for values in _diagonally(
        [_Lazily(values_of(n, f)) for n, f in zip(names, factors, strict=True)]
    ):
        yield dict(zip(names, values, strict=True))


class _Lazily(Generic[T]):
    """The items of an iterable by their rank, as far as they were asked for."""

    def __init__(self, items: Iterable[T]) -> None:
        self._rest = iter(items)
        self._seen: list[T] = []
        self.most = math.inf  # the highest rank, once it is known

    def has(self, rank: int) -> bool:
        missing = rank + 1 - len(self._seen)
        if missing > 0 and self.most == math.inf:
            self._seen += itertools.islice(self._rest, missing)
            if rank >= len(self._seen):
                self.most = len(self._seen) - 1
        return rank < len(self._seen)

    def __getitem__(self, rank: int) -> T:
        return self._seen[rank]


def _diagonally(sources: Sequence[_Lazily[Any]]) -> Iterator[tuple[Any, ...]]:
    """Every combination of an item of each source, those with the least sum of ranks first."""
    for total in itertools.count():
        ended = True
        for ranks in _ranks(sources, total):
            ended = False
            yield tuple(source[rank] for source, rank in zip(sources, ranks, strict=True))
        if ended:
            return


def _ranks(sources: Sequence[_Lazily[Any]], total: int) -> Iterator[tuple[int, ...]]:
    """The ranks of existing items, one for each source, that add up to ``total``."""
    if not sources:
        yield from [()] if total == 0 else []
        return
    first, rest = sources[0], sources[1:]
    least = max(0, total - sum(source.most for source in rest))  # the rest reaches no further
    for rank in itertools.takewhile(first.has, range(int(least), total + 1)):
        for ranks in _ranks(rest, total - rank):
            yield rank, *ranks
