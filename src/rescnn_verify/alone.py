"""A unit in a fresh process of its own: for what crashes, exits, hangs or takes all the memory."""

from __future__ import annotations

import json
import math
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

from rescnn_verify.case import Case
from rescnn_verify.compare import Falsified
from rescnn_verify.engine import Search
from rescnn_verify.journal import last_entry
from rescnn_verify.outcome import (
    FALSIFIED,
    HELD,
    NOTHING_ASSERTED,
    PROCESS,
    UNFINISHED,
    Outcome,
)
from rescnn_verify.shrinking import shrink
from rescnn_verify.space import Choice, SpaceError
from rescnn_verify.statement import find_property
from rescnn_verify.unit import Unit, run_unit, target_of
from rescnn_verify.witness import Witness, WitnessError
from rescnn_verify.workers import CONTEXT, end_with_the_parent

__all__ = [
    "Ended",
    "found_so_far",
    "post_mortem",
    "replay_alone",
    "run_alone",
    "run_alone_to_the_end",
]

#: Seconds after which a case is a hang, where nothing else is said.
CASE_TIMEOUT = 60.0

#: Seconds for which a case has been running that are worth a word when the time is up.
NOTED = 5.0

#: Seconds that a process may need to start and to say how it ended, besides its cases.
OVERHEAD = 20.0

#: Seconds that making the trial smaller may take at least: each candidate takes a process.
LEAST_SHRINKING = 5.0


@dataclass(frozen=True)
class Ended:
    """A process that ended before its unit did.

    Args:
        how: the signal, exit code or time limit.
        last: the cases of the last trial, as far as they were begun; None: it had begun none.
        cut_off: whether it was ended from outside, which says nothing about the target.
        found: the outcome that it had found by then.
    """

    how: str
    last: tuple[Case, ...] | None
    cut_off: bool = False
    found: Outcome | None = None


def run_alone(unit: Unit, seconds: float) -> Outcome | Ended:
    """The outcome of a unit in a process of its own, or how the process ended.

    Args:
        unit: the unit; its journal is replaced by one of its own.
        seconds: after which the process is killed.
    """
    with tempfile.TemporaryDirectory(prefix="rescnn-verify-") as folder:
        journal = Path(folder) / "journal"
        unit = replace(unit, journal=str(journal))
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_send, args=(sender, unit.dumps()), daemon=True)
        process.start()
        sender.close()
        answered = receiver.poll(None if seconds == math.inf else max(0.0, seconds))
        try:
            answer = receiver.recv_bytes() if answered else None
        except EOFError:
            answer = None  # it ended without one
        if not answered:
            process.kill()
        process.join()
        if answer is not None:
            return Outcome.from_json(json.loads(answer))
        entry = last_entry(journal)
        if entry and entry.timed_out:
            how = f"no answer within {unit.case_timeout:g} s"
        elif not answered:
            how = f"no answer within {seconds:g} s"
        else:
            how = _exit(process.exitcode or 0)
        return Ended(how, entry.trial if entry else None, not answered, found_so_far(unit))


def _send(sender: Connection, text: str) -> None:
    end_with_the_parent()
    sender.send_bytes(run_unit(text).encode())


def _exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def replay_alone(witness: Witness, case_timeout: float = CASE_TIMEOUT) -> Falsified | None:
    """As `witness.replay`, in a process of its own.

    Args:
        witness: of a case that ended its process.
        case_timeout: seconds after which a case is a hang.
    """
    unit = Unit(
        witness.name,
        witness.target,
        Search(trials=(witness.trial,)),
        device=witness.case.device,
        case_timeout=case_timeout,
    )
    result = run_alone(unit, OVERHEAD + case_timeout * len(witness.trial))
    if isinstance(result, Ended) and result.cut_off:
        raise WitnessError(f"{witness.name}: its process did not begin in time; try again")
    if isinstance(result, Ended):
        return Falsified(PROCESS, "it returns", result.how)
    if result.verdict == FALSIFIED:
        return Falsified(result.what, result.expected, result.got)
    if result.verdict != HELD:
        raise WitnessError(f"{witness.name}: {result.verdict}: {result.reason}")
    return None


def found_so_far(unit: Unit) -> Outcome | None:
    """The falsification in the journal of a unit that was ended, None if it had found none."""
    entry = last_entry(Path(unit.journal)) if unit.journal else None
    if entry is None or entry.found is None:
        return None
    trial, texts = entry.found
    return _falsified(unit, trial, texts["what"], texts["expected"], texts["got"])


