"""How a class of the zoo says what it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

from torch import nn

Trigger = Callable[[Any], bool]
Class = TypeVar("Class", bound=type[nn.Module])


@dataclass(frozen=True)
class Fault:
    """A wrong implementation; `trigger` tells, for rare faults only, which cases can show it."""

    cls: type[nn.Module]
    family: str
    mistake: str
    trigger: Trigger | None = None


@dataclass(frozen=True)
class Right:
    """A right implementation, and how it differs from the plain one."""

    cls: type[nn.Module]
    how: str


def wrong(family: str, mistake: str, *, trigger: Trigger | None = None) -> Callable[[Class], Class]:
    """Mark a class as a wrong implementation."""

    def mark(cls: Class) -> Class:
        cls._zoo_entry = Fault(cls, family, mistake, trigger)  # type: ignore[attr-defined]
        return cls

    return mark


def right(how: str) -> Callable[[Class], Class]:
    """Mark a class as a right implementation."""

    def mark(cls: Class) -> Class:
        cls._zoo_entry = Right(cls, how)  # type: ignore[attr-defined]
        return cls

    return mark


def collect(modules: Iterable[ModuleType]) -> tuple[Any, ...]:
    """The entries of the marked classes that these modules define, in order of definition."""
    return tuple(
        vars(value)["_zoo_entry"]
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and "_zoo_entry" in vars(value)
    )
