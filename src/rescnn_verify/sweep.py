"""Sweeping: every case of a bounded space, the smallest configurations first; it can be resumed."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from rescnn_verify.campaign import devices_of, run_units
from rescnn_verify.engine import Search
from rescnn_verify.enumeration import architectures, batched
from rescnn_verify.evidence import merged
from rescnn_verify.outcome import (
    FALSIFIED,
    HELD,
    NOT_APPLICABLE,
    NOT_RUN,
    NOTHING_ASSERTED,
    Outcome,
)
from rescnn_verify.space import Choice, Factor, Integers, Lists, Space, SpaceError, architectural
from rescnn_verify.statement import find_property
from rescnn_verify.unit import Unit, target_of
from rescnn_verify.witness import versions
from rescnn_verify.workers import Crew

__all__ = ["Sweep", "SweepError", "SweepPlan"]

VERSION = 1

#: A unit, which is what is done again if it was interrupted: so many configurations, or as many as
#: have about so many cases.
CHUNK, CASES = 20, 1000
#: Verdicts that running a unit again would not change.
CONCLUSIVE = frozenset({HELD, FALSIFIED, NOT_APPLICABLE, NOTHING_ASSERTED})
#: More cases of one property than anybody waits for.
MOST = 10**8


class SweepError(ValueError):
    """A space that cannot be swept, or a state file of another sweep."""


@dataclass(frozen=True)
class SweepPlan:
    """What to sweep.

    Args:
        target: the target as the user names it.
        properties: names of the properties.
        space: the data of a space file; without a seed in it, every seed is 0.
        devices: ``"cpu"``, ``"cuda"`` or both.
        shard: (i, n): every n-th unit, beginning with the i-th.
        keep_going: go on after a falsification.
        case_timeout: seconds after which a case is a hang.
    """

    target: str
    properties: tuple[str, ...]
    space: Mapping[str, Any]
    devices: tuple[str, ...] = ("cpu",)
    shard: tuple[int, int] = (0, 1)
    keep_going: bool = False
    case_timeout: float = 60.0

    @property
    def bounded(self) -> dict[str, Any]:
        """The space with a seed."""
        return {"space": {"seed": 0, **self.space}}

    def header(self) -> dict[str, Any]:
        """What a state file must agree with."""
        return {
            "version": VERSION,
            "target": self.target,
            "properties": list(self.properties),
            "space": self.bounded["space"],
            "devices": list(self.devices),
            "shard": list(self.shard),
            "chunk": [CHUNK, CASES],
            "versions": versions(),
            "source": self._source(),
        }

    def _source(self) -> str:
        """A hash of the target's own files: what is done is done of these."""
        files = sorted(target_of(self.target).source_files)
        content = b"".join(Path(file).read_bytes() for file in files if Path(file).is_file())
        return hashlib.sha256(content).hexdigest()


