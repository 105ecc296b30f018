"""A space: which cases there are, factor by factor, as plain data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from rescnn_verify.case import Case, Config

__all__ = [
    "ARCHITECTURES",
    "A_CHANNEL_PER_BRANCH",
    "EXTREMES",
    "INPUTS",
    "LARGE",
    "USUAL",
    "Choice",
    "Constraint",
    "Factor",
    "Floats",
    "Integers",
    "Lists",
    "Space",
    "SpaceError",
    "at_least",
]


class SpaceError(ValueError):
    """A space that has no case, or factors that cannot be combined."""


@dataclass(frozen=True)
class Integers:
    """The integers from ``low`` to ``high``, both included."""

    low: int
    high: int

    def __contains__(self, value: object) -> bool:
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        return is_integer and self.low <= value <= self.high  # type: ignore[operator]

    def __str__(self) -> str:
        return f"{self.low}..{self.high}"


def at_least(low: int) -> Integers:
    """The integers from ``low`` to wherever another factor ends."""
    return Integers(low, sys.maxsize)


@dataclass(frozen=True)
class Floats:
    """The floats from ``low`` to ``high``, both included."""

    low: float
    high: float

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low}..{self.high}"


@dataclass(frozen=True, init=False)
class Choice:
    """One of the given values, the simplest first."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any) -> None:
        object.__setattr__(self, "values", values)

    def __contains__(self, value: object) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return f"[{', '.join(map(_spelled, self.values))}]"


@dataclass(frozen=True)
class Lists:
    """Lists of ``low`` to ``high`` elements, each from one factor; order and repeats count."""

    element: Integers | Choice
    low: int
    high: int

    def __contains__(self, value: object) -> bool:
        return (
            isinstance(value, tuple)
            and self.low <= len(value) <= self.high
            and all(item in self.element for item in value)
        )

    def __str__(self) -> str:
        return f"lists of {self.low}..{self.high} from {self.element}"


