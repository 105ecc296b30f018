"""Campaigns: many properties, in this process or in several."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from rescnn_verify.engine import FALSIFIED, PROFILES, Outcome, check_property
from rescnn_verify.needs import ANOTHER
from rescnn_verify.statement import Property, all_properties, find_property
from rescnn_verify.target import load
from rescnn_verify.workers import workers

__all__ = ["Plan", "SelectionError", "Unit", "check_unit", "run_plan", "select"]


class SelectionError(ValueError):
    """An expression that is not one, or that selects nothing."""


@dataclass(frozen=True)
class Plan:
    """What to check.

    Args:
        target: the target as the user names it.
        properties: names of the properties.
        profile: a name in `PROFILES`.
        seed: the whole run is a function of it.
        devices: ``"cpu"``, ``"cuda"`` or both.
        stop_early: stop at the first falsified property.
    """

    target: str
    properties: tuple[str, ...]
    profile: str = "default"
    seed: int = 0
    devices: tuple[str, ...] = ("cpu",)
    stop_early: bool = False

    @property
    def units(self) -> tuple[Unit, ...]:
        """Each property on each device; what takes no input needs no second device."""
        return tuple(
            Unit(name, device)
            for name in self.properties
            for device in (self.devices if _takes_input(name) else ("cpu",))
        )


@dataclass(frozen=True)
class Unit:
    """A property on a device: what is handed to a worker."""

    name: str
    device: str


def _takes_input(name: str) -> bool:
    return find_property(name).space.get("device") is not None


def select(expression: str | None, *, pairs: bool | None = None) -> tuple[Property, ...]:
    """The properties whose names match an expression of substrings, ``and``, ``or``, ``not``.

    Args:
        expression: None selects every property.
        pairs: only those that compare two implementations (True), or only the others (False).

    Raises:
        SelectionError: it is no such expression, or nothing matches.
    """
    everything = tuple(
        p for p in all_properties() if pairs is None or (ANOTHER in p.needs) == pairs
    )
    if not expression:
        return everything
    try:
        tree = ast.parse(expression.replace(".", "__dot__"), mode="eval").body
        chosen = tuple(p for p in everything if _matches(tree, p.name))
    except (SyntaxError, SelectionError):
        raise SelectionError(
            f"-k {expression!r} is not an expression of names, and, or, not and parentheses"
        ) from None
    if not chosen:
        raise SelectionError(
            f"-k {expression!r} selects no property; `rescnn-verify list` shows all"
        )
    return chosen


def _matches(node: ast.expr, name: str) -> bool:
    if isinstance(node, ast.Name):
        return node.id.replace("__dot__", ".").lower() in name.lower()
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not _matches(node.operand, name)
    if isinstance(node, ast.BoolOp):
        combine = all if isinstance(node.op, ast.And) else any
        return combine([_matches(value, name) for value in node.values])
    raise SelectionError


def run_plan(plan: Plan, executor: Executor | None) -> Iterator[Outcome]:
    """The outcomes of a plan, each as it comes; fewer if it stops early.

    Args:
        plan: what to check.
        executor: where to run it; None: here, one property after the other.
    """
    for outcome in _outcomes(plan, executor):
        yield outcome
        if plan.stop_early and outcome.verdict == FALSIFIED:
            return


def _outcomes(plan: Plan, executor: Executor | None) -> Iterator[Outcome]:
    if executor is None:
        yield from (check_unit(plan, unit) for unit in plan.units)
        return
    futures: dict[Future[Outcome], Unit] = {
        executor.submit(check_unit, plan, unit): unit for unit in plan.units
    }
    interrupted: list[Unit] = []
    try:
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool:
                interrupted.append(futures[future])
    finally:
        for future in futures:
            future.cancel()
    yield from _one_by_one(plan, interrupted)


def _one_by_one(plan: Plan, units: Sequence[Unit]) -> Iterator[Outcome]:
    """Each property in a process of its own, after one of them ended a shared process."""
    for unit in units:
        with workers(1) as executor:
            try:
                yield executor.submit(check_unit, plan, unit).result()
            except BrokenProcessPool:
                yield Outcome(
                    name=unit.name,
                    verdict=FALSIFIED,
                    evidence="exact",
                    device=unit.device,
                    reason="the process ended while this property ran",
                    what="the process that runs the target",
                    expected="it returns",
                    got="it ended (a crash, an exit, or out of memory)",
                )


def check_unit(plan: Plan, unit: Unit) -> Outcome:
    """Runs one unit of a plan."""
    return check_property(
        find_property(unit.name),
        _load(plan.target),
        profile=PROFILES[plan.profile],
        seed=plan.seed,
        device=unit.device,
    )


_load = functools.lru_cache(maxsize=4)(load)
