"""The command line.

Exit codes: 0 held (or not reproduced), 1 falsified (or reproduced), 2 could not run.

What needs torch is imported inside the commands: the worker processes then start at the same time,
and a wrong option is answered at once.
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rescnn_verify import __version__
from rescnn_verify.cli_bench import bench
from rescnn_verify.cli_campaigns import fuzz, sweep
from rescnn_verify.options import (
    DEFAULT_TARGET,
    DURATION,
    Witnesses,
    conclude,
    default_count,
    fail,
    run_options,
    selected,
    space_data,
    space_options,
    stopping_on_interrupt,
    usable_devices,
    writable,
)
from rescnn_verify.workers import Here, Processes

if TYPE_CHECKING:
    from rescnn_verify.outcome import Outcome


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rescnn-verify")
def main() -> None:
    """Checks whether a residual 1-D CNN does what its architecture says."""


def run() -> None:
    """The program: as `main`, and a mistake of the suite's own ends it with 2, as nothing else."""
    try:
        main(standalone_mode=False)
    except click.ClickException as error:
        fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        fail("aborted")
    except Exception:
        traceback.print_exc()
        fail("internal error; it says nothing about the target")


@main.command()
@click.argument("target", default=DEFAULT_TARGET)
@click.option(
    "--profile",
    type=click.Choice(["quick", "default", "thorough"]),
    default="default",
    show_default=True,
    help="How long to search.",
)
@click.option("-x", "stop_early", is_flag=True, help="Stop at the first falsified property.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="The cases are a function of it; another seed tries others.",
)
@space_options
@run_options
def check(
    target: str,
    profile: str,
    stop_early: bool,
    seed: int,
    space_file: Path | None,
    config_file: Path | None,
    channels: int | None,
    num_blocks: int | None,
    kernel_sizes: list[int] | None,
    dropout: float | None,
    device: str,
    require_cuda: bool,
    against: str | None,
    expression: str | None,
    count: int | None,
    json_file: Path | None,
    witnesses: Path,
) -> None:
    """Check TARGET against every property.

    TARGET is package.module:Attr or path/file.py:Attr, a class with the contract's constructor or a
    rescnn_verify.Target.
    """
    writable(json_file, "--json")
    start = time.perf_counter()
    count = count or default_count(device)
    with Processes(count) if count > 1 else Here() as crew:
        from rescnn_verify import campaign, report
        from rescnn_verify.outcome import FALSIFIED

        space = space_data(
            space_file,
            config_file,
            channels=channels,
            num_blocks=num_blocks,
            kernel_sizes=kernel_sizes,
            dropout=dropout,
        )
        target, names = selected(target, against, expression, space)
        devices = usable_devices(device, require_cuda)
        plan = campaign.Plan(target, names, profile, seed, devices, stop_early, space)
        outcomes: list[Outcome] = []
        found = Witnesses(target, witnesses)
        with stopping_on_interrupt() as interrupt, _progress(len(plan.units)) as advance:
            for outcome in campaign.run_plan(plan, crew, until=lambda: interrupt.at):
                found.add(outcome)
                outcomes.append(outcome)
                advance(outcome)
    outcomes.sort(key=lambda outcome: (names.index(outcome.name), outcome.device))
    done = report.Run(
        f"rescnn-verify check {target}",
        target,
        devices,
        f"profile {profile}, seed {seed}",
        len(plan.units),
        tuple(outcomes),
        time.perf_counter() - start,
        {"profile": profile, "seed": seed},
    )
    conclude(done, found, json_file, None)
    if interrupt.at < math.inf and done.verdict != FALSIFIED:
        fail(f"interrupted after {len(outcomes)} of {len(plan.units)} properties")
    sys.exit(report.exit_code(done.verdict))


@main.command()
@click.argument("places", metavar="FILE|DIR|ID...", nargs=-1, required=True)
@click.option("--target", help="Run another target than the one the witness names.")
@click.option(
    "--witnesses",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("witnesses"),
    show_default=True,
    metavar="DIR",
    help="Where an ID is looked for.",
)
@click.option(
    "--script", is_flag=True, help="Print a Python script that shows it, and run nothing."
)
@click.option(
    "--case-timeout",
    type=DURATION,
    default="60s",
    show_default=True,
    help="A case that takes longer is a hang, of a witness that ended its process.",
)
def replay(
    places: tuple[str, ...],
    target: str | None,
    witnesses: Path,
    script: bool,
    case_timeout: float,
) -> None:
    """Run the case of each witness again: exit 1 if one is reproduced, 0 if none is.

    A witness is a file, every file of a folder, or the ID at the end of a file's name.
    """
    from dataclasses import replace

    from rescnn_verify import report
    from rescnn_verify.alone import replay_alone
    from rescnn_verify.case import CaseError
    from rescnn_verify.outcome import signature
    from rescnn_verify.statement import PropertyError
    from rescnn_verify.target import TargetError
    from rescnn_verify.witness import Witness, WitnessError, find_witnesses
    from rescnn_verify.witness import replay as replay_here

    try:
        paths = [path for place in places for path in find_witnesses(place, witnesses)]
    except WitnessError as error:
        fail(str(error))
    if script and len(paths) > 1:
        fail(f"--script prints one script, and here are {len(paths)} witnesses; name one of them")
    console = report.console()
    reproduced = could_not = 0
    for path in paths:
        try:
            witness = Witness.read(path)
        except WitnessError as error:
            click.echo(f"error: {error}", err=True)
            could_not += 1
            continue
        witness = replace(witness, target=target or witness.target)
        if script:
            click.echo(witness.script())
            continue
        name = f"{escape(witness.name)} on {escape(witness.target)}"
        try:
            falsified = (
                replay_alone(witness, case_timeout) if witness.alone else replay_here(witness)
            )
        except (WitnessError, PropertyError, TargetError, CaseError) as error:
            click.echo(f"error: {path}: {error}", err=True)
            could_not += 1
            continue
        except Exception:
            traceback.print_exc()  # the suite's own mistake, which says nothing about the target
            click.echo(f"error: {path}: internal error", err=True)
            could_not += 1
            continue
        if falsified is None:
            console.print(f"[green]not reproduced[/]: {name}", soft_wrap=True, highlight=False)
            continue
        reproduced += 1
        console.print(f"[bold red]reproduced[/]: {name}", soft_wrap=True, highlight=False)
        if signature(falsified.what, falsified.got) != signature(witness.what, witness.got):
            before = f"it failed in another way then: {witness.what}, got {witness.got}"
            console.print(f"  {escape(before)}", soft_wrap=True, highlight=False)
        seen = replace(witness, what=falsified.what, expected=falsified.expected, got=falsified.got)
        report.print_witness(console, seen, None, lines=False)
    sys.exit(1 if reproduced else 2 if could_not else 0)


@main.command(name="list")
@click.option("-k", "expression", metavar="EXPR", help="Only properties whose names match.")
def list_properties(expression: str | None) -> None:
    """Show each property with its statement and what it needs of a target."""
    from rescnn_verify import campaign, report

    try:
        properties = campaign.select(expression)
    except campaign.SelectionError as error:
        fail(str(error))
    table = Table(show_lines=True)
    table.add_column("property", overflow="fold", ratio=3)
    table.add_column("statement", ratio=5)
    table.add_column("needs", ratio=2)
    for prop in properties:
        needs = ", ".join(need.name for need in prop.needs) or "nothing"
        table.add_row(prop.name, escape(prop.title), needs)
    report.console().print(table)


main.add_command(bench)
main.add_command(fuzz)
main.add_command(sweep)


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