def run_alone_to_the_end(unit: Unit, until: float) -> Outcome:
    """The outcome of a whole unit in a process of its own; falsified if the process ends."""
    result = run_alone(unit, until - time.monotonic())
    if isinstance(result, Outcome):
        return result
    if result.found:
        return result.found
    if result.cut_off:
        return unfinished(unit, "its process ended, and the time was up before it ran again")
    if result.last and (outcome := _blamed(unit, result.last, until)):
        return outcome
    return _ended(unit, result.last or (), result.how)


def unfinished(unit: Unit, reason: str) -> Outcome:
    """The outcome of a unit of which nobody knows whether its target crashed or hangs."""
    evidence = find_property(unit.name).evidence
    return Outcome(unit.name, UNFINISHED, evidence, unit.device, reason=reason)


def hanging(unit: Unit, seconds: float) -> Outcome | None:
    """An outcome that says for how long a unit's last case has been running, if for long.

    Unfinished after so many seconds: it may hang. Sooner, it says why nothing was asserted, and
    counts for nothing if something was.
    """
    if not unit.journal:
        return None
    try:
        age = time.time() - Path(unit.journal).stat().st_mtime
    except OSError:
        return None
    if age < min(seconds, NOTED):
        return None
    outcome = unfinished(
        unit,
        f"its last case had been running for {age:.0f} s when the run ended; with more time, or a "
        "shorter --case-timeout, it would show whether it hangs",
    )
    return outcome if age >= seconds else replace(outcome, verdict=NOTHING_ASSERTED)


def post_mortem(unit: Unit, until: float) -> Outcome | None:
    """The outcome of a unit whose process ended, None if it was not the unit's fault.

    Its last trial, from the journal, runs in a fresh process; if that ends, too, it is made
    smaller, each candidate in a fresh process.

    Args:
        unit: what ran.
        until: when to stop, in seconds of `time.monotonic`.
    """
    if outcome := found_so_far(unit):
        return outcome
    entry = last_entry(Path(unit.journal)) if unit.journal else None
    return _blamed(unit, entry.trial, until) if entry else None


def _blamed(unit: Unit, trial: tuple[Case, ...], until: float) -> Outcome | None:
    """The smallest trial by which a fresh process ends; None if it does not by the given one."""
    ended = _run_trial(unit, trial, until)
    return _smallest(unit, trial, ended.how, until) if ended else None


def _smallest(unit: Unit, trial: tuple[Case, ...], how: str, until: float) -> Outcome:
    """The smallest trial by which a fresh process ends, from one that is known to end it."""
    smallest = trial
    limit = min(until, time.monotonic() + max(unit.search.shrinking, LEAST_SHRINKING))

    def ends(candidate: Sequence[Case]) -> bool:
        nonlocal smallest, how
        if time.monotonic() > limit:
            return False
        ended = _run_trial(unit, tuple(candidate), limit)
        if ended:
            smallest, how = tuple(candidate), ended.how
        return ended is not None

    with suppress(SpaceError):  # nothing to choose from
        space = find_property(unit.name).space_for(target_of(unit.target, unit.space))
        if space.get("device"):
            space = space.narrow(device=Choice(unit.device))
        shrink(trial, space, ends)
    return _ended(unit, smallest, how)


def _run_trial(unit: Unit, trial: tuple[Case, ...], until: float) -> Ended | None:
    """How a trial ends a fresh process, None if it does not, or not in the time that is left."""
    timeout = unit.case_timeout or CASE_TIMEOUT
    alone = replace(unit, search=Search(trials=(trial,)), case_timeout=timeout)
    seconds = min(timeout * len(trial) + OVERHEAD, until - time.monotonic())
    result = run_alone(alone, seconds)
    return result if isinstance(result, Ended) and not result.cut_off else None


def _ended(unit: Unit, trial: tuple[Case, ...], how: str) -> Outcome:
    return replace(_falsified(unit, trial, PROCESS, "it returns", how), ended=True)


def _falsified(unit: Unit, trial: tuple[Case, ...], what: str, expected: str, got: str) -> Outcome:
    evidence = find_property(unit.name).evidence
    return Outcome(
        unit.name,
        FALSIFIED,
        evidence,
        unit.device,
        cases=len(trial),
        assertions=1,
        trial=trial,
        what=what,
        expected=expected,
        got=got,
    )
