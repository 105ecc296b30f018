"""What came of a property, as a value that travels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from rescnn_verify.case import Case

__all__ = [
    "BAD_TARGET",
    "FALSIFIED",
    "HELD",
    "INTERNAL_ERROR",
    "KNOWN",
    "NOTHING_ASSERTED",
    "NOT_APPLICABLE",
    "NOT_RUN",
    "PROCESS",
    "QUIET",
    "UNFINISHED",
    "Outcome",
    "signature",
]

HELD, FALSIFIED, NOT_APPLICABLE = "held", "falsified", "not applicable"
NOT_RUN, KNOWN = "not run", "known failure"
NOTHING_ASSERTED, INTERNAL_ERROR = "nothing asserted", "internal error"
BAD_TARGET, UNFINISHED = "bad target", "unfinished"

#: What a falsification by a process that ended compares.
PROCESS = "the process that runs the target"

#: The verdicts that raise no alarm.
QUIET = frozenset({HELD, NOT_APPLICABLE, NOT_RUN, KNOWN})


@dataclass(frozen=True)
class Outcome:
    """What came of one property.

    Args:
        name: the property.
        verdict: held, falsified, not applicable, not run (no device, or too slow for the profile),
            known failure, unfinished (it ran when the time was up, and may hang or have crashed),
            nothing asserted, bad target (its description contradicts itself), or
            internal error.
        evidence: exact, bounded, statistical, or exhausted over a space.
        device: ``"cpu"`` or ``"cuda"``.
        cases, assertions, architectures: how many were run, made, seen; shrinking not counted.
        seconds: of this property.
        reason: why it is not applicable or not run, or the traceback of an internal error.
        worst_ratio: the worst error over its bound, for a bounded property.
        trial: the cases of the smallest counterexample, the last one falsifying.
        what, expected, got: the comparison that failed.
        ended: whether the last case ended the process (a crash, an exit, a hang).
        sampled: trials sampled uniformly, each independently of all others.
        discarded: draws that led to no case, and cases found not applicable.
        known: cases that failed as a known failure does.
        signatures: of the failures seen, known ones included.
        pairs: the pairs of classes of factors met, as `coverage` numbers them.
        configs: the hashes of the configurations seen.
        remarkable: trials worth keeping, each with why.
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
    ended: bool = False
    sampled: int = 0
    discarded: int = 0
    known: int = 0
    signatures: tuple[str, ...] = ()
    pairs: int = 0
    configs: frozenset[int] = frozenset()
    remarkable: tuple[tuple[str, tuple[Case, ...]], ...] = ()

    def to_json(self) -> dict[str, Any]:
        body = {f.name: getattr(self, f.name) for f in fields(self)}
        return body | {
            "trial": [case.to_json() for case in self.trial],
            "pairs": hex(self.pairs),
            "configs": sorted(self.configs),
            "remarkable": [[why, [c.to_json() for c in trial]] for why, trial in self.remarkable],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        """The outcome of a JSON object as `to_json` gives it."""
        rest = {
            "trial": _trial(data["trial"]),
            "pairs": int(data["pairs"], 16),
            "configs": frozenset(data["configs"]),
            "signatures": tuple(data["signatures"]),
            "remarkable": tuple((why, _trial(trial)) for why, trial in data["remarkable"]),
        }
        return cls(**{**data, **rest})


def _trial(data: Any) -> tuple[Case, ...]:
    return tuple(Case.from_json(item) for item in data)


def signature(what: str, got: str) -> str:
    """What two failures of a property share when they are of one kind.

    The quantity that differs, without its numbers and dtypes; for an exception also its type, and
    for a process that ended, how.
    """
    kind = re.match(r"\w+(Error|Exit|Exception)\b", got)
    detail = _without_numbers(got) if what == PROCESS else kind.group() if kind else ""
    return f"{_without_numbers(what)} ({detail})" if detail else _without_numbers(what)


def _without_numbers(text: str) -> str:
    text = re.sub(r"\b(bfloat16|float16|float32|float64)\b", "dtype", text)
    number = r"-?\d+(\.\d+)?(e[-+]?\d+)?"
    text = re.sub(rf"[\[(]({number}(, |,)?)*[\])]", "#", text)
    return re.sub(number, "#", text)
