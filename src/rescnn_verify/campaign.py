"""Campaigns: many properties, in this process or in several."""

from __future__ import annotations

import ast
import itertools
import json
import math
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED as FIRST
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from typing import Any

from rescnn_verify.alone import found_so_far, hanging, post_mortem, run_alone_to_the_end
from rescnn_verify.engine import PROFILES, Search
from rescnn_verify.needs import ANOTHER
from rescnn_verify.outcome import FALSIFIED, Outcome
from rescnn_verify.statement import Property, all_properties, find_property
from rescnn_verify.unit import Unit, failed, run_unit
from rescnn_verify.workers import Crew

__all__ = ["Plan", "SelectionError", "devices_of", "run_plan", "run_units", "select"]

#: Seconds that a unit may take to end after its time is up, before its worker is killed.
GRACE = 1.5
#: Seconds that looking into the end of a worker may take, even when the time is up.
LOOKING = 2.5
#: Seconds after which a case that still runs when the time is up may hang.
LONG = 15.0
#: Seconds after which it is asked again whether the time is up.
POLL = 0.2


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
        space: the user's own space, as `Unit` has it.
    """

    target: str
    properties: tuple[str, ...]
    profile: str = "default"
    seed: int = 0
    devices: tuple[str, ...] = ("cpu",)
    stop_early: bool = False
    space: Mapping[str, Any] | None = None

    @property
    def units(self) -> tuple[Unit, ...]:
        """Each property on each device; what takes no input needs no second device."""
        profile = PROFILES[self.profile]
        return tuple(
            Unit(
                name,
                self.target,
                Search.of(profile, find_property(name)),
                seed=self.seed,
                device=device,
                space=self.space,
            )
            for name in self.properties
            for device in devices_of(name, self.devices)
        )


def devices_of(name: str, devices: tuple[str, ...]) -> tuple[str, ...]:
    """The devices on which a property is to run: one is enough for what takes no input."""
    return devices if find_property(name).space.get("device") is not None else ("cpu",)


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


def run_plan(
    plan: Plan, crew: Crew, *, until: Callable[[], float] = lambda: math.inf
) -> Iterator[Outcome]:
    """The outcomes of a plan, each as it comes; fewer if it stops early.

    Args:
        plan: what to check.
        crew: where it runs.
        until: as in `run_units`.
    """
    found: list[float] = []
    for _, outcome in run_units(iter(plan.units), crew, until=lambda: min([until(), *found])):
        yield outcome
        if plan.stop_early and outcome.verdict == FALSIFIED:
            found.append(time.monotonic())


def run_units(
    units: Iterator[Unit], crew: Crew, *, until: Callable[[], float] = lambda: math.inf
) -> Iterator[tuple[Unit, Outcome]]:
    """Units with their outcomes, each as it comes.

    A unit is taken from the iterator only when a worker is free for it, so that what came before
    can decide what comes next. When a worker ends, what ran is looked into: the unit that ended it
    is falsified, the others run again.

    Args:
        units: what to run.
        crew: where.
        until: when to stop, in seconds of `time.monotonic`. What runs then is ended, and what it
            has found by then is kept; asked again and again, as it may come sooner.
    """
    again: list[Unit] = []
    running: dict[Future[str], Unit] = {}
    with tempfile.TemporaryDirectory(prefix="rescnn-verify-") as folder:
        for number in itertools.count():
            while len(running) < crew.size and time.monotonic() < until():
                unit = again.pop() if again else next(units, None)
                if unit is None:
                    break
                if crew.together:
                    unit = replace(unit, journal=f"{folder}/{number}-{len(running)}")
                try:
                    running[crew.submit(run_unit, unit.dumps())] = unit
                except crew.lost:  # a worker ended just now
                    again.append(unit)
                    if not running:
                        crew.restart()
                    break
            if not running and again and time.monotonic() < until():
                continue
            if not running:
                return
            done, _ = wait(running, timeout=0.0, return_when=FIRST)
            while not done and time.monotonic() < until() + GRACE and not crew.gone():
                done, _ = wait(running, timeout=POLL, return_when=FIRST)
            if not done:
                break
            lost = []
            for future in done:
                unit = running.pop(future)
                try:
                    yield unit, Outcome.from_json(json.loads(future.result()))
                except crew.lost:
                    lost.append(unit)
                except Exception:  # of what carries units, not of what runs them
                    yield unit, failed(unit, traceback.format_exc())
            if lost and crew.together:
                lost += running.values()
                running.clear()
                crew.restart()
            if lost:
                yield from _after_a_loss(lost, again, until())
        gone = crew.gone()
        crew.kill()
        for unit in running.values():
            if gone:
                yield unit, failed(unit, gone)
                continue
            limit = max(LONG, unit.case_timeout / 2)
            if outcome := found_so_far(unit) or hanging(unit, limit):
                yield unit, outcome


def _after_a_loss(
    lost: Sequence[Unit], again: list[Unit], until: float
) -> Iterator[tuple[Unit, Outcome]]:
    """The units that ended their process, falsified; the others are to run again.

    If no unit ends a fresh process by its last trial alone, each runs on its own from the start.
    """
    until = max(until, time.monotonic() + LOOKING)
    blamed = 0
    innocent = []
    for unit in lost:
        if outcome := post_mortem(unit, until):
            blamed += outcome.ended
            yield unit, outcome
        else:
            innocent.append(unit)
    if blamed:
        again += innocent
        return
    for unit in innocent:
        yield unit, run_alone_to_the_end(unit, until)
