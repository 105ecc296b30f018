"""How cases are drawn from a space, whatever the numbers come from.

The same code serves uniform sampling (`RandomDraw`) and Hypothesis (`rescnn_verify.strategies`),
so both reach the same corners. Every alternative lists the simplest first.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any, Protocol, TypeVar

from rescnn_verify.case import Case, Config
from rescnn_verify.space import (
    Choice,
    Factor,
    Floats,
    Integers,
    Lists,
    Space,
    SpaceError,
    architectural,
)

__all__ = ["SEAMS", "WORK", "Draw", "RandomDraw", "draw_config", "draw_extreme", "draw_trial"]

T = TypeVar("T")

#: Multiply-adds that one forward pass of a drawn case may cost.
WORK = 2**20
#: The same for an extreme case.
EXTREME_WORK = 2**22
#: Convolutions that a quarter each of the drawn architectures have at most: building
#: and calling a layer costs more than its arithmetic, and a deep stack of many branches shows
#: little that a deep one of few and a shallow one of many do not.
LAYERS = (8, 14, 24, 40)
#: Convolutions up to which a trial has as many cases as allowed: beyond, another architecture shows
#: more than another input.
FEW_LAYERS = 8

#: The dtypes in which most integers are exact.
WIDE = Space(dtype=Choice("float32", "float64"))

LONG = (
    *(255, 256, 257, 300, 511, 512, 513, 640, 960, 1000, 1023, 1024, 1025, 1500),
    *(2047, 2048, 2049, 4095, 4096, 4097),
    *(5000, 8191, 8192, 8193, 10000, 16383, 16384, 16385),
)
#: Chunk sizes, or divisors of them, that people write.
SEAMS = (64, 128, 256, 500, 512, 1000, 1024, 2048)
BATCHES = (2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129)
CHANNELS = (
    *(2, 3, 4, 6, 7, 8, 9, 11, 12, 13, 15, 16, 17, 21, 24, 31, 32, 33, 37, 48),
    *(63, 64, 65, 96, 100, 127, 128),
)
_CASE_FIELDS = {f.name for f in fields(Case)}


class Draw(Protocol):
    """A source of choices."""

    def integer(self, low: int, high: int) -> int:
        """An integer from ``low`` to ``high``, both included."""

    def choice(self, options: Sequence[T]) -> T:
        """One of the options, of which there is at least one."""

    def real(self, low: float, high: float) -> float:
        """A float from ``low`` to ``high``."""


class RandomDraw:
    """Independent uniform choices from a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def choice(self, options: Sequence[T]) -> T:
        return options[self._random.randrange(len(options))]

    def real(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)


class NoCase(Exception):
    """The draws led to no case of the space; other draws may."""


