"""Coverage of the factors: which pairs of their classes a set of cases has met.

Each factor of a case falls into one of a few classes, such as "shorter than the field". A set of
pairs of classes is one integer, a bit for each, so that it travels and merges cheaply.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

from rescnn_verify.case import Case

__all__ = ["Coverage", "pairs_of"]


def _size(*bounds: int) -> Callable[[int], int]:
    """The number of bounds that a size has reached."""
    return lambda size: sum(size >= bound for bound in bounds)


def _channels(case: Case) -> int:
    if case.channels == case.branches:
        return 0
    return 1 if case.channels % case.branches == 0 else 2


def _order(case: Case) -> int:
    sizes = case.kernel_sizes
    if len(set(sizes)) < len(sizes):
        return 2
    return 0 if list(sizes) == sorted(sizes) else 1


def _length(case: Case) -> int:
    return _size(2, case.widest, case.field, case.field + 200)(case.length)


def _dropout(case: Case) -> int:
    return 0 if case.dropout == 0 else 2 if case.dropout == 1 else 1


def _named(field: str, *names: str) -> Callable[[Case], int]:
    return lambda case: names.index(getattr(case, field))


_blocks, _width, _kernel, _batch, _branch = (
    _size(2, 3, 4),
    _size(9, 33),
    _size(2, 4, 8),
    _size(1, 2, 9),
    _size(2, 3, 4),
)

#: Each factor: how many classes it has, and the class of a case.
_FACTORS: tuple[tuple[int, Callable[[Case], int]], ...] = (
    (3, _channels),  # one for each branch, a multiple, with a remainder
    (3, lambda case: _width(case.channels)),  # up to 8, up to 32, more
    (4, lambda case: _branch(case.branches)),  # 1, 2, 3, more
    (3, _order),  # ascending, another order, repeats
    (4, lambda case: _kernel(case.widest)),  # the widest kernel: 1, 3, 5 and 7, more
    (4, lambda case: _blocks(case.num_blocks)),  # 1, 2, 3, more
    (3, _dropout),  # 0, between, 1
    (4, lambda case: _batch(case.batch)),  # 0, 1, up to 8, more
    (5, _length),  # 1, within a kernel, within the field, up to 200 more, longer
    (4, _named("dtype", "float32", "float64", "bfloat16", "float16")),
    (4, _named("layout", "contiguous", "transposed", "strided", "expanded")),
    (2, _named("mode", "eval", "train")),
)

_OFFSETS = tuple(itertools.accumulate((size for size, _ in _FACTORS), initial=0))
_CLASSES = _OFFSETS[-1]


def classes_of(case: Case) -> tuple[int, ...]:
    """The class of a case in each factor, numbered across the factors."""
    return tuple(
        offset + class_of(case) for offset, (_, class_of) in zip(_OFFSETS, _FACTORS, strict=False)
    )


def pairs_of(case: Case) -> int:
    """The pairs of classes that a case meets, a bit for each."""
    return _pairs(classes_of(case))


@functools.lru_cache(maxsize=4096)
def _pairs(classes: tuple[int, ...]) -> int:
    bits = 0
    for a, b in itertools.combinations(classes, 2):
        bits |= 1 << (a * _CLASSES + b)
    return bits


@dataclass(frozen=True)
class Coverage:
    """Pairs of classes met, out of those whose two classes were met at all.

    Args:
        met: how many pairs of classes were met together.
        possible: how many pairs the classes that were met could form. Some may contradict each
            other (one branch and repeated kernels), so that not all of it need be in reach.
    """

    met: int
    possible: int

    @classmethod
    def of(cls, pairs: int) -> Coverage:
        """The coverage of a set of pairs as `pairs_of` gives them, joined by ``|``."""
        seen: set[int] = set()
        met = 0
        rest = pairs
        while rest:
            low = rest & -rest
            seen.update(divmod(low.bit_length() - 1, _CLASSES))
            met += 1
            rest ^= low
        counts = [
            sum(start <= item < end for item in seen) for start, end in itertools.pairwise(_OFFSETS)
        ]
        return cls(met, sum(a * b for a, b in itertools.combinations(counts, 2)))
