"""The commands that run for long: ``fuzz`` and ``sweep``. What needs torch is imported in them."""

from __future__ import annotations

import math
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rescnn_verify.options import (
    DEFAULT_TARGET,
    DURATION,
    SHARD,
    Interrupt,
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
from rescnn_verify.workers import Crew, Processes

if TYPE_CHECKING:
    from rescnn_verify.corpus import Corpus
    from rescnn_verify.fuzz import Campaign, Event
    from rescnn_verify.known import KnownFailure
    from rescnn_verify.outcome import Outcome


@click.command()
@click.argument("target", default=DEFAULT_TARGET)
@click.option(
    "--max-time",
    type=DURATION,
    default="10m",
    show_default=True,
    help="The budget, such as 90s, 10m or 1h30m.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    help="The cases are a function of it.  [default: another one in every run]",
)
@click.option(
    "--shard", type=SHARD, default="1/1", metavar="I/N", help="Try the I-th of N disjoint parts."
)
@click.option(
    "--continue-on-failure",
    "keep_going",
    is_flag=True,
    help="Go on with the other properties after a falsification.",
)
@click.option(
    "--case-timeout",
    type=DURATION,
    default="60s",
    show_default=True,
    help="A case that takes longer is a hang, which falsifies.",
)
@click.option(
    "--corpus",
    metavar="DIR",
    help="Run the cases kept in this folder first, and keep remarkable ones there. A URL such as "
    "s3://… works with the extra 'remote'.",
)
@click.option(
    "--known",
    "known_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.toml",
    help="Failures that are known and do not fail the run; see docs/fuzzing.md.",
)
@click.option(
    "--baseline",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.json",
    help="The --json file of an earlier run: only what is new fails.",
)
@click.option("--scheduler", metavar="tcp://…", help="Run on a dask.distributed cluster.")
@click.option(
    "--junit",
    "junit_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the results as JUnit XML.",
)
@space_options
@run_options
def fuzz(
    target: str,
    max_time: float,
    seed: int | None,
    shard: tuple[int, int],
    keep_going: bool,
    case_timeout: float,
    corpus: str | None,
    known_file: Path | None,
    baseline: Path | None,
    scheduler: str | None,
    junit_file: Path | None,
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
    """Search for counterexamples in TARGET until the time is up.

    Every run tries other cases. It ends at the first falsification, or with the budget.
    """
    writable(json_file, "--json")
    writable(junit_file, "--junit")
    start = time.monotonic()
    seed = secrets.randbits(32) if seed is None else seed
    with _crew(count or default_count(device), scheduler) as crew:
        from rescnn_verify import report
        from rescnn_verify.campaign import select
        from rescnn_verify.corpus import Corpus, CorpusError, folder_of
        from rescnn_verify.fuzz import Campaign, FuzzPlan
        from rescnn_verify.known import KnownError, read_baseline, read_known, signatures
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
        matching = {prop.name for prop in select(expression)}  # whatever the target is
        try:
            kept = Corpus.read(folder_of(corpus)) if corpus else None
            known = read_known(known_file) if known_file else ()
            allowed = read_baseline(baseline) if baseline else {}
        except (CorpusError, KnownError) as error:
            fail(str(error))
        for complaint in kept.unreadable if kept else ():
            click.echo(f"warning: corpus: {complaint}; it is left as it is", err=True)
        listed = signatures(known)
        plan = FuzzPlan(
            target=target,
            properties=names,
            seconds=max(1.0, max_time - (time.monotonic() - start)),
            seed=seed,
            devices=devices,
            shard=shard,
            space=space,
            keep_going=keep_going,
            case_timeout=case_timeout,
            known={n: (*listed.get(n, ()), *allowed.get(n, ())) for n in names},
            first=kept.trials() if kept else {},
        )
        campaign = Campaign(plan)
        found = Witnesses(target, witnesses)
        problems: dict[str, None] = {}
        with stopping_on_interrupt() as interrupt:
            complaints = _stale(
                [failure for failure in known if failure.witness.name in matching],
                target,
                crew,
                case_timeout,
                interrupt,
            )
            with _progress_of(campaign) as advance:
                for event in campaign.run(crew, until=lambda: interrupt.at):
                    found.add(event.outcome)
                    advance(event)
                    if kept is not None and (problem := _keep(kept, event.outcome)):
                        problems.setdefault(problem)
    for problem in problems:
        click.echo(problem, err=True)
    run = report.Run(
        f"rescnn-verify fuzz {target}",
        target,
        devices,
        f"seed {seed}" + (f", shard {shard[0] + 1}/{shard[1]}" if shard[1] > 1 else ""),
        len(campaign.outcomes),
        tuple(campaign.outcomes),
        time.monotonic() - start,
        {"seed": seed, "shard": f"{shard[0] + 1}/{shard[1]}", "max_time": max_time},
        tuple(complaints),
        "interrupted" if interrupt.at < math.inf else "",
    )
    conclude(run, found, json_file, junit_file)
    if interrupt.at < math.inf and run.verdict != FALSIFIED:
        fail("interrupted; what was found until then is above")
    sys.exit(report.exit_code(run.verdict))


@click.command()
@click.argument("target", default=DEFAULT_TARGET)
@click.option(
    "--space",
    "space_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.toml",
    required=True,
    help="The space, every case of which is run; see docs/space.md.",
)
@click.option(
    "--state",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("sweep.jsonl"),
    show_default=True,
    metavar="FILE",
    help="What is done is remembered here: the same command goes on where it was ended.",
)
@click.option(
    "--shard", type=SHARD, default="1/1", metavar="I/N", help="Run the I-th of N disjoint parts."
)
@click.option(
    "--continue-on-failure",
    "keep_going",
    is_flag=True,
    help="Go on with the other properties after a falsification.",
)
@click.option(
    "--case-timeout",
    type=DURATION,
    default="60s",
    show_default=True,
    help="A case that takes longer is a hang, which falsifies.",
)
@click.option("--scheduler", metavar="tcp://…", help="Run on a dask.distributed cluster.")
@run_options
def sweep(
    target: str,
    space_file: Path,
    state: Path,
    shard: tuple[int, int],
    keep_going: bool,
    case_timeout: float,
    scheduler: str | None,
    device: str,
    require_cuda: bool,
    against: str | None,
    expression: str | None,
    count: int | None,
    json_file: Path | None,
    witnesses: Path,
) -> None:
    """Run every case of a bounded space on TARGET, the smallest configurations first.

    A run that was ended, in whatever way, is resumed by the same command.
    """
    writable(json_file, "--json")
    writable(state, "--state")
    start = time.monotonic()
    with _crew(count or default_count(device), scheduler) as crew:
        from rescnn_verify import report
        from rescnn_verify.outcome import FALSIFIED
        from rescnn_verify.sweep import Sweep, SweepError, SweepPlan

        space = space_data(space_file, None)
        assert space is not None
        target, names = selected(target, against, expression, space)
        devices = usable_devices(device, require_cuda)
        plan = SweepPlan(target, names, space["space"], devices, shard, keep_going, case_timeout)
        try:
            work = Sweep(plan, state)
        except SweepError as error:
            fail(str(error))
        resumed, problem = len(work.done), ""
        if resumed:
            click.echo(f"{resumed} of {work.units} units were done before: {state}", err=True)
        for line in work.plans:
            click.echo(line, err=True)
        found = Witnesses(target, witnesses)
        try:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            bar = Progress(*columns, console=Console(stderr=True), transient=True)
            with stopping_on_interrupt() as interrupt, bar as progress:
                task = progress.add_task("sweeping", total=work.units, completed=resumed)
                cases = 0
                for outcome in work.run(crew, until=lambda: interrupt.at):
                    found.add(outcome)
                    cases += outcome.cases
                    rate = cases / (time.monotonic() - start)
                    text = f"{escape(outcome.name)} · {cases} cases, {rate:.0f}/s"
                    progress.update(task, advance=1, description=text)
        except (SweepError, OSError) as error:
            crew.kill()
            problem = f"{error}; what was done until then is kept"
    run = report.Run(
        f"rescnn-verify sweep {target}",
        target,
        devices,
        f"{space_file}" + (f", shard {shard[0] + 1}/{shard[1]}" if shard[1] > 1 else ""),
        len(work.outcomes),
        tuple(work.outcomes),
        time.monotonic() - start,
        {"space": plan.bounded["space"], "shard": f"{shard[0] + 1}/{shard[1]}", "resumed": resumed},
        cut_short=problem or ("interrupted" if interrupt.at < math.inf else ""),
    )
    conclude(run, found, json_file, None)
    if interrupt.at < math.inf and run.verdict != FALSIFIED:
        fail(f"interrupted; the same command goes on from {state}")
    if problem and run.verdict != FALSIFIED:
        fail(problem)
    if work.units == 0:
        click.echo("this shard has no unit of any property", err=True)
        sys.exit(0)
    sys.exit(report.exit_code(run.verdict))


@contextmanager
def _crew(count: int, scheduler: str | None) -> Iterator[Crew]:
    if scheduler is None:
        with Processes(count) as crew:
            yield crew
        return
    from rescnn_verify.cluster import Cluster, ClusterError

    try:
        cluster = Cluster(scheduler)
    except ClusterError as error:
        fail(str(error))
    with cluster:
        yield cluster


def _stale(
    known: Sequence[KnownFailure],
    target: str,
    crew: Crew,
    case_timeout: float,
    interrupt: Interrupt,
) -> list[str]:
    """What is wrong with a list of known failures: each witness is run, before all else."""
    from datetime import date

    from rescnn_verify.known import examine

    for failure in known:
        if failure.look_again and failure.look_again <= date.today():
            click.echo(
                f"warning: {failure.where}: to be looked at again on {failure.look_again}: "
                f"{failure.reason} {failure.link}".rstrip(),
                err=True,
            )
    return examine(known, target, crew, case_timeout=case_timeout, until=lambda: interrupt.at)


def _keep(corpus: Corpus, outcome: Outcome) -> str | None:
    """Keeps what is remarkable; why it could not, None if it could."""
    from rescnn_verify.corpus import Kept

    entries = [
        Kept(outcome.name, trial, why, (outcome.worst_ratio or 0.0) if why == "tight" else 0.0)
        for why, trial in outcome.remarkable
    ]
    if outcome.verdict == "falsified" and outcome.trial:
        entries.insert(0, Kept(outcome.name, outcome.trial, "failed"))
    try:
        for entry in entries:
            corpus.add(entry)
    except Exception as error:  # a full disk, or whatever library writes this kind of URL
        return f"warning: corpus {corpus.folder}: {type(error).__name__}: {error}"
    return None


@contextmanager
def _progress_of(campaign: Campaign) -> Iterator[Callable[[Event], None]]:
    """Properties, cases, cases per second, time left and what was found, as it goes."""
    start, cases, falsified = time.monotonic(), 0, set[str]()
    seen: set[str] = set()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("fuzzing", total=campaign.plan.seconds)

        def advance(event: Event) -> None:
            nonlocal cases
            outcome = event.outcome
            cases += outcome.cases
            seen.add(outcome.name)
            if outcome.verdict == "falsified":
                falsified.add(outcome.name)
            found = f"[bold red]{len(falsified)} falsified[/] · " if falsified else ""
            seconds = time.monotonic() - start
            progress.update(
                task,
                completed=min(seconds, campaign.plan.seconds),
                description=(
                    f"{found}round {event.round} · {len(seen)} properties · {cases} cases, "
                    f"{cases / seconds:.0f}/s"
                ),
            )

        yield advance
