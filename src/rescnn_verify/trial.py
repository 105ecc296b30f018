"""A trial: one property, run on a few cases in order, on one built model."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from rescnn_verify.case import Case, Config
from rescnn_verify.compare import Falsified, describe
from rescnn_verify.coverage import pairs_of
from rescnn_verify.journal import Journal
from rescnn_verify.statement import Property
from rescnn_verify.subject import NotApplicable, Subject, has_onednn, onednn
from rescnn_verify.target import Target, TargetError

__all__ = ["Tally", "run_trial"]


@dataclass
class Tally:
    """What was run for one property; the reason if some cases were found not applicable.

    Args:
        cases, assertions: how many were run and made.
        worst_ratio: the worst error over its bound.
        architectures: the configurations seen.
        pairs: the pairs of classes of factors seen, as `coverage` numbers them.
        discarded: draws that led to no case, and cases found not applicable.
        not_applicable: why the last of those was not.
    """

    cases: int = 0
    assertions: int = 0
    worst_ratio: float | None = None
    architectures: set[Config] = field(default_factory=set)
    pairs: int = 0
    discarded: int = 0
    not_applicable: str | None = None


def run_trial(
    prop: Property,
    target: Target,
    trial: Sequence[Case],
    tally: Tally | None = None,
    journal: Journal | None = None,
) -> None:
    """Runs a property on cases in order, on one built model.

    Args:
        prop, target: what is checked of what.
        trial: the cases.
        tally: what is counted, if anything.
        journal: where each case is written before it runs, if anywhere.

    Raises:
        Falsified: at the first case for which the property is false.
    """
    subject = Subject(target)
    for i, given in enumerate(trial):
        case = prop.space.completed(given)  # it may be older than one of the factors
        if tally is not None:
            tally.cases += 1
            tally.architectures.add(case.config)
            tally.pairs |= pairs_of(case)
        try:
            with journal.running(case, i) if journal else nullcontext(), onednn(has_onednn(case)):
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
            tally.discarded += 1
            tally.not_applicable = str(reason)
        except (Exception, SystemExit) as error:
            if not _raised_in(error, target.source_files):
                raise
            raise Falsified("the target's code", "no exception", describe(error)) from error


def _raised_in(error: BaseException, files: frozenset[str]) -> bool:
    """Whether an exception passed through code of one of the files."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.filename in files for frame in frames)
