"""Hypothesis strategies for architectures, inputs and cases.

Each is named for what it yields. Arguments are bounds; how often a corner is reached is stated in
``tests/test_strategies.py``. Everything shrinks towards what a person would write down: few
channels, the first kernel, one block, batch 1, short lengths, float32, contiguous, eval mode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hypothesis import reject
from hypothesis import strategies as st

from rescnn_verify import drawing
from rescnn_verify.case import Case, Config
from rescnn_verify.invalid import IMPOSSIBLE, spoiled
from rescnn_verify.space import (
    ARCHITECTURES,
    INPUTS,
    USUAL,
    Choice,
    Factor,
    Integers,
    Lists,
    Space,
)

__all__ = [
    "batches",
    "cases",
    "channels",
    "configs",
    "dropouts",
    "dtypes",
    "invalid_configs",
    "kernel_sizes",
    "layouts",
    "lengths",
    "modes",
    "num_blocks",
    "seeds",
    "trials",
]

T = TypeVar("T")


class _HypothesisDraw:
    """Choices drawn by Hypothesis, which remembers and shrinks them."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        return self._draw(_integers(low, high))

    def choice(self, options: Sequence[T]) -> T:
        return options[self._draw(_integers(0, len(options) - 1))]

    def real(self, low: float, high: float) -> float:
        return self._draw(st.floats(low, high))


# Making a strategy costs more than drawing from it.
_integers = functools.lru_cache(maxsize=4096)(st.integers)


def kernel_sizes(
    *, min_size: int = 1, max_size: int = 6, allowed: Sequence[int] = (3, 5, 7, 1, 9, 11, 13)
) -> st.SearchStrategy[tuple[int, ...]]:
    """Kernel lists in any order, repeats included.

    Args:
        min_size, max_size: number of branches.
        allowed: the kernel sizes, the simplest first.
    """
    _check_bounds("min_size", min_size, "max_size", max_size, least=1)
    if not allowed:
        raise ValueError("allowed=() must name at least one kernel size")
    return _value("kernel_sizes", Lists(Choice(*allowed), min_size, max_size))


def num_blocks(*, min_value: int = 1, max_value: int = 7) -> st.SearchStrategy[int]:
    """Numbers of blocks, small ones more often."""
    _check_bounds("min_value", min_value, "max_value", max_value, least=1)
    return _value("num_blocks", Integers(min_value, max_value))


def channels(
    *, min_value: int = 1, max_value: int = 128, branches: int = 1
) -> st.SearchStrategy[int]:
    """Channel counts: small ones, powers of two and their neighbours, and any other.

    Args:
        min_value, max_value: bounds.
        branches: number of branches; there are at least as many channels, and multiples of it and
            their neighbours matter.
    """
    _check_bounds("min_value", min_value, "max_value", max_value, least=1)
    _check_bounds("branches", branches, "max_value", max_value, least=1)
    factor = Integers(min_value, max_value)
    return _drawn(lambda draw: drawing.draw_channels(draw, factor, branches))


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
    factor = Integers(min_value, max_value)
    return _drawn(lambda draw: drawing.draw_length(draw, factor, near))


def batches(*, min_value: int = 0, max_value: int = 130) -> st.SearchStrategy[int]:
    """Batch sizes: 1, a few, more than 8, powers of two and their neighbours, and 0."""
    _check_bounds("min_value", min_value, "max_value", max_value, least=0)
    return _drawn(lambda draw: drawing.draw_batch(draw, Integers(min_value, max_value)))


def dtypes() -> st.SearchStrategy[str]:
    """Names of the floating dtypes."""
    return _factor(INPUTS, "dtype")


def layouts() -> st.SearchStrategy[str]:
    """Names of the input's memory layouts: contiguous, transposed, strided, expanded."""
    return _factor(INPUTS, "layout")


def modes() -> st.SearchStrategy[str]:
    """``"eval"`` and ``"train"``."""
    return _factor(INPUTS, "mode")


def dropouts() -> st.SearchStrategy[float]:
    """Dropout probabilities in [0, 1], both ends included."""
    return _factor(ARCHITECTURES, "dropout")


def seeds() -> st.SearchStrategy[int]:
    """Seeds of 32 bits."""
    return _factor(INPUTS, "seed")


@st.composite
def configs(draw: st.DrawFn, space: Space = ARCHITECTURES * USUAL) -> Config:
    """Architecture configurations of a space.

    Args:
        space: the space; its factors that describe inputs are ignored.
    """
    try:
        return drawing.draw_config(_HypothesisDraw(draw), space)
    except drawing.NoCase:
        reject()


@st.composite
def invalid_configs(draw: st.DrawFn, space: Space = ARCHITECTURES * USUAL) -> Config:
    """Configurations of a space with one argument spoiled, so that they must be refused.

    Args:
        space: where the other arguments come from.
    """
    config = draw(configs(space))
    how = draw(st.sampled_from(IMPOSSIBLE))
    return spoiled(config, how, draw(_integers(0, config.branches - 1)))[0]


@st.composite
def trials(
    draw: st.DrawFn,
    space: Space = ARCHITECTURES * INPUTS * USUAL,
    *,
    max_size: int = 4,
    work: int = drawing.WORK,
    any_config: bool = False,
) -> tuple[Case, ...]:
    """Cases of a space that share an architecture, a dtype and a device, so that it is built once.

    Args:
        space: the space.
        max_size: most cases in a trial.
        work: most multiply-adds that a forward pass of one case may cost.
        any_config: no configuration is left out for its cost; one that is too dear gets the least
            input.
    """
    source = _HypothesisDraw(draw)
    try:
        return drawing.draw_trial(
            source, space, max_size=max_size, work=work, any_config=any_config
        )
    except drawing.NoCase:
        reject()


def cases(
    space: Space = ARCHITECTURES * INPUTS * USUAL, *, work: int = drawing.WORK
) -> st.SearchStrategy[Case]:
    """Single cases of a space; arguments as in `trials`."""
    return trials(space, max_size=1, work=work).map(lambda trial: trial[0])


@st.composite
def _drawn(draw: st.DrawFn, make: Callable[[drawing.Draw], T]) -> T:
    return make(_HypothesisDraw(draw))


def _value(name: str, factor: Factor) -> st.SearchStrategy[Any]:
    return _drawn(lambda draw: drawing.draw_value(draw, name, factor))


def _factor(space: Space, name: str) -> st.SearchStrategy[Any]:
    factor = space.get(name)
    assert factor is not None
    return _value(name, factor)


def _check_bounds(low_name: str, low: int, high_name: str, high: int, *, least: int) -> None:
    for name, value in ((low_name, low), (high_name, high)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r} must be an integer")
    if low < least:
        raise ValueError(f"{low_name}={low} must be at least {least}")
    if high < low:
        raise ValueError(f"{high_name}={high} must be at least {low_name}={low}")
