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
    "QUIET",
    "Outcome",
    "signature",
]

HELD, FALSIFIED, NOT_APPLICABLE = "held", "falsified", "not applicable"
NOT_RUN, KNOWN = "not run", "known failure"
NOTHING_ASSERTED, INTERNAL_ERROR = "nothing asserted", "internal error"
BAD_TARGET = "bad target"

#: The verdicts that raise no alarm.
QUIET = frozenset({HELD, NOT_APPLICABLE, NOT_RUN, KNOWN})


@dataclass(frozen=True)
class Outcome:
    """What came of one property.

    Args:
        name: the property.
        verdict: held, falsified, not applicable, not run (no device, or too slow for the profile),
            known failure, nothing asserted, bad target (its description contradicts itself), or
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
            "remarkable": tuple((why, _trial(trial)) for why, trial in data["remarkable"]),
        }
        return cls(**{**data, **rest})


def _trial(data: Any) -> tuple[Case, ...]:
    return tuple(Case.from_json(item) for item in data)


def signature(what: str, got: str) -> str:
    """What two failures of a property share when they are of one kind.

    The quantity that differs, without its numbers; for an exception also its type.
    """
    kind = re.match(r"\w+(Error|Exit|Exception)\b", got)
    text = re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?", "#", what)
    return f"{text} ({kind.group()})" if kind else text
