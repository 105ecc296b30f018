"""Hypothesis strategies for architectures, inputs and cases.

Each is named for what it yields. Arguments are bounds; how often a corner is reached is stated in
``tests/test_strategies.py``. Everything shrinks towards what a person would write down: one
channel, the first kernel, one block, batch 1, short lengths, float32, contiguous, eval mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from rescnn_verify.case import Case, Config
from rescnn_verify.space import (
    ARCHITECTURES,
    INPUTS,
    Choice,
    Factor,
    Floats,
    Integers,
    Lists,
    Space,
    architectural,
)

__all__ = [
    "batches",
    "cases",
    "channels",
    "configs",
    "dropouts",
    "dtypes",
    "kernel_sizes",
    "layouts",
    "lengths",
    "modes",
    "num_blocks",
    "seeds",
    "trials",
]

#: Multiply-adds that one forward pass of a drawn case may cost.
WORK = 2**21

_LONG = (255, 256, 257, 300, 511, 512, 513, 640, 960, 1000, 1023, 1024, 1025, 1500, 2047, 2048, 2049,
         4095, 4096, 4097)  # fmt: skip
_BATCHES = (2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129)
_CHANNELS = (2, 3, 4, 6, 7, 8, 9, 11, 12, 13, 15, 16, 17, 21, 24, 31, 32, 33, 37, 48, 63, 64, 65, 96,
             100, 127, 128)  # fmt: skip


def kernel_sizes(
    *, min_size: int = 1, max_size: int = 6, allowed: Sequence[int] = (3, 5, 7, 1, 9, 11, 13)
) -> st.SearchStrategy[tuple[int, ...]]:
    """Kernel lists: any order, repeats included.

    Args:
        min_size, max_size: number of branches.
        allowed: the kernel sizes, the simplest first.
    """
    _check_bounds("min_size", min_size, "max_size", max_size, least=1)
    if not allowed:
        raise ValueError("allowed=() must name at least one kernel size")
    return st.lists(st.sampled_from(list(allowed)), min_size=min_size, max_size=max_size).map(tuple)


def num_blocks(*, min_value: int = 1, max_value: int = 7) -> st.SearchStrategy[int]:
    """Numbers of blocks, small ones more often."""
    _check_bounds("min_value", min_value, "max_value", max_value, least=1)
    return _integers(min_value, max_value, small=2)


def channels(*, min_value: int = 1, max_value: int = 128) -> st.SearchStrategy[int]:
    """Channel counts: small ones, powers of two and their neighbours, and any other."""
    _check_bounds("min_value", min_value, "max_value", max_value, least=1)
    return _integers(min_value, max_value, small=7, corners=_CHANNELS)


def lengths(
    *, min_value: int = 1, max_value: int = 4200, near: Sequence[int] = (3, 7, 19)
) -> st.SearchStrategy[int]:
    """Lengths: short ones, those around given values, several hundred, and any other.

    Args:
        min_value, max_value: bounds.
        near: values such as a kernel size or a receptive field whose neighbours, doubles and
            halves matter.
    """
    _check_bounds("min_value", min_value, "max_value", max_value, least=0)
    around = {v for n in near for v in (n // 2, n // 2 + 1, n - 1, n, n + 1, 2 * n - 1, 2 * n + 1)}
    return st.one_of(
        _integers(min_value, max_value, small=11, corners=sorted(around)),
        _integers(min_value, max_value, small=40, corners=_LONG),
    )


def batches(*, min_value: int = 0, max_value: int = 130) -> st.SearchStrategy[int]:
    """Batch sizes: 1, 0, a few, more than 8, powers of two and their neighbours."""
    _check_bounds("min_value", min_value, "max_value", max_value, least=0)
    some = _integers(max(1, min_value), max_value, small=3, corners=_BATCHES)
    return some if min_value > 0 else st.one_of(some, some, some, some, some, some, st.just(0))


def dtypes() -> st.SearchStrategy[str]:
    """Names of the floating dtypes."""
    return st.sampled_from(_choice(INPUTS, "dtype"))


def layouts() -> st.SearchStrategy[str]:
    """Names of the input's memory layouts: contiguous, transposed, strided, expanded."""
    return st.sampled_from(_choice(INPUTS, "layout"))


def modes() -> st.SearchStrategy[str]:
    """``"eval"`` and ``"train"``."""
    return st.sampled_from(_choice(INPUTS, "mode"))


def dropouts() -> st.SearchStrategy[float]:
    """Dropout probabilities in [0, 1], both ends included."""
    return st.sampled_from(_choice(ARCHITECTURES, "dropout"))


def seeds() -> st.SearchStrategy[int]:
    """Seeds of 32 bits."""
    return st.integers(0, 2**32 - 1)


