"""The engine: runs one property over cases and says what came of it."""

from __future__ import annotations

import hashlib
import math
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import target as hypothesis_target
from hypothesis.errors import Flaky, Unsatisfiable

from rescnn_verify.case import Case
from rescnn_verify.compare import Falsified
from rescnn_verify.drawing import NoCase, RandomDraw, draw_trial
from rescnn_verify.shrinking import shrink
from rescnn_verify.space import Choice, Space, SpaceError, every_case
from rescnn_verify.statement import Property
from rescnn_verify.strategies import trials
from rescnn_verify.subject import environment
from rescnn_verify.target import Target, TargetError
from rescnn_verify.trial import Tally, run_trial

__all__ = ["PROFILES", "Outcome", "Profile", "check_property"]


@dataclass(frozen=True)
class Profile:
    """How long to search.

    Args:
        sampled: trials sampled uniformly for each property; a trial has up to four cases.
        drawn: trials drawn by Hypothesis.
        shrinking: seconds spent on making a counterexample smaller.
        slow: whether slow properties run, and exhaustive ones over every case of their space.
    """

    sampled: int
    drawn: int
    shrinking: float
    slow: bool = False


PROFILES = {
    "quick": Profile(sampled=8, drawn=2, shrinking=1.0),
    "default": Profile(sampled=60, drawn=4, shrinking=2.0),
    "thorough": Profile(sampled=1000, drawn=150, shrinking=20.0, slow=True),
}

HELD, FALSIFIED, NOT_APPLICABLE = "held", "falsified", "not applicable"
NOT_RUN = "not run"
NOTHING_ASSERTED, INTERNAL_ERROR = "nothing asserted", "internal error"
BAD_TARGET = "bad target"

#: The verdicts that raise no alarm.
QUIET = frozenset({HELD, NOT_APPLICABLE, NOT_RUN})


@dataclass(frozen=True)
class Outcome:
    """What came of one property.

    Args:
        name: the property.
        verdict: held, falsified, not applicable, not run (no device, or too slow for the profile),
            nothing asserted, bad target (its description contradicts itself), or internal error.
        evidence: exact, bounded, statistical, or exhausted over a space.
        device: ``"cpu"`` or ``"cuda"``.
        cases, assertions, architectures: how many were run, made, seen; shrinking not counted.
        seconds: of this property.
        reason: why it is not applicable or not run, or the traceback of an internal error.
        worst_ratio: the worst error over its bound, for a bounded property.
        trial: the cases of the smallest counterexample, the last one falsifying.
        what, expected, got: the comparison that failed.
    """

    name: str
    verdict: str
    evidence: str
    device: str = "cpu"
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


def check_property(
    prop: Property, target: Target, *, profile: Profile, seed: int, device: str = "cpu"
) -> Outcome:
    """Searches for a counterexample to a property; deterministic given the seed.

    An exception of the target's falsifies; one of the suite's own machinery is an internal error.
    """
    start = time.perf_counter()
    tally = Tally()
    exhausting = prop.exhaustive and profile.slow

    def outcome(verdict: str, **rest: Any) -> Outcome:
        return Outcome(
            name=prop.name,
            verdict=verdict,
            evidence=(
                f"exhausted over {tally.cases} cases"
                if exhausting and verdict == HELD
                else prop.evidence
            ),
            device=device,
            cases=tally.cases,
            assertions=tally.assertions,
            architectures=len(tally.architectures),
            seconds=time.perf_counter() - start,
            worst_ratio=tally.worst_ratio,
            **rest,
        )

    if reason := prop.missing(target):
        return outcome(NOT_APPLICABLE, reason=reason)
    if device == "cuda" and not torch.cuda.is_available():
        return outcome(NOT_RUN, reason="no device")
    if prop.slow and not profile.slow:
        return outcome(NOT_RUN, reason="slow: --profile thorough runs it")
    space = prop.space_for(target)
    try:
        if space.get("device"):
            space = space.narrow(device=Choice(device))
    except SpaceError:
        return outcome(NOT_APPLICABLE, reason=f"it is not claimed on {device}")
    try:
        with environment():
            failure = _search(prop, target, space, profile, _seed_for(prop, seed), tally)
    except TargetError as mistake:
        return outcome(BAD_TARGET, reason=str(mistake))
    except Unsatisfiable:
        return outcome(NOTHING_ASSERTED, reason="no case of its space could be drawn")
    except Exception:
        return outcome(INTERNAL_ERROR, reason=traceback.format_exc())
    if failure:
        error = failure.error
        return outcome(
            FALSIFIED, trial=failure.trial, what=error.what, expected=error.expected, got=error.got
        )
    if tally.assertions == 0 and tally.not_applicable:
        return outcome(NOT_APPLICABLE, reason=tally.not_applicable)
    if tally.assertions == 0:
        return outcome(NOTHING_ASSERTED, reason="no comparison was made")
    return outcome(HELD)