@dataclass
class Sweep:
    """A sweep and what was done of it.

    Args:
        plan: what to sweep.
        state: the file that remembers each unit that is done.
    """

    plan: SweepPlan
    state: Path
    done: dict[str, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.done = _read(self.state, self.plan.header())
        self._not_applicable: list[Outcome] = []
        self._spaces: dict[str, Space] = {}
        for name in self.plan.properties:
            for device in devices_of(name, self.plan.devices):
                self._add_lane(name, device)

    def _add_lane(self, name: str, device: str) -> None:
        prop = find_property(name)
        try:
            target = target_of(self.plan.target, self.plan.bounded)
            if reason := prop.missing(target):
                raise SpaceError(reason)
            space = prop.space_for(target, device)
        except SpaceError as error:
            nothing = Outcome(name, NOT_APPLICABLE, prop.evidence, device, reason=str(error))
            self._not_applicable.append(nothing)
            return
        try:
            sizes = {
                factor_name: _size(factor_name, factor) for factor_name, factor in space.factors
            }
        except SpaceError as error:
            raise SweepError(f"{name}: {error}; name values in the space file") from error
        size = math.prod(sizes.values())
        if size > MOST:
            largest = sorted(sizes, key=lambda factor: -sizes[factor])[:4]
            raise SweepError(
                f"{name} has {size:,} combinations in this space, more than {MOST:,}; narrow it: "
                + ", ".join(f"{factor} has {sizes[factor]:,}" for factor in largest)
            )
        self._spaces[f"{name}@{device}"] = space

    @property
    def units(self) -> int:
        """How many units there are, done or not."""
        return sum(map(self._count, self._spaces))

    def _count(self, lane: str) -> int:
        """How many units of this shard a property has."""
        factors = self._spaces[lane].factors
        configs = math.prod(_size(n, factor) for n, factor in factors if architectural(n))
        units = -(-configs // _chunk(self._spaces[lane]))
        return len(range(self._first(lane), units, self.plan.shard[1]))

    @property
    def plans(self) -> list[str]:
        """How many combinations each property has, and of which factors that nobody named."""
        return [self._plan(lane) for lane in self._spaces]

    def _plan(self, lane: str) -> str:
        sizes = {name: _size(name, factor) for name, factor in self._spaces[lane].factors}
        named = self.plan.bounded["space"]
        unnamed = [
            f"{n} ({size} values)" for n, size in sizes.items() if size > 1 and n not in named
        ]
        said = f"{lane.partition('@')[0]}: {math.prod(sizes.values()):,} combinations"
        return f"{said}, as nobody named {', '.join(unnamed)}" if unnamed else said

    def _first(self, lane: str) -> int:
        """The number of a property's first unit of this shard: spread, as many have but one."""
        index, count = self.plan.shard
        return (index + list(self._spaces).index(lane)) % count

    @property
    def outcomes(self) -> list[Outcome]:
        """What came of each property so far, in the plan's order."""
        totals = list(map(self._total, self._spaces))
        order = self.plan.properties.index
        return sorted((*self._not_applicable, *totals), key=lambda o: (order(o.name), o.device))

    def _total(self, lane: str) -> Outcome:
        done = [outcome for tag, outcome in self.done.items() if _lane_of(tag) == lane]
        name, _, device = lane.partition("@")
        missing = self._count(lane) - len(done)
        reason = "no unit of it is in this shard"
        nothing = Outcome(name, NOT_RUN, find_property(name).evidence, device, reason=reason)
        total = merged(done) if done else nothing
        if total.verdict not in (HELD, NOT_RUN):
            return total
        if missing:
            reason = f"{missing} of {missing + len(done)} units are still to be run"
            return replace(total, verdict=NOT_RUN, reason=reason)
        if not done:
            return nothing
        index, count = self.plan.shard
        part = f" (part {index + 1} of {count})" if count > 1 else ""
        return replace(total, evidence=f"exhausted over {total.cases} cases{part}")

    def run(
        self, crew: Crew, *, until: Callable[[], float] = lambda: math.inf
    ) -> Iterator[Outcome]:
        """Runs what is not done yet; every outcome is on disk before it is given.

        Args:
            crew: where it runs.
            until: as in `run_units`; what was not done by then is left for the next run.
        """

        falsified = {_lane_of(tag) for tag, o in self.done.items() if o.verdict == FALSIFIED}

        def units() -> Iterator[Unit]:
            for unit in self._units():
                if falsified and not self.plan.keep_going:
                    return
                if unit.tag not in self.done and _lane_of(unit.tag) not in falsified:
                    yield unit

        with _opened(self.state, self.plan.header()) as file:
            for unit, outcome in run_units(units(), crew, until=until):
                done = replace(outcome, remarkable=())
                self.done[unit.tag] = done
                if done.verdict == FALSIFIED:
                    falsified.add(_lane_of(unit.tag))
                full = None
                try:
                    if done.verdict in CONCLUSIVE:
                        _add(file, {"unit": unit.tag, "outcome": done.to_json()})
                except OSError as error:
                    full = error
                yield done
                if full:
                    raise SweepError(f"--state {self.state}: {full.strerror}") from full

    def _units(self) -> Iterator[Unit]:
        count = self.plan.shard[1]
        for lane, space in self._spaces.items():
            name, _, device = lane.partition("@")
            groups = batched(architectures(space), _chunk(space))
            first = self._first(lane)
            for number, configs in itertools.islice(enumerate(groups), first, None, count):
                yield Unit(
                    name,
                    self.plan.target,
                    Search(configs=configs, shrinking=10.0),
                    device=device,
                    space=self.plan.bounded,
                    case_timeout=self.plan.case_timeout,
                    tag=f"{lane}#{number}",
                )


def _chunk(space: Space) -> int:
    """How many configurations make a unit."""
    inputs = math.prod(_size(n, factor) for n, factor in space.factors if not architectural(n))
    return max(1, min(CHUNK, CASES // max(1, inputs)))


def _lane_of(tag: str) -> str:
    return tag.rpartition("#")[0]


def _size(name: str, factor: Factor) -> int:
    """How many values a factor has."""
    if isinstance(factor, Choice):
        return len(factor.values)
    if isinstance(factor, Integers):
        return factor.high - factor.low + 1
    if isinstance(factor, Lists):
        return sum(_size(name, factor.element) ** n for n in range(factor.low, factor.high + 1))
    raise SpaceError(f"{name}: the reals from {factor.low} to {factor.high} cannot all be tried")


def _read(state: Path, header: Mapping[str, Any]) -> dict[str, Outcome]:
    """The units that a state file says are done; a last line that was cut off does not count.

    Raises:
        SweepError: it is the file of another sweep, or no state file at all.
    """
    try:
        lines = state.read_text().splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise SweepError(f"cannot read {state}: {error}") from error
    if not lines or _is_cut_off(state, header):
        return {}
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            if number > 1:
                continue  # a line that was cut off when the run was ended
            raise SweepError(f"{state} is not the state of a sweep: {error}") from error
    if entries[0] != header:
        raise SweepError(
            f"{state} is the state of another sweep, of another shard of it, or of another version "
            "of the target or the packages; remove it to begin anew, or give another --state"
        )
    done = {}
    for entry in entries[1:]:
        with suppress(KeyError, TypeError, ValueError):  # a damaged line: it is run again
            done[entry["unit"]] = Outcome.from_json(entry["outcome"])
    return done


@contextmanager
def _opened(state: Path, header: Mapping[str, Any]) -> Iterator[TextIO]:
    """The state file, open at its end."""
    state.parent.mkdir(parents=True, exist_ok=True)
    with state.open("a+") as file:
        if _is_cut_off(state, header):
            file.truncate(0)
        file.seek(0)
        text = file.read()
        if not text:
            _add(file, header)
        elif not text.endswith("\n"):
            file.write("\n")  # after a line that was cut off
        yield file


def _is_cut_off(state: Path, header: Mapping[str, Any]) -> bool:
    """Whether a state file ends within its first line: the run was ended as it began."""
    text = state.read_text()
    return "\n" not in text and _line(header).startswith(text)


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, separators=(",", ":"), allow_nan=False) + "\n"


def _add(file: TextIO, entry: Mapping[str, Any]) -> None:
    file.write(_line(entry))
    file.flush()
    os.fsync(file.fileno())
