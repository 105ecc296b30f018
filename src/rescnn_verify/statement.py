"""A property: a statement about a target and a case, with the space over which it is claimed."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rescnn_verify.case import Case
from rescnn_verify.compare import Comparison
from rescnn_verify.drawing import WORK
from rescnn_verify.space import Choice, Space, SpaceError
from rescnn_verify.subject import Subject
from rescnn_verify.target import Target

__all__ = ["Need", "Property", "PropertyError", "all_properties", "find_property", "statement"]

Check = Callable[[Subject, Case], Iterator[Comparison]]


class PropertyError(ValueError):
    """There is no property of that name."""


@dataclass(frozen=True)
class Need:
    """What a target must promise for a property to apply.

    Args:
        name: the trait or handle, as `rescnn-verify list` shows it.
        met: whether a target promises it.
    """

    name: str
    met: Callable[[Target], bool]


@dataclass(frozen=True)
class Property:
    """A statement, where it is claimed, and what it needs.

    Args:
        check: the predicate; yields one `Comparison` for each comparison made, raises
            `Falsified` when the statement is false.
        space: the cases for which the statement is claimed of any target; a target narrows it.
        needs: what a target must promise; otherwise the property is not applicable.
        evidence: ``"exact"`` (bitwise), ``"bounded"`` (by a derived bound) or ``"statistical"``.
        documented: whether the documented 512-channel stack is always among its cases.
        work: most multiply-adds that a forward pass of one case may cost.
        effort: how many times a profile's number of trials; cheap ones afford more, and what
            would take longest gets by with fewer.
        inputs: most cases that share a built model; where a case costs less than a model, many.
        extreme: how many times a profile's number of extreme cases, as far as its space has any.
        slow: whether only the thorough profile runs it.
        exhaustive: whether the thorough profile runs every case of its space, which then is not
            narrowed by the target's: for statements about all who follow the contract.
    """

    check: Check
    space: Space
    needs: tuple[Need, ...]
    evidence: str
    documented: bool
    work: int
    effort: float
    inputs: int
    extreme: int
    slow: bool
    exhaustive: bool

    @property
    def family(self) -> str:
        return self.check.__module__.rpartition(".")[2]

    @property
    def name(self) -> str:
        return f"{self.family}.{self.check.__name__}"

    @property
    def text(self) -> str:
        """The statement in full."""
        return inspect.cleandoc(self.check.__doc__ or "")

    @property
    def title(self) -> str:
        """The statement in one sentence: the docstring's first paragraph."""
        return " ".join(self.text.partition("\n\n")[0].split())

    def missing(self, target: Target) -> str | None:
        """Why the property does not apply to a target, None when it does."""
        lacking = [need.name for need in self.needs if not need.met(target)]
        if lacking:
            return f"the target does not promise: {', '.join(lacking)}"
        try:
            self.space_for(target)
        except SpaceError as error:
            return f"no case in common with the target's space ({error})"
        return None

    def space_for(self, target: Target, device: str | None = None) -> Space:
        """The cases for which the statement is claimed of a target.

        Args:
            target: the target.
            device: only those on this device.

        Raises:
            SpaceError: there are none.
        """
        space = self.space
        if not self.exhaustive:
            space = space * target.space
        elif not target.promises_everything:
            own = {name: f for name, f in target.space.factors if space.get(name)}
            space = space * Space(own, where=target.space.where)
        elif target.kind != "stack":
            space = space.narrow(num_blocks=Choice(1))
        if device and space.get("device"):
            space = space.narrow(device=Choice(device))
        return space


def statement(
    *,
    space: Space,
    needs: tuple[Need, ...] = (),
    evidence: str = "exact",
    documented: bool = False,
    work: int = WORK,
    effort: float = 1.0,
    inputs: int = 4,
    extreme: int = 7,
    slow: bool = False,
    exhaustive: bool = False,
) -> Callable[[Check], Property]:
    """Makes a generator function of (subject, case) a `Property`, its docstring the statement."""

    def wrap(check: Check) -> Property:
        return Property(
            check,
            space,
            needs,
            evidence,
            documented,
            work,
            effort,
            inputs,
            extreme,
            slow,
            exhaustive,
        )

    return wrap


@functools.cache
def all_properties() -> tuple[Property, ...]:
    """Every property, family by family, in the order in which they are written."""
    package = importlib.import_module("rescnn_verify.properties")
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in package.FAMILIES]
    return tuple(p for module in modules for p in vars(module).values() if isinstance(p, Property))


def find_property(name: str) -> Property:
    """The property of that name.

    Raises:
        PropertyError: there is none.
    """
    for prop in all_properties():
        if prop.name == name:
            return prop
    raise PropertyError(f"there is no property {name!r}; `rescnn-verify list` shows them")
