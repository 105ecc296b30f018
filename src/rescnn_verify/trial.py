"""A trial: one property, run on a few cases in order, on one built model."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from rescnn_verify.case import Case, Config
from rescnn_verify.compare import Falsified, describe
from rescnn_verify.statement import Property
from rescnn_verify.subject import NotApplicable, Subject
from rescnn_verify.target import Target, TargetError

__all__ = ["Tally", "run_trial"]


@dataclass
class Tally:
    """What was run for one property; the reason if some cases were found not applicable."""

    cases: int = 0
    assertions: int = 0
    worst_ratio: float | None = None
    architectures: set[Config] = field(default_factory=set)
    not_applicable: str | None = None


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
        try:
            for comparison in prop.check(subject, case):
                if tally is not None:
                    tally.assertions += 1
                    if comparison.ratio is not None:
                        tally.worst_ratio = max(tally.worst_ratio or 0.0, comparison.ratio)
        except Falsified:
            if tally is not None:
                tally.assertions += 1
            raise
        except (TargetError, torch.OutOfMemoryError):
            raise
        except NotApplicable as reason:
            if tally is None:
                raise
            tally.not_applicable = str(reason)
        except (Exception, SystemExit) as error:
            if not _raised_in(error, target.source_files):
                raise
            raise Falsified("the target's code", "no exception", describe(error)) from error


def _raised_in(error: BaseException, files: frozenset[str]) -> bool:
    """Whether an exception passed through code of one of the files."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.filename in files for frame in frames)
