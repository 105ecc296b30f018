"""The report: outcomes as a table, as JSON, and as text to act on."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rescnn_verify.campaign import Plan
from rescnn_verify.engine import (
    FALSIFIED,
    HELD,
    INTERNAL_ERROR,
    NOT_APPLICABLE,
    NOT_RUN,
    QUIET,
    Outcome,
)
from rescnn_verify.witness import Witness, versions

__all__ = [
    "COULD_NOT_RUN",
    "console",
    "environment_of",
    "exit_code",
    "print_report",
    "print_witness",
    "to_json",
    "verdict_of",
    "witness_of",
]

COULD_NOT_RUN = "could not run"
STYLES = {HELD: "green", FALSIFIED: "bold red", NOT_APPLICABLE: "dim", NOT_RUN: "dim"}

#: The witness of each falsified property on each device.
Written = Mapping[tuple[str, str], Path]


def verdict_of(outcomes: Sequence[Outcome], planned: int) -> str:
    """The verdict of a whole run: falsified if any property is, held if all that apply are.

    Args:
        outcomes: what came of the properties that were run.
        planned: how many were to be run.
    """
    verdicts = {outcome.verdict for outcome in outcomes}
    if FALSIFIED in verdicts:
        return FALSIFIED
    if len(outcomes) < planned:
        return COULD_NOT_RUN
    return HELD if HELD in verdicts and verdicts <= QUIET else COULD_NOT_RUN


def exit_code(verdict: str) -> int:
    """0 held, 1 falsified, 2 could not run."""
    return {HELD: 0, FALSIFIED: 1}.get(verdict, 2)


def witness_of(outcome: Outcome, target: str) -> Witness | None:
    """The witness of a falsified property; None if it has no case (the process ended)."""
    if outcome.verdict != FALSIFIED or not outcome.trial:
        return None
    return Witness(outcome.name, target, outcome.trial, outcome.what, outcome.expected, outcome.got)


def environment_of(devices: Sequence[str]) -> dict[str, Any]:
    """What the results depend on besides the target."""
    return {
        **versions(),
        "platform": platform.platform(),
        "devices": {device: _device_name(device) for device in devices},
        "threads per worker": 1,
        "cores": os.cpu_count(),
    }


def _witness(outcome: Outcome, witnesses: Written) -> Path | None:
    return witnesses.get((outcome.name, outcome.device))


def _device_name(device: str) -> str:
    if device == "cpu":
        return platform.processor() or platform.machine()
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"


def to_json(
    plan: Plan, outcomes: Sequence[Outcome], seconds: float, witnesses: Written
) -> dict[str, Any]:
    """The run as a JSON object."""
    return {
        "target": plan.target,
        "verdict": verdict_of(outcomes, len(plan.units)),
        "not reached": len(plan.units) - len(outcomes),
        "profile": plan.profile,
        "seed": plan.seed,
        "seconds": round(seconds, 3),
        "environment": environment_of(plan.devices),
        "properties": [_outcome_json(o, plan.target, _witness(o, witnesses)) for o in outcomes],
    }


def _outcome_json(outcome: Outcome, target: str, path: Path | None) -> dict[str, Any]:
    witness = witness_of(outcome, target)
    counterexample = None
    if outcome.verdict == FALSIFIED:
        counterexample = {
            "what": outcome.what,
            "expected": outcome.expected,
            "got": outcome.got,
            "case": witness.case.to_json() if witness else None,
            "before": [case.to_json() for case in outcome.trial[:-1]],
            "witness": str(path) if path else None,
            "python": witness.python() if witness else None,
        }
    return {
        "name": outcome.name,
        "device": outcome.device,
        "verdict": outcome.verdict,
        "evidence": outcome.evidence,
        "cases": outcome.cases,
        "assertions": outcome.assertions,
        "architectures": outcome.architectures,
        "seconds": round(outcome.seconds, 3),
        "worst_ratio": outcome.worst_ratio,
        "reason": outcome.reason,
        "counterexample": counterexample,
    }


def print_report(
    console: Console,
    plan: Plan,
    outcomes: Sequence[Outcome],
    seconds: float,
    witnesses: Written,
) -> None:
    """The table of properties, every falsification, and the verdict."""
    title = f"rescnn-verify check {escape(plan.target)}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("property", no_wrap=True)
    table.add_column("verdict")
    table.add_column("evidence", overflow="fold")
    for heading in ("cases", "assertions", "s"):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        if outcome.verdict == NOT_RUN:
            continue  # counted in the summary
        style = STYLES.get(outcome.verdict, "bold yellow")
        table.add_row(
            outcome.name if len(plan.devices) == 1 else f"{outcome.name} ({outcome.device})",
            f"[{style}]{outcome.verdict}[/]",
            _evidence(outcome),
            str(outcome.cases),
            str(outcome.assertions),
            f"{outcome.seconds:.1f}",
        )
    console.print(table)
    for outcome in outcomes:
        if outcome.verdict == FALSIFIED:
            _print_falsified(console, outcome, plan.target, _witness(outcome, witnesses))
        elif outcome.verdict not in QUIET:
            _print(console, f"\n[bold yellow]{outcome.verdict}[/]: {outcome.name}")
            _print(console, escape(outcome.reason or ""))
    _print(console, _summary(plan, outcomes, seconds))


def print_witness(
    console: Console, witness: Witness, path: Path | None, *, lines: bool = True
) -> None:
    """What was expected, what came, the smallest case, and lines to copy."""
    _print(console, f"  {escape(witness.what)}")
    _print(console, f"    expected  {escape(witness.expected)}")
    _print(console, f"    got       {escape(witness.got)}")
    for case in witness.trial[:-1]:
        _print(console, f"    after     {escape(str(case))}")
    _print(console, f"    case      {escape(str(witness.case))}")
    if path:
        _print(console, "  see it again, from this folder:")
        _print(console, f"    rescnn-verify replay {escape(str(path))}")
    if lines:
        _print(console, "  or in Python:")
        for line in witness.python().splitlines():
            _print(console, f"    {escape(line)}")


def _print_falsified(console: Console, outcome: Outcome, target: str, path: Path | None) -> None:
    _print(console, f"\n[bold red]falsified[/]: {outcome.name}")
    if witness := witness_of(outcome, target):
        print_witness(console, witness, path)
    else:
        _print(console, f"  {outcome.what}: expected {outcome.expected}, got {outcome.got}")


def _evidence(outcome: Outcome) -> str:
    if outcome.verdict == NOT_APPLICABLE:
        return escape(outcome.reason or "")
    if outcome.verdict == INTERNAL_ERROR:
        return ""
    if outcome.worst_ratio is not None:
        return f"{outcome.evidence} (worst {outcome.worst_ratio:.2f})"
    return outcome.evidence


def _summary(plan: Plan, outcomes: Sequence[Outcome], seconds: float) -> str:
    counts = Counter(
        f"{NOT_RUN} ({o.reason})" if o.verdict == NOT_RUN else o.verdict for o in outcomes
    )
    if missing := len(plan.units) - len(outcomes):
        counts["not reached"] = missing
    parts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    cases = sum(outcome.cases for outcome in outcomes)
    assertions = sum(outcome.assertions for outcome in outcomes)
    verdict = verdict_of(outcomes, len(plan.units))
    style = STYLES.get(verdict, "bold yellow")
    return (
        f"\n[{style}]{verdict}[/]: {parts}; {cases} cases, {assertions} assertions, "
        f"{seconds:.1f} s (profile {plan.profile}, seed {plan.seed}, {' and '.join(plan.devices)})"
    )


def console() -> Console:
    """Standard output; wide enough for the table when it is not a terminal."""
    return Console() if sys.stdout.isatty() else Console(width=140)


def _print(console: Console, text: str) -> None:
    """A line that can be copied: never wrapped."""
    console.print(text, soft_wrap=True, highlight=False)


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n")