def draw_trial(
    draw: Draw,
    space: Space,
    *,
    max_size: int = 4,
    work: int = WORK,
    any_config: bool = False,
    any_depth: bool = False,
) -> tuple[Case, ...]:
    """Cases of a space that share an architecture, a dtype and a device, so that it is built once.

    Args:
        draw: where choices come from.
        space: the space.
        max_size: most cases in a trial, fewer of them on many layers; a space without inputs has
            one case for an architecture.
        work: most multiply-adds that a forward pass of one case may cost.
        any_config: no configuration is left out for its cost; one that is too dear gets the least
            input.
        any_depth: the number of layers is not limited beside the work.

    Raises:
        NoCase: no case met the space's constraints in a fixed number of draws.
    """
    least = _least(space.get("length")) * _least(space.get("batch"))
    if space.get("mode") == Choice("train"):
        least = max(least, 2)  # one value per channel cannot be trained on
    kind = draw.integer(0, 7)
    # What is drawn first can be large, what comes then has what is left of the work.
    sizes = ("batch", "length") if kind % 2 else ("length", "batch")
    if any_config:
        config = draw_config(draw, space)
        work = max(work, multiply_adds(config) * least)
    else:
        most = math.inf if any_depth else max(LAYERS[kind // 2], _fewest_layers(space))
        config = _until(
            lambda: draw_config(draw, space),
            lambda c: multiply_adds(c) * least <= work and layers(c) <= most,
        )
    shared = {
        name: draw_value(draw, name, factor)
        for name in ("dtype", "device")
        if (factor := space.get(name))
    }
    fewer = max(1, max_size * FEW_LAYERS // max(FEW_LAYERS, layers(config)))
    size = draw.integer(1, fewer if space.get("length") else 1)
    return tuple(
        _until(
            lambda: _draw_case(draw, config, shared, sizes, space, work), space.meets_constraints
        )
        for _ in range(size)
    )


def draw_extreme(draw: Draw, space: Space, region: Space) -> Case:
    """A case of a space in one of `space.EXTREMES`.

    Raises:
        NoCase: the space has none there.
    """
    try:
        space = space.within(region)
    except SpaceError:
        raise NoCase from None
    if draw.integer(0, 2):
        # Two in three are of a wide dtype, in which more can be compared exactly.
        with suppress(SpaceError):
            space = space.within(WIDE)
    [case] = draw_trial(draw, space, max_size=1, work=EXTREME_WORK, any_depth=True)
    return case


def draw_config(draw: Draw, space: Space) -> Config:
    """An architecture configuration of a space with at least one channel for each branch."""
    values: dict[str, Any] = {}
    options: list[tuple[str, Any]] = []
    width = space.get("channels")
    for name, factor in space.factors:
        if isinstance(factor, Lists) and name == "kernel_sizes" and width is not None:
            # No more branches than the space has channels for.
            factor = replace(factor, high=max(factor.low, min(factor.high, _most(width))))
        if name.startswith("option."):
            options.append((name.removeprefix("option."), draw_value(draw, name, factor)))
        elif architectural(name) and name != "channels":
            values[name] = draw_value(draw, name, factor)
    if width is not None:
        count = len(values.get("kernel_sizes", Config.kernel_sizes))
        values["channels"] = _until(
            lambda: draw_channels(draw, width, count), lambda channels: channels >= count
        )
    return Config(**values, options=tuple(sorted(options)))


def _draw_case(
    draw: Draw,
    config: Config,
    shared: dict[str, Any],
    sizes: tuple[str, str],
    space: Space,
    work: int,
) -> Case:
    values = dict(shared)
    cost = multiply_adds(config)
    extra: list[tuple[str, Any]] = []
    for name, other in ((sizes[0], _least(space.get(sizes[1]))), (sizes[1], 1)):
        size = None if name in values else space.get(name)
        if isinstance(size, Integers):
            affordable = max(size.low, 1, work // (cost * other))
            size = Integers(size.low, min(size.high, affordable))
        if size is None:
            continue
        values[name] = draw_input_size(draw, name, size, config)
        cost *= max(1, values[name])
    for name, factor in space.factors:
        if name in values or architectural(name):
            continue
        if name in _CASE_FIELDS:
            values[name] = draw_value(draw, name, factor)
        else:
            extra.append((name, draw_value(draw, name, factor)))
    return Case(**vars(config), **values, extra=tuple(sorted(extra)))


def draw_input_size(draw: Draw, name: str, factor: Factor, config: Config) -> int:
    """A length or a batch size of a factor."""
    if not isinstance(factor, Integers):
        return int(draw_value(draw, name, factor))
    if name == "batch":
        return draw_batch(draw, factor)
    return draw_length(draw, factor, (min(config.kernel_sizes), config.widest, config.field))


def draw_batch(draw: Draw, factor: Integers) -> int:
    """1, a few, more than 8, and one in eight times 0 where the factor has it."""
    if factor.high < 1:
        return factor.high
    size = _integer(draw, max(1, factor.low), factor.high, small=3, corners=BATCHES)
    if factor.low == 0 and draw.integer(0, 7) == 7:
        return 0
    return size


def draw_length(draw: Draw, factor: Integers, near: Sequence[int]) -> int:
    """Short ones, those around given values, several hundred and more, and any other.

    One in five ends just before a multiple of a usual chunk size, or behind it by no more than the
    largest of the given values: there a last chunk is smaller than what its neighbours overlap.
    """
    kind = draw.integer(0, 4)
    if kind < 2:
        ends = (n + d for n in near for d in (0, -1, 1, n - 3, n + 1))
        halves = (n // 2 + d for n in near for d in (0, 1))
        return _integer(draw, factor.low, factor.high, small=11, corners=(*ends, *halves))
    sizes = [size for size in SEAMS if size < factor.high]
    if kind < 4 or not sizes:
        return _integer(draw, factor.low, factor.high, small=40, corners=LONG)
    size = draw.choice(sizes)
    end = size * draw.integer(1, factor.high // size) + draw.integer(-1, max(near))
    end = min(max(factor.low, end), factor.high)
    return draw.integer(end, end)


def draw_channels(draw: Draw, factor: Factor, branches: int) -> int:
    """Small ones, multiples of the number of branches and others, powers of two and neighbours."""
    if not isinstance(factor, Integers):
        return int(draw_value(draw, "channels", factor))
    low = max(factor.low, branches)
    if low > factor.high:
        return factor.high
    multiples = [branches * m + d for m in (1, 2, 3, 5, 8) for d in (0, 1, branches - 1)]
    corners = multiples if draw.integer(0, 1) else CHANNELS
    return _integer(draw, low, factor.high, small=7, corners=corners)


def draw_value(draw: Draw, name: str, factor: Factor) -> Any:
    """A value of a factor that depends on no other."""
    if isinstance(factor, Choice):
        return draw.choice(factor.values)
    if isinstance(factor, Floats):
        return draw.real(factor.low, factor.high)
    if isinstance(factor, Lists):
        size = _integer(draw, factor.low, factor.high, small=2)
        return tuple(draw_value(draw, name, factor.element) for _ in range(size))
    if name == "seed":
        return draw.integer(factor.low, factor.high)
    return _integer(draw, factor.low, factor.high, small=2)


def multiply_adds(config: Config) -> int:
    """Multiply-adds of the reference architecture for one position of one sample."""
    taps = sum(w * k for w, k in zip(config.widths, config.kernel_sizes, strict=True))
    return int(config.num_blocks * config.channels * (taps + config.channels))


def layers(config: Config) -> int:
    """Convolutions of the reference architecture."""
    return int(config.num_blocks * (config.branches + 1))


def _integer(draw: Draw, low: int, high: int, *, small: int, corners: Sequence[int] = ()) -> int:
    """Equally often a small one, a corner, and any."""
    within = _within(tuple(corners), low, high)
    kind = draw.integer(0, 2)
    # Drawn whatever the kind, and the corner drawn as an integer once more: Hypothesis can then
    # turn one kind into another and keep the value.
    index = draw.integer(0, max(1, len(within) - 1))
    if kind == 2 and within:
        corner = within[min(index, len(within) - 1)]
        return draw.integer(corner, corner)
    return draw.integer(low, high if kind else min(high, low + small))


@functools.lru_cache(maxsize=4096)
def _within(corners: tuple[int, ...], low: int, high: int) -> tuple[int, ...]:
    return tuple(sorted({c for c in corners if low <= c <= high}))


def _least(factor: Factor | None) -> int:
    """The least value of a number of something, at least 1."""
    if isinstance(factor, Integers):
        return max(1, factor.low)
    return max(1, min(factor.values)) if isinstance(factor, Choice) else 1


def _most(factor: Factor) -> int:
    """The largest value of a number of something."""
    if isinstance(factor, Choice):
        return int(max(factor.values))
    return int(factor.high) if isinstance(factor, Integers | Floats) else 1


def _fewest_layers(space: Space) -> int:
    """Convolutions of the smallest architecture of a space."""
    branches = space.get("kernel_sizes")
    if isinstance(branches, Lists):
        fewest = branches.low
    elif isinstance(branches, Choice):
        fewest = min(map(len, branches.values))
    else:
        fewest = len(Config.kernel_sizes)
    return _least(space.get("num_blocks")) * (fewest + 1)


def _until(make: Any, good: Any) -> Any:
    for _ in range(100):
        if good(made := make()):
            return made
    raise NoCase