def _spelled(value: Any) -> str:
    """A value as a space file has it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_spelled, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


Factor = Integers | Floats | Choice | Lists


@dataclass(frozen=True)
class Constraint:
    """What ties several factors together.

    Args:
        text: the condition as a person would say it.
        holds: whether a case meets it.
    """

    text: str
    holds: Callable[[Case], bool]


_CASE_FIELDS = {f.name for f in fields(Case)}
_CONFIG_FIELDS = {f.name for f in fields(Config)}


@dataclass(frozen=True, init=False)
class Space:
    """All combinations of the factors' values that meet the constraints.

    Factors are named as the fields of `Case`; other names are further factors of the property
    (``extra``), or, with the prefix ``option.``, further arguments of the target (``options``).
    A factor left out keeps the default of its field.

    ``Space(a=…) * Space(b=…)`` has the factors of both; where both name a factor, its values are
    those in both.
    """

    factors: tuple[tuple[str, Factor], ...]
    where: tuple[Constraint, ...]

    def __init__(
        self,
        factors: Mapping[str, Factor] | None = None,
        /,
        where: tuple[Constraint, ...] = (),
        **named: Factor,
    ) -> None:
        merged = dict(factors or {}) | named
        object.__setattr__(self, "factors", tuple(merged.items()))
        object.__setattr__(self, "where", where)

    def __mul__(self, other: Space) -> Space:
        merged = dict(self.factors)
        for name, factor in other.factors:
            merged[name] = _common(name, merged[name], factor) if name in merged else factor
        where = self.where + tuple(c for c in other.where if c not in self.where)
        return Space(merged, where=where)

    def narrow(self, *where: Constraint, **factors: Factor) -> Space:
        """The part of this space within the given factors and constraints."""
        return self * Space(factors, where=where)

    def within(self, region: Space, *, besides: Container[str] = ()) -> Space:
        """The part of this space in a region, whose factors that this space lacks do not count.

        Args:
            region: a space without constraints.
            besides: names of factors that do not count, either.

        Raises:
            SpaceError: there is none.
        """
        own = {name: f for name, f in region.factors if self.get(name) and name not in besides}
        return self * Space(own)

    def get(self, name: str) -> Factor | None:
        """The factor of that name, None where the field keeps its default."""
        return dict(self.factors).get(name)

    def meets_constraints(self, case: Case) -> bool:
        return all(constraint.holds(case) for constraint in self.where)

    def completed(self, case: Case) -> Case:
        """The case with the first value of each further choice that it does not name."""
        named = dict(case.extra)
        missing = {
            name: factor.values[0]
            for name, factor in self.factors
            if isinstance(factor, Choice)
            and name not in named
            and name not in _CASE_FIELDS
            and not architectural(name)
        }
        if not missing:
            return case
        return replace(case, extra=tuple(sorted((named | missing).items())))

    def __contains__(self, case: object) -> bool:
        if not isinstance(case, Case):
            return False
        try:
            return all(value(case, name) in f for name, f in self.factors) and (
                self.meets_constraints(case)
            )
        except KeyError:
            return False  # a factor of the space that the case does not name


def case_of(values: Mapping[str, Any]) -> Case:
    """The case that gives each factor, named as in a `Space`, its value."""
    fields_ = {name: item for name, item in values.items() if name in _CASE_FIELDS}
    rest = {name: item for name, item in values.items() if name not in _CASE_FIELDS}
    options = {k.removeprefix("option."): v for k, v in rest.items() if architectural(k)}
    extra = {k: v for k, v in rest.items() if not architectural(k)}
    return Case(
        **fields_, options=tuple(sorted(options.items())), extra=tuple(sorted(extra.items()))
    )


def value(case: Case, name: str) -> Any:
    """The value that a case gives to the factor ``name``."""
    if name in _CASE_FIELDS:
        return getattr(case, name)
    if name.startswith("option."):
        return case.option(name.removeprefix("option."))
    return case[name]


def architectural(name: str) -> bool:
    """Whether the factor ``name`` belongs to the configuration rather than to the input."""
    return name in _CONFIG_FIELDS or name.startswith("option.")


def _common(name: str, a: Factor, b: Factor) -> Factor:
    common: Factor | None = None
    if isinstance(a, Choice):
        common = Choice(*(v for v in a.values if v in b))
    elif isinstance(b, Choice):
        common = Choice(*(v for v in b.values if v in a))
    elif isinstance(a, Integers) and isinstance(b, Integers):
        common = Integers(max(a.low, b.low), min(a.high, b.high))
    elif isinstance(a, Floats) and isinstance(b, Floats):
        common = Floats(max(a.low, b.low), min(a.high, b.high))
    elif isinstance(a, Lists) and isinstance(b, Lists):
        element = _common(name, a.element, b.element)
        if isinstance(element, Integers | Choice):
            common = Lists(element, max(a.low, b.low), min(a.high, b.high))
    if common is None:
        raise SpaceError(f"{name}: {a} and {b} cannot be combined")
    empty = (isinstance(common, Choice) and not common.values) or (
        isinstance(common, Integers | Floats | Lists) and common.low > common.high
    )
    if empty:
        raise SpaceError(f"{name}: no value is both in {a} and in {b}")
    return common


A_CHANNEL_PER_BRANCH = Constraint(
    "at least one channel per branch", lambda c: c.channels >= len(c.kernel_sizes)
)
MORE_THAN_ONE_VALUE_TO_TRAIN = Constraint(
    "more than one value per channel in train mode",
    lambda c: c.mode == "eval" or c.batch * c.length > 1,
)

#: The configurations that the reference contract promises, as far as they are explored.
ARCHITECTURES = Space(
    kernel_sizes=Lists(
        Choice(3, 5, 7, 1, 9, 11, 13, 15, 31, 17, 19, 21, 33, 51, 63, 65, 101, 127), 1, 20
    ),
    num_blocks=Integers(1, 32),
    channels=Integers(1, 1024),
    dropout=Choice(0.0, 0.1, 0.5, 1.0, 0.3, 0.9, 0.001),
    where=(A_CHANNEL_PER_BRANCH,),
)

#: The inputs that the reference contract promises, as far as they are explored.
INPUTS = Space(
    batch=Integers(0, 2**12),
    length=Integers(1, 2**14 + 100),
    dtype=Choice("float32", "float64", "bfloat16", "float16"),
    layout=Choice("contiguous", "transposed", "strided", "expanded"),
    mode=Choice("eval", "train"),
    device=Choice("cpu", "cuda"),
    seed=Integers(0, 2**32 - 1),
    where=(MORE_THAN_ONE_VALUE_TO_TRAIN,),
)

#: Where most cases lie, of what is explored.
USUAL = Space(
    kernel_sizes=Lists(Choice(3, 5, 7, 1, 9, 11, 13, 15, 31), 1, 12),
    num_blocks=Integers(1, 12),
    channels=Integers(1, 128),
    batch=Integers(0, 260),
    length=Integers(1, 4200),
)

#: Where a few cases of each statement lie: each is large in one respect, and small in the others,
#: so that it is cheap. Somewhere there implementations begin to save memory, to work in parallel
#: or in parts, or come to the end of what their author tried.
EXTREMES = {
    "many values": Space(
        batch=Integers(64, 260), length=Integers(1024, 4200), channels=Integers(1, 4),
        num_blocks=Integers(1, 2), kernel_sizes=Lists(Choice(3, 5, 1, 7, 15), 1, 3),
    ),
    "many channels": Space(
        channels=Choice(512, 160, 256, 300, 257, 513, 768, 1024, 200, 129),
        batch=Integers(0, 4), length=Integers(1, 16), num_blocks=Integers(1, 2),
        kernel_sizes=Lists(Choice(3, 1, 5, 7), 1, 3),
    ),
    "long": Space(
        length=Integers(4201, 2**14 + 100), batch=Integers(1, 2), channels=Integers(1, 4),
        num_blocks=Integers(1, 3), kernel_sizes=Lists(Choice(3, 31, 5, 63, 7), 1, 3),
    ),
    "many rows": Space(
        batch=Integers(261, 2**12), length=Integers(1, 16), channels=Integers(1, 6),
        num_blocks=Integers(1, 2), kernel_sizes=Lists(Choice(3, 1, 5, 7), 1, 3),
    ),
    "deep": Space(
        num_blocks=Choice(16, 13, 20, 32, 17), channels=Integers(1, 6), batch=Integers(0, 4),
        length=Integers(1, 100), kernel_sizes=Lists(Choice(3, 1, 5, 7), 1, 3),
    ),
    "wide kernels": Space(
        kernel_sizes=Lists(Choice(33, 17, 19, 21, 51, 63, 65, 101, 127), 1, 3),
        channels=Integers(1, 8), num_blocks=Integers(1, 2), batch=Integers(0, 4),
        length=Integers(1, 300),
    ),
    "many branches": Space(
        kernel_sizes=Lists(Choice(3, 5, 7, 1), 13, 20), channels=Integers(13, 48),
        num_blocks=Choice(1), batch=Integers(0, 4), length=Integers(1, 100),
    ),
}  # fmt: skip

#: Inputs of 60,000 values and more, on few channels.
LARGE = INPUTS.narrow(
    batch=Integers(60, 260), length=Integers(1000, 4200), channels=Integers(1, 6),
    num_blocks=Integers(1, 2),
)  # fmt: skip