def _search(
    prop: Property,
    target: Target,
    space: Space,
    profile: Profile,
    seed: int,
    tally: Tally,
) -> _Failure | None:
    """The smallest counterexample found, None when there is none.

    The documented configuration comes first where the property asks for it, then uniform samples,
    then what Hypothesis draws: each reaches corners that the others seldom do.
    """
    found = _first_failure(prop, target, space, profile, seed, tally)
    if found is None:
        return None
    give_up = time.perf_counter() + profile.shrinking

    def fails(trial: tuple[Case, ...]) -> bool:
        nonlocal found
        if time.perf_counter() > give_up:
            return False
        try:
            run_trial(prop, target, trial)
        except Falsified as error:
            found = _Failure(trial, error)
            return True
        except Exception:  # outside the statement's conditions; the counterexample at hand stays
            return False
        return False

    shrink(found.trial, space, fails)
    return found


def _first_failure(
    prop: Property,
    target: Target,
    space: Space,
    profile: Profile,
    seed: int,
    tally: Tally,
) -> _Failure | None:
    found: _Failure | None = None

    def examine(trial: tuple[Case, ...]) -> None:
        nonlocal found
        before = tally.cases
        try:
            run_trial(prop, target, trial, tally)
        except Falsified as error:
            found = _Failure(trial[: tally.cases - before], error)
            raise

    def steered(trial: tuple[Case, ...]) -> None:
        """Lets Hypothesis look for cases that come closer to a bound."""
        worst, tally.worst_ratio = tally.worst_ratio, None
        try:
            examine(trial)
        finally:
            ratio = tally.worst_ratio
            tally.worst_ratio = max((r for r in (worst, ratio) if r is not None), default=None)
        if ratio is not None and math.isfinite(ratio):
            hypothesis_target(ratio)

    run = settings(
        max_examples=max(1, round(profile.drawn * prop.effort)),
        phases=[Phase.generate, Phase.target],
        database=None,
        deadline=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )(given(trials(space, work=prop.work))(steered))
    try:
        if prop.exhaustive and profile.slow:
            for case in every_case(space):
                examine((case,))
            return None
        if prop.documented and target.follows_contract:
            examine((documented_case(target, space),))
        draw = RandomDraw(seed)
        for _ in range(round(profile.sampled * prop.effort)):
            with suppress(NoCase):
                examine(draw_trial(draw, space, work=prop.work))
        hypothesis_seed(seed)(run)()
    except (Falsified, Flaky):
        assert found is not None
    return found


def documented_case(target: Target, space: Space) -> Case:
    """The documented configuration: 512 channels, kernels 3, 5 and 7, length 960."""
    case = Case(
        channels=512,
        num_blocks=3 if target.kind == "stack" else 1,
        kernel_sizes=(3, 5, 7),
        dropout=0.1,
    )
    if isinstance(device := space.get("device"), Choice):
        case = replace(case, device=device.values[0])
    return replace(case, length=960) if space.get("length") else case


def _seed_for(prop: Property, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}/{prop.name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