@st.composite
def configs(draw: st.DrawFn, space: Space = ARCHITECTURES) -> Config:
    """Architecture configurations of a space.

    Args:
        space: the space; its factors that describe inputs are ignored.
    """
    factors = dict(space.factors)
    values: dict[str, Any] = {}
    if factor := factors.get("kernel_sizes"):
        values["kernel_sizes"] = draw(_strategy("kernel_sizes", factor))
    count = len(values.get("kernel_sizes", (3,)))
    if factor := factors.get("channels"):
        values["channels"] = draw(_channels_for(factor, count))
    for name in ("num_blocks", "dropout"):
        if factor := factors.get(name):
            values[name] = draw(_strategy(name, factor))
    options = {n: f for n, f in factors.items() if n.startswith("option.")}
    values["options"] = tuple(
        sorted((n.removeprefix("option."), draw(_strategy(n, f))) for n, f in options.items())
    )
    return Config(**values)


@st.composite
def trials(
    draw: st.DrawFn, space: Space = ARCHITECTURES * INPUTS, *, max_size: int = 4, work: int = WORK
) -> tuple[Case, ...]:
    """Cases of a space that share an architecture, a dtype and a device, so that it is built once.

    Args:
        space: the space.
        max_size: most cases in a trial.
        work: most multiply-adds that a forward pass of one case may cost.
    """
    config = draw(configs(space).filter(lambda c: _affordable(c, work)))
    shared = {
        name: draw(_strategy(name, factor))
        for name in ("dtype", "device")
        if (factor := space.get(name))
    }
    one = _inputs(config, shared, space, work).filter(space.meets_constraints)
    return tuple(draw(st.lists(one, min_size=1, max_size=max_size)))


def cases(space: Space = ARCHITECTURES * INPUTS, *, work: int = WORK) -> st.SearchStrategy[Case]:
    """Single cases of a space; arguments as in `trials`."""
    return trials(space, max_size=1, work=work).map(lambda trial: trial[0])


@st.composite
def _inputs(
    draw: st.DrawFn, config: Config, shared: dict[str, Any], space: Space, work: int
) -> Case:
    values = dict(shared)
    per_position = _multiply_adds(config)
    if isinstance(factor := space.get("length"), Integers):
        high = min(factor.high, max(factor.low, work // per_position))
        near = (min(config.kernel_sizes), config.widest, config.field)
        values["length"] = draw(lengths(min_value=factor.low, max_value=high, near=near))
    elif factor:
        values["length"] = draw(_strategy("length", factor))
    if isinstance(factor := space.get("batch"), Integers):
        cost = per_position * values.get("length", 1)
        high = min(factor.high, max(factor.low, work // cost, 1))
        values["batch"] = draw(batches(min_value=factor.low, max_value=high))
    elif factor:
        values["batch"] = draw(_strategy("batch", factor))
    extra: list[tuple[str, Any]] = []
    for name, factor in space.factors:
        if name in ("length", "batch", *shared) or architectural(name):
            continue
        if name in Case.__dataclass_fields__:
            values[name] = draw(_strategy(name, factor))
        else:
            extra.append((name, draw(_strategy(name, factor))))
    return Case(**vars(config), **values, extra=tuple(sorted(extra)))


def _multiply_adds(config: Config) -> int:
    taps = sum(w * k for w, k in zip(config.widths, config.kernel_sizes, strict=True))
    return int(config.num_blocks * config.channels * (taps + config.channels))


def _affordable(config: Config, work: int) -> bool:
    return config.channels >= config.branches and _multiply_adds(config) <= work


def _channels_for(factor: Factor, branches: int) -> st.SearchStrategy[int]:
    if not isinstance(factor, Integers):
        return _strategy("channels", factor).filter(lambda c: c >= branches)
    low = max(factor.low, branches)
    near = tuple(branches * m + d for m in (1, 2, 3, 5, 8) for d in (0, 1, branches - 1))
    return st.one_of(
        _integers(low, max(low, factor.high), small=7, corners=near),
        channels(min_value=low, max_value=max(low, factor.high)),
    )


def _strategy(name: str, factor: Factor) -> st.SearchStrategy[Any]:
    if isinstance(factor, Choice):
        return st.sampled_from(list(factor.values))
    if isinstance(factor, Floats):
        return st.floats(factor.low, factor.high)
    if isinstance(factor, Lists):
        return st.lists(
            _strategy(name, factor.element), min_size=factor.low, max_size=factor.high
        ).map(tuple)
    if name == "num_blocks":
        return num_blocks(min_value=factor.low, max_value=factor.high)
    if name == "seed":
        return st.integers(factor.low, factor.high)
    return _integers(factor.low, factor.high, small=7)


def _integers(
    low: int, high: int, *, small: int, corners: Sequence[int] = ()
) -> st.SearchStrategy[int]:
    """Small ones, then corners, then any: in this order they shrink."""
    options = [st.integers(low, min(high, low + small))]
    if within := [c for c in corners if low <= c <= high]:
        options.append(st.sampled_from(within))
    if high > low + small:
        options.append(st.integers(low, high))
    return st.one_of(options)


def _choice(space: Space, name: str) -> list[Any]:
    factor = space.get(name)
    assert isinstance(factor, Choice)
    return list(factor.values)


def _check_bounds(low_name: str, low: int, high_name: str, high: int, *, least: int) -> None:
    for name, value in ((low_name, low), (high_name, high)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r} must be an integer")
    if low < least:
        raise ValueError(f"{low_name}={low} must be at least {least}")
    if high < low:
        raise ValueError(f"{high_name}={high} must be at least {low_name}={low}")
