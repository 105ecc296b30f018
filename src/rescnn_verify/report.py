"""The report: outcomes as a table, as JSON, and as text to act on."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rescnn_verify.coverage import Coverage
from rescnn_verify.evidence import failure_rate_bound
from rescnn_verify.outcome import (
    FALSIFIED,
    HELD,
    INTERNAL_ERROR,
    KNOWN,
    NOT_APPLICABLE,
    NOT_RUN,
    QUIET,
    Outcome,
)
from rescnn_verify.witness import Witness, versions

__all__ = [
    "COULD_NOT_RUN",
    "Run",
    "console",
    "environment_of",
    "exit_code",
    "json_text",
    "junit_text",
    "print_report",
    "print_witness",
    "witness_of",
]

COULD_NOT_RUN = "could not run"

#: Columns for which a narrow terminal has no room: different configurations, pairs of classes of
#: factors that were met together, cases that came to nothing, and the 95 % upper bound on the rate
#: of failing trials.
DETAILS = ("configs", "pairs", "void", "fails <")
WIDE = 160

STYLES = {HELD: "green", FALSIFIED: "bold red", NOT_APPLICABLE: "dim", NOT_RUN: "dim"}

#: The files of witnesses that were written, by their names.
Written = Mapping[str, Path]


@dataclass(frozen=True)
class Run:
    """A run that is over.

    Args:
        title: the command and the target.
        target: the target as it was named.
        devices: where it ran.
        setting: what the results depend on besides, for the summary.
        planned: how many outcomes there were to be.
        outcomes: what came of each property on each device.
        seconds: that it took.
        facts: the setting, for the JSON form.
        complaints: what else is wrong, such as a known failure that is none any more; each fails
            the run.
        cut_short: why it ended before its end, if it did.
    """

    title: str
    target: str
    devices: tuple[str, ...]
    setting: str
    planned: int
    outcomes: tuple[Outcome, ...]
    seconds: float
    facts: Mapping[str, Any]
    complaints: tuple[str, ...] = ()
    cut_short: str = ""

    @property
    def verdict(self) -> str:
        """The verdict of a whole run: falsified if any property is, held if all that apply are."""
        verdicts = {outcome.verdict for outcome in self.outcomes}
        if FALSIFIED in verdicts or self.complaints:
            return FALSIFIED
        if len(self.outcomes) < self.planned or self.cut_short:
            return COULD_NOT_RUN
        return HELD if verdicts & {HELD, KNOWN} and verdicts <= QUIET else COULD_NOT_RUN


def exit_code(verdict: str) -> int:
    """0 held, 1 falsified, 2 could not run."""
    return {HELD: 0, FALSIFIED: 1}.get(verdict, 2)


def witness_of(outcome: Outcome, target: str) -> Witness | None:
    """The witness of a falsified property; None if it has no case."""
    if outcome.verdict != FALSIFIED or not outcome.trial:
        return None
    return Witness(
        outcome.name,
        target,
        outcome.trial,
        outcome.what,
        outcome.expected,
        outcome.got,
        alone=outcome.ended,
    )


def environment_of(devices: Sequence[str]) -> dict[str, Any]:
    """What the results depend on besides the target."""
    return {
        **versions(),
        "platform": platform.platform(),
        "devices": {device: _device_name(device) for device in devices},
        "threads per worker": 1,
        "cores": os.cpu_count(),
    }


def _file(outcome: Outcome, target: str, witnesses: Written) -> Path | None:
    witness = witness_of(outcome, target)
    return witnesses.get(witness.filename) if witness else None


def _device_name(device: str) -> str:
    if device == "cpu":
        return platform.processor() or platform.machine()
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"


def json_text(run: Run, witnesses: Written) -> str:
    """The run as a JSON object."""
    data = {
        "target": run.target,
        "verdict": run.verdict,
        "not reached": run.planned - len(run.outcomes),
        **run.facts,
        "seconds": round(run.seconds, 3),
        "complaints": list(run.complaints),
        "cut short": run.cut_short or None,
        "environment": environment_of(run.devices),
        "properties": [
            _outcome_json(o, run.target, _file(o, run.target, witnesses)) for o in run.outcomes
        ],
    }
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def junit_text(run: Run, witnesses: Written) -> str:
    """The run as JUnit XML: one test case for each property."""
    suite = ElementTree.Element(
        "testsuite",
        name=run.title,
        tests=str(len(run.outcomes) + len(run.complaints) + bool(run.cut_short)),
        failures=str(sum(o.verdict == FALSIFIED for o in run.outcomes) + len(run.complaints)),
        errors=str(
            sum(o.verdict not in (FALSIFIED, *QUIET) for o in run.outcomes) + bool(run.cut_short)
        ),
        skipped=str(sum(o.verdict in (NOT_APPLICABLE, NOT_RUN) for o in run.outcomes)),
        time=f"{run.seconds:.3f}",
    )
    for outcome in run.outcomes:
        family, _, name = outcome.name.partition(".")
        case = ElementTree.SubElement(
            suite, "testcase", classname=family, name=name, time=f"{outcome.seconds:.3f}"
        )
        if outcome.verdict == FALSIFIED:
            message = f"{outcome.what}: expected {outcome.expected}, got {outcome.got}"
            failure = ElementTree.SubElement(case, "failure", message=_xml(message))
            witness = witness_of(outcome, run.target)
            failure.text = _xml(f"{witness.case}\n{witness.python()}" if witness else "")
        elif outcome.verdict in (NOT_APPLICABLE, NOT_RUN):
            ElementTree.SubElement(
                case, "skipped", message=_xml(f"{outcome.verdict}: {outcome.reason}")
            )
        elif outcome.verdict not in QUIET:
            error = ElementTree.SubElement(case, "error", message=outcome.verdict)
            error.text = _xml(outcome.reason or "")
    for complaint in run.complaints:
        case = ElementTree.SubElement(suite, "testcase", classname="known", name="known failures")
        ElementTree.SubElement(case, "failure", message=_xml(complaint))
    if run.cut_short:
        case = ElementTree.SubElement(suite, "testcase", classname="run", name="to its end")
        ElementTree.SubElement(case, "error", message=_xml(run.cut_short))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _xml(text: str) -> str:
    """The text without the control characters that XML cannot hold."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


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
        "discarded": outcome.discarded,
        "known": outcome.known,
        "signatures": list(outcome.signatures),
        "pairs": vars(Coverage.of(outcome.pairs)),
        "failure_rate_below": (
            failure_rate_bound(outcome.sampled) if outcome.verdict == HELD else None
        ),
        "seconds": round(outcome.seconds, 3),
        "worst_ratio": outcome.worst_ratio,
        "reason": outcome.reason,
        "counterexample": counterexample,
    }


