"""Fuzzing: rounds over all properties until the time is up.

Each round runs every property on a few more cases, from four sources that reach different corners:
uniform samples, extreme cases, what Hypothesis draws, and the smallest cases one after the other.
The properties that met the most that was new come first in the next round.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from rescnn_verify.campaign import devices_of, run_units
from rescnn_verify.case import Case
from rescnn_verify.engine import Search
from rescnn_verify.enumeration import smallest_first
from rescnn_verify.evidence import merged
from rescnn_verify.outcome import (
    BAD_TARGET,
    FALSIFIED,
    INTERNAL_ERROR,
    KNOWN,
    NOT_RUN,
    NOTHING_ASSERTED,
    Outcome,
    signature,
)
from rescnn_verify.space import Space, SpaceError
from rescnn_verify.statement import find_property
from rescnn_verify.unit import Unit, target_of
from rescnn_verify.workers import Crew

__all__ = ["Campaign", "Event", "FuzzPlan"]

Trial = tuple[Case, ...]

#: Trials of a property in the first round; they double from round to round, up to 16 times.
SAMPLED, DRAWN, SMALLEST = 6, 2, 2
#: Seconds that a property may take in a round, and that shrinking may take.
SLICE, SHRINKING = 5.0, 10.0


#: Trials of a corpus that make a unit.
KEPT = 4
#: Seconds that a campaign must have for properties that are slow to run in it.
SLOW = 600.0

#: Verdicts after which a property is not run again.
CLOSING = frozenset({FALSIFIED, BAD_TARGET, INTERNAL_ERROR, NOT_RUN})


@dataclass(frozen=True)
class FuzzPlan:
    """What to fuzz, and how long.

    Args:
        target: the target as the user names it.
        properties: names of the properties.
        seconds: the budget.
        seed: all cases are a function of it, of the shard, and of how far the campaign came.
        devices: ``"cpu"``, ``"cuda"`` or both.
        shard: (i, n): this is the i-th of n campaigns that try different cases.
        space: the user's own space, as `Unit` has it.
        keep_going: go on with the other properties after a falsification.
        case_timeout: seconds after which a case is a hang.
        known: signatures of known failures, by property.
        first: trials to run before anything else, by property: those of a corpus.
    """

    target: str
    properties: tuple[str, ...]
    seconds: float
    seed: int
    devices: tuple[str, ...] = ("cpu",)
    shard: tuple[int, int] = (0, 1)
    space: Mapping[str, Any] | None = None
    keep_going: bool = False
    case_timeout: float = 60.0
    known: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    first: Mapping[str, tuple[Trial, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """One unit done.

    Args:
        outcome: of this unit.
        round: the round it belongs to, from 1.
    """

    outcome: Outcome
    round: int


@dataclass
class _Lane:
    """A property on a device, and what came of it so far."""

    name: str
    device: str
    smallest: Iterator[Trial]
    first: Iterator[Trial]
    total: Outcome
    promise: float
    closed: bool = False


class Campaign:
    """A fuzzing campaign.

    Args:
        plan: what to fuzz.
    """

    def __init__(self, plan: FuzzPlan) -> None:
        self.plan = plan
        self._lanes = {
            (name, device): _lane(plan, name, device, rank)
            for rank, name in enumerate(_likely_first(plan.properties))
            for device in devices_of(name, plan.devices)
        }
        self._round = 0
        self._until = 0.0

    @property
    def outcomes(self) -> list[Outcome]:
        """What came of each property so far, in the plan's order."""
        order = self.plan.properties.index
        return sorted(
            (lane.total for lane in self._lanes.values()), key=lambda o: (order(o.name), o.device)
        )

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._until - time.monotonic())

    def run(self, crew: Crew, *, until: Callable[[], float] = lambda: math.inf) -> Iterator[Event]:
        """Runs until the time is up, a property is falsified, or nothing is left to run.

        Args:
            crew: where it runs.
            until: as in `run_units`, should it be sooner than the plan's budget.
        """
        self._until = time.monotonic() + self.plan.seconds
        for unit, outcome in run_units(
            self._units(), crew, until=lambda: min(self._until, until())
        ):
            lane = self._lanes[unit.name, unit.device]
            if signature(outcome.what, outcome.got) in unit.search.known:  # of a process that ended
                outcome = replace(
                    outcome, verdict=KNOWN, reason="its process ended as a known failure's does"
                )
            new = (outcome.pairs & ~lane.total.pairs).bit_count()
            lane.promise = (1.0 + new) / (0.001 + outcome.seconds)
            lane.total = merged((lane.total, outcome))
            lane.closed |= outcome.verdict in CLOSING or outcome.cases == 0 or outcome.ended
            yield Event(outcome, self._round)
            if outcome.verdict == FALSIFIED and not self.plan.keep_going:
                self._until = time.monotonic()  # what runs now may have found more

    def _units(self) -> Iterator[Unit]:
        for lane in self._lanes.values():  # what was kept comes first, all of it
            while not lane.closed and (kept := tuple(itertools.islice(lane.first, KEPT))):
                yield self._unit_of(lane, Search(trials=kept, seconds=self.seconds_left))
        for self._round in itertools.count(1):
            lanes = [lane for lane in self._lanes.values() if not lane.closed]
            lanes.sort(key=lambda lane: (find_property(lane.name).slow, -lane.promise))
            if not lanes:
                return
            for lane in lanes:
                if not lane.closed:
                    yield self._unit(lane)

    def _unit(self, lane: _Lane) -> Unit:
        plan, prop = self.plan, find_property(lane.name)
        opening = self._round == 1
        share = prop.effort * min(16, 2 ** (self._round - 1))
        search = Search(
            documented=opening,
            sampled=max(1, round(SAMPLED * share)),
            extreme=0 if opening else prop.extreme,
            drawn=max(1, round(DRAWN * share)),
            seconds=min(SLICE, self.seconds_left),
            seen=None if opening else lane.total.pairs,
            last=tuple(itertools.islice(lane.smallest, max(1, round(SMALLEST * share)))),
            slow=plan.seconds >= SLOW,
        )
        return self._unit_of(lane, search)

    def _unit_of(self, lane: _Lane, search: Search) -> Unit:
        plan = self.plan
        text = f"{plan.seed}/{plan.shard[0]}/{self._round}"
        search = replace(
            search,
            shrinking=min(SHRINKING, max(1.0, self.seconds_left)),
            shard=plan.shard,
            known=plan.known.get(lane.name, ()),
        )
        return Unit(
            lane.name,
            plan.target,
            search,
            seed=int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"),
            device=lane.device,
            space=plan.space,
            case_timeout=plan.case_timeout,
        )


def _lane(plan: FuzzPlan, name: str, device: str, rank: int) -> _Lane:
    prop = find_property(name)
    index, count = plan.shard
    smallest: Iterator[Trial] = iter(())
    first: Iterator[Trial] = iter(())
    with suppress(SpaceError):  # the first unit says why
        space = prop.space_for(target_of(plan.target, plan.space), device)
        smallest = itertools.islice(smallest_first(space, seed=plan.seed), index, None, count)
        first = (trial for trial in plan.first.get(name, ()) if all(_fits(c, space) for c in trial))
    nothing = Outcome(
        name, NOTHING_ASSERTED, prop.evidence, device, reason="the run ended before it ran"
    )
    return _Lane(name, device, smallest, first, nothing, promise=-float(rank))


def _fits(case: Case, space: Space) -> bool:
    """Whether a case of a corpus, perhaps of another target, is one of a space."""
    named = {name for name, _ in space.factors}
    rest = {f"option.{name}" for name, _ in case.options} | {name for name, _ in case.extra}
    return rest <= named and case in space


def _likely_first(names: tuple[str, ...]) -> list[str]:
    """The exact oracles see most mistakes, so they come first before anything is known."""
    return sorted(names, key=lambda name: not name.startswith("arithmetic."))
