"""The command line.

Exit codes: 0 held (or not reproduced), 1 falsified (or reproduced), 2 could not run.

What needs torch is imported inside the commands: the worker processes then start at the same time,
and a wrong option is answered at once.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rescnn_verify import __version__
from rescnn_verify.workers import usable_cores, workers

if TYPE_CHECKING:
    from rescnn_verify.engine import Outcome

DEFAULT_TARGET = "rescnn:ResCNNStack"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rescnn-verify")
def main() -> None:
    """Checks whether a residual 1-D CNN does what its architecture says."""


@main.command()
@click.argument("target", default=DEFAULT_TARGET)
@click.option(
    "--profile",
    type=click.Choice(["quick", "default", "thorough"]),
    default="default",
    show_default=True,
    help="How long to search.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda", "all"]),
    default="cpu",
    show_default=True,
    help="Where the models run.",
)
@click.option(
    "--require-cuda", is_flag=True, help="Exit with 2 unless there is a CUDA device to run on."
)
@click.option(
    "--against",
    metavar="PLAIN",
    help="Compare TARGET, a class that loads PLAIN's weights or a function that makes a module of "
    "a PLAIN module, with the target PLAIN.",
)
@click.option(
    "-k",
    "expression",
    metavar="EXPR",
    help="Only properties whose names match, such as 'split or (shape and not finite)'.",
)
@click.option(
    "-n",
    "count",
    type=click.IntRange(min=1),
    metavar="WORKERS",
    help="Processes, one thread each.  [default: the cores; 1 with CUDA]",
)
@click.option("-x", "stop_early", is_flag=True, help="Stop at the first falsified property.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="The cases are a function of it; another seed tries others.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the results as JSON.",
)
@click.option(
    "--witnesses",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("witnesses"),
    show_default=True,
    metavar="DIR",
    help="Where counterexamples are written.",
)
def check(
    target: str,
    profile: str,
    device: str,
    require_cuda: bool,
    against: str | None,
    expression: str | None,
    count: int | None,
    stop_early: bool,
    seed: int,
    json_file: Path | None,
    witnesses: Path,
) -> None:
    """Check TARGET against every property.

    TARGET is package.module:Attr or path/file.py:Attr, a class with the contract's constructor or a
    rescnn_verify.Target.
    """
    if json_file and not json_file.absolute().parent.is_dir():
        _fail(f"--json {json_file}: there is no folder {json_file.absolute().parent}")
    start = time.perf_counter()
    count = count or (usable_cores() if device == "cpu" else 1)  # each has a context on the GPU
    with workers(count) if count > 1 else nullcontext() as executor:
        from rescnn_verify import campaign, report
        from rescnn_verify.target import AGAINST, TargetError, load

        try:
            target = f"{target}{AGAINST}{against}" if against else target
            pairs = load(target).twin is not None
            names = tuple(p.name for p in campaign.select(expression, pairs=pairs))
        except (TargetError, campaign.SelectionError) as error:
            _fail(str(error))
        if require_cuda or device == "cuda":
            _require_cuda("--require-cuda" if require_cuda else "--device cuda")
        devices = ("cpu", "cuda") if device == "all" else (device,)
        plan = campaign.Plan(target, names, profile, seed, devices, stop_early)
        outcomes: list[Outcome] = []
        interrupted = False
        try:
            with _progress(len(plan.units)) as advance:
                for outcome in campaign.run_plan(plan, executor):
                    outcomes.append(outcome)
                    advance(outcome)
        except KeyboardInterrupt:
            interrupted = True
            for worker in multiprocessing.active_children():
                worker.kill()  # it may hang in the target's code
    outcomes.sort(key=lambda outcome: (names.index(outcome.name), outcome.device))
    written = {}
    try:
        for outcome in outcomes:
            if witness := report.witness_of(outcome, target):
                written[outcome.name, outcome.device] = witness.write(witnesses)
    except OSError as error:
        click.echo(f"warning: cannot write witnesses to {witnesses}: {error.strerror}", err=True)
    seconds = time.perf_counter() - start
    report.print_report(report.console(), plan, outcomes, seconds, written)
    if json_file:
        try:
            report.write_json(json_file, report.to_json(plan, outcomes, seconds, written))
        except OSError as error:
            _fail(f"--json {json_file}: {error.strerror}")
    if interrupted:
        _fail(f"interrupted after {len(outcomes)} of {len(plan.units)} properties")
    sys.exit(report.exit_code(report.verdict_of(outcomes, len(plan.units))))


@main.command()
@click.argument(
    "files",
    metavar="WITNESS.json...",
    nargs=-1,
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
)
@click.option("--target", help="Run another target than the one the witness names.")
def replay(files: tuple[Path, ...], target: str | None) -> None:
    """Run the case of each witness again: exit 1 if one is reproduced, 0 if none is."""
    from dataclasses import replace

    from rescnn_verify import report
    from rescnn_verify.case import CaseError
    from rescnn_verify.statement import PropertyError
    from rescnn_verify.target import TargetError
    from rescnn_verify.witness import Witness, WitnessError
    from rescnn_verify.witness import replay as run

    console = report.console()
    reproduced = 0
    for path in files:
        try:
            witness = Witness.read(path)
            witness = replace(witness, target=target or witness.target)
            falsified = run(witness)
        except (WitnessError, PropertyError, TargetError, CaseError) as error:
            _fail(str(error))
        except Exception:
            traceback.print_exc()  # the suite's own mistake, which says nothing about the target
            _fail(f"{path}: internal error")
        name = f"{escape(witness.name)} on {escape(witness.target)}"
        if falsified is None:
            console.print(f"[green]not reproduced[/]: {name}", soft_wrap=True, highlight=False)
            continue
        reproduced += 1
        console.print(f"[bold red]reproduced[/]: {name}", soft_wrap=True, highlight=False)
        seen = replace(witness, what=falsified.what, expected=falsified.expected, got=falsified.got)
        report.print_witness(console, seen, None, lines=False)
    sys.exit(1 if reproduced else 0)


@main.command(name="list")
@click.option("-k", "expression", metavar="EXPR", help="Only properties whose names match.")
def list_properties(expression: str | None) -> None:
    """Show each property with its statement and what it needs of a target."""
    from rescnn_verify import campaign, report

    try:
        properties = campaign.select(expression)
    except campaign.SelectionError as error:
        _fail(str(error))
    table = Table(show_lines=True)
    table.add_column("property", overflow="fold", ratio=3)
    table.add_column("statement", ratio=5)
    table.add_column("needs", ratio=2)
    for prop in properties:
        needs = ", ".join(need.name for need in prop.needs) or "nothing"
        table.add_row(prop.name, escape(prop.title), needs)
    report.console().print(table)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Outcome], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("checking", total=total)
        falsified = 0

        def advance(outcome: Outcome) -> None:
            nonlocal falsified
            falsified += outcome.verdict == "falsified"
            found = f"[bold red]{falsified} falsified[/] · " if falsified else ""
            progress.update(task, advance=1, description=f"{found}{outcome.name}")

        yield advance


def _require_cuda(option: str) -> None:
    import torch

    if not torch.cuda.is_available():
        _fail(f"{option}: this machine has no CUDA device that torch can use")


def _fail(message: str) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    sys.exit(2)
