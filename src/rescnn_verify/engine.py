"""The engine: runs one property over cases and says what came of it."""

from __future__ import annotations

import hashlib
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis.errors import Flaky, Unsatisfiable

from rescnn_verify.case import Case, Config
from rescnn_verify.compare import Falsified
from rescnn_verify.space import Choice, Space
from rescnn_verify.statement import NotApplicable, Property
from rescnn_verify.strategies import trials
from rescnn_verify.subject import Subject, environment
from rescnn_verify.target import Target

__all__ = ["PROFILES", "Outcome", "Profile", "Tally", "check_property", "run_trial"]


@dataclass(frozen=True)
class Profile:
    """How long to search.

    Args:
        trials: trials drawn for each property; a trial has up to four cases.
        shrinking: seconds spent on making a counterexample smaller.
    """

    trials: int
    shrinking: float


PROFILES = {
    "quick": Profile(trials=15, shrinking=1.0),
    "default": Profile(trials=100, shrinking=3.0),
    "thorough": Profile(trials=1500, shrinking=30.0),
}

HELD, FALSIFIED, NOT_APPLICABLE = "held", "falsified", "not applicable"
NOTHING_ASSERTED, INTERNAL_ERROR = "nothing asserted", "internal error"


@dataclass
class Tally:
    """What was run for one property."""

    cases: int = 0
    assertions: int = 0
    worst_ratio: float | None = None
    architectures: set[Config] = field(default_factory=set)


@dataclass(frozen=True)
class Outcome:
    """What came of one property.

    Args:
        name: the property.
        verdict: held, falsified, not applicable, nothing asserted, or internal error.
        evidence: exact, bounded or statistical.
        cases, assertions, architectures: how many were run, made, seen; shrinking not counted.
        seconds: of this property.
        reason: why it is not applicable, or the traceback of an internal error.
        worst_ratio: the worst error over its bound, for a bounded property.
        trial: the cases of the smallest counterexample, the last one falsifying.
        what, expected, got: the comparison that failed.
    """

    name: str
    verdict: str
    evidence: str
    cases: int = 0
    assertions: int = 0
    architectures: int = 0
    seconds: float = 0.0
    reason: str | None = None
    worst_ratio: float | None = None
    trial: tuple[Case, ...] = ()
    what: str = ""
    expected: str = ""
    got: str = ""


@dataclass
class _Failure:
    trial: tuple[Case, ...]
    error: Falsified


def run_trial(
    prop: Property, target: Target, trial: Iterable[Case], tally: Tally | None = None
) -> None:
    """Runs a property on cases in order, on one built model.

    Raises:
        Falsified: at the first case for which the property is false.
    """
    subject = Subject(target)
    for case in trial:
        if tally is not None:
            tally.cases += 1
            tally.architectures.add(case.config)
        for comparison in prop.check(subject, case):
            if tally is not None:
                tally.assertions += 1
                if comparison.ratio is not None:
                    tally.worst_ratio = max(tally.worst_ratio or 0.0, comparison.ratio)


def check_property(
    prop: Property, target: Target, *, profile: Profile, seed: int, device: str = "cpu"
) -> Outcome:
    """Searches for a counterexample to a property; deterministic given the seed.

    An exception of the target's falsifies; one of the suite's own machinery is an internal error.
    """
    start = time.perf_counter()
    tally = Tally()

    def outcome(verdict: str, **rest: Any) -> Outcome:
        return Outcome(
            name=prop.name,
            verdict=verdict,
            evidence=prop.evidence,
            cases=tally.cases,
            assertions=tally.assertions,
            architectures=len(tally.architectures),
            seconds=time.perf_counter() - start,
            worst_ratio=tally.worst_ratio,
            **rest,
        )

    if reason := prop.missing(target):
        return outcome(NOT_APPLICABLE, reason=reason)
    space = prop.space_for(target)
    if space.get("device"):
        space = space.narrow(device=Choice(device))
    try:
        with environment():
            failure = _search(prop, target, space, profile, _seed_for(prop, seed), tally)
    except NotApplicable as reason:
        return outcome(NOT_APPLICABLE, reason=str(reason))
    except Unsatisfiable:
        return outcome(NOTHING_ASSERTED, reason="no case of its space could be drawn")
    except Exception:
        return outcome(INTERNAL_ERROR, reason=traceback.format_exc())
    if failure:
        error = failure.error
        return outcome(
            FALSIFIED, trial=failure.trial, what=error.what, expected=error.expected, got=error.got
        )
    if tally.assertions == 0:
        return outcome(NOTHING_ASSERTED, reason="no comparison was made")
    return outcome(HELD)


def _search(
    prop: Property, target: Target, space: Space, profile: Profile, seed: int, tally: Tally
) -> _Failure | None:
    """The smallest counterexample found, None when there is none."""
    found: _Failure | None = None
    give_up = float("inf")

    def examine(trial: tuple[Case, ...]) -> None:
        nonlocal found, give_up
        if found and time.perf_counter() > give_up:
            # Out of time to shrink: everything but the counterexample at hand now passes.
            if trial == found.trial:
                raise found.error
            return
        try:
            run_trial(prop, target, trial, None if found else tally)
        except Falsified as error:
            if not found:
                give_up = time.perf_counter() + profile.shrinking
            found = _Failure(trial, error)
            raise

    if prop.documented and target.follows_contract:
        try:
            examine((documented_case(target),))
        except Falsified:
            pass
    # A counterexample of 512 channels is shrunk by searching for a smaller one.
    run = settings(
        max_examples=profile.trials,
        phases=[Phase.generate, Phase.shrink],
        database=None,
        deadline=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )(given(trials(space))(examine))
    try:
        hypothesis_seed(seed)(run)()
    except (Falsified, Flaky):
        assert found is not None
    return found


def documented_case(target: Target) -> Case:
    """The documented configuration: 512 channels, kernels 3, 5 and 7, length 960."""
    return Case(
        channels=512,
        num_blocks=3 if target.kind == "stack" else 1,
        kernel_sizes=(3, 5, 7),
        dropout=0.1,
        batch=1,
        length=960,
    )


def _seed_for(prop: Property, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}/{prop.name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