def print_report(console: Console, run: Run, witnesses: Written) -> None:
    """The table of properties, every falsification, and the verdict."""
    table = Table(title=escape(run.title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("property", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    table.add_column("evidence", overflow="fold", min_width=12)
    details = console.width >= WIDE
    headings = ("cases", "assertions", *(DETAILS if details else ()), "s")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for outcome in run.outcomes:
        if outcome.verdict in (NOT_APPLICABLE, NOT_RUN):
            continue  # named below
        style = STYLES.get(outcome.verdict, "bold yellow")
        table.add_row(
            outcome.name if len(run.devices) == 1 else f"{outcome.name} ({outcome.device})",
            f"[{style}]{outcome.verdict}[/]",
            _evidence(outcome),
            str(outcome.cases),
            str(outcome.assertions),
            *(_details(outcome) if details else ()),
            f"{outcome.seconds:.1f}",
        )
    console.print(table)
    for text in _left_out(run):
        _print(console, f"[dim]{escape(text)}[/]")
    for outcome in run.outcomes:
        if outcome.verdict == FALSIFIED:
            _print_falsified(console, outcome, run.target, _file(outcome, run.target, witnesses))
        elif outcome.verdict not in QUIET:
            _print(console, f"\n[bold yellow]{outcome.verdict}[/]: {outcome.name}")
            _print(console, escape(outcome.reason or ""))
    for outcome in run.outcomes:
        if outcome.verdict == KNOWN:
            _print(console, f"\nknown failure: {outcome.name}: {escape(_how_known(outcome))}")
    for complaint in run.complaints:
        _print(console, f"\n[bold red]{escape(complaint)}[/]")
    _print(console, _summary(run))


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


def _left_out(run: Run) -> list[str]:
    """Why properties were not tried, and which, one line for each reason."""
    named: dict[str, list[str]] = {}
    for outcome in run.outcomes:
        if outcome.verdict in (NOT_APPLICABLE, NOT_RUN):
            reason = f"{outcome.verdict}, {' '.join((outcome.reason or '').split())}"
            named.setdefault(reason, []).append(outcome.name)
    return [f"{reason}: {', '.join(dict.fromkeys(names))}" for reason, names in named.items()]


def _evidence(outcome: Outcome) -> str:
    if outcome.verdict == INTERNAL_ERROR:
        return ""
    if outcome.verdict == KNOWN:
        return escape(_how_known(outcome))
    if outcome.worst_ratio is not None:
        return f"{outcome.evidence} (worst {outcome.worst_ratio:.2f})"
    return outcome.evidence


def _how_known(outcome: Outcome) -> str:
    if outcome.known:
        return f"{outcome.known} cases failed as a known failure does"
    return outcome.reason or ""


def _details(outcome: Outcome) -> tuple[str, ...]:
    """How much of the space was seen, and what follows from it."""
    coverage = Coverage.of(outcome.pairs)
    share = f"{coverage.met / coverage.possible:.0%}" if coverage.possible else ""
    rate = failure_rate_bound(outcome.sampled) if outcome.verdict == HELD else None
    return (
        str(outcome.architectures),
        share,
        str(outcome.discarded),
        "" if rate is None else f"{rate:.2%}",
    )


def _summary(run: Run) -> str:
    counts = Counter(outcome.verdict for outcome in run.outcomes)
    if missing := run.planned - len(run.outcomes):
        counts["not reached"] = missing
    parts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    cases = sum(outcome.cases for outcome in run.outcomes)
    assertions = sum(outcome.assertions for outcome in run.outcomes)
    style = STYLES.get(run.verdict, "bold yellow")
    word = run.verdict if FALSIFIED in counts or not run.complaints else "failed, as said above"
    if run.verdict == HELD and KNOWN in counts:
        word = "nothing new failed"
    return (
        f"\n[{style}]{word}[/]: {parts}; {cases} cases, {assertions} assertions, "
        f"{run.seconds:.1f} s ({run.setting}, {' and '.join(run.devices)})"
    )


def console() -> Console:
    """Standard output; wide enough for the table when it is not a terminal."""
    return Console() if sys.stdout.isatty() else Console(width=WIDE)


def _print(console: Console, text: str) -> None:
    """A line that can be copied: never wrapped."""
    console.print(text, soft_wrap=True, highlight=False)
