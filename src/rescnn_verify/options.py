"""What the commands share: option types, options and how a command ends. Imports no torch."""

from __future__ import annotations

import math
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from rescnn_verify.files import write_whole
from rescnn_verify.workers import usable_cores

if TYPE_CHECKING:
    from rescnn_verify.outcome import Outcome
    from rescnn_verify.report import Run

__all__ = [
    "DEFAULT_TARGET",
    "DURATION",
    "SHARD",
    "Interrupt",
    "Witnesses",
    "conclude",
    "default_count",
    "device_option",
    "fail",
    "json_option",
    "run_options",
    "selected",
    "space_data",
    "space_options",
    "stopping_on_interrupt",
    "usable_devices",
    "writable",
]

DEFAULT_TARGET = "rescnn:ResCNNStack"

F = TypeVar("F", bound=Callable[..., Any])


class _Duration(click.ParamType):  # type: ignore[type-arg]
    name = "duration"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        if isinstance(value, int | float):
            return float(value)
        parts = re.fullmatch(
            r"(?:(?P<h>\d+(?:\.\d+)?)h)?(?:(?P<m>\d+(?:\.\d+)?)m)?(?:(?P<s>\d+(?:\.\d+)?)s?)?",
            value.strip(),
        )
        seconds = 0.0
        if parts and value.strip():
            hours, minutes, rest = (float(parts[unit] or 0) for unit in "hms")
            seconds = 3600 * hours + 60 * minutes + rest
        if seconds <= 0:
            self.fail(f"{value!r} is not a duration above 0; write 90s, 10m or 1h30m", param, ctx)
        return seconds


class _Shard(click.ParamType):  # type: ignore[type-arg]
    name = "shard"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        parts = re.fullmatch(r"(\d+)/(\d+)", value.strip())
        if not parts or not 1 <= int(parts[1]) <= int(parts[2]):
            self.fail(
                f"{value!r} is not a shard; write I/N with 1 ≤ I ≤ N, such as 2/4", param, ctx
            )
        return int(parts[1]) - 1, int(parts[2])


class _Kernels(click.ParamType):  # type: ignore[type-arg]
    name = "kernel sizes"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int]:
        if isinstance(value, list):
            return value
        if not re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", value):
            self.fail(f"{value!r} is not a list of kernel sizes; write 3,5,7", param, ctx)
        return [int(size) for size in value.split(",")]


DURATION, SHARD, KERNELS = _Duration(), _Shard(), _Kernels()


def _all_of(*options: Callable[[F], F]) -> Callable[[F], F]:
    def wrap(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return wrap


device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda", "all"]),
    default="cpu",
    show_default=True,
    help="Where the models run.",
)

json_option = click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the results as JSON.",
)

run_options = _all_of(
    device_option,
    click.option(
        "--require-cuda", is_flag=True, help="Exit with 2 unless there is a CUDA device to run on."
    ),
    click.option(
        "--against",
        metavar="PLAIN",
        help="Compare TARGET, a class that loads PLAIN's weights or a function that makes a module "
        "of a PLAIN module, with the target PLAIN.",
    ),
    click.option(
        "-k",
        "expression",
        metavar="EXPR",
        help="Only properties whose names match, such as 'split or (shape and not finite)'.",
    ),
    click.option(
        "-n",
        "count",
        type=click.IntRange(min=1),
        metavar="WORKERS",
        help="Processes, one thread each.  [default: the cores; 1 with CUDA]",
    ),
    json_option,
    click.option(
        "--witnesses",
        type=click.Path(file_okay=False, path_type=Path),
        default=Path("witnesses"),
        show_default=True,
        metavar="DIR",
        help="Where counterexamples are written.",
    ),
)

space_options = _all_of(
    click.option(
        "--space",
        "space_file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE.toml",
        help="Only cases of this space; see docs/space.md.",
    ),
    click.option(
        "--config",
        "config_file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE.toml",
        help="Only this configuration and its neighbours.",
    ),
    click.option("--channels", type=int, help="Of the one configuration, instead of a file."),
    click.option("--num-blocks", type=int, help="The same."),
    click.option("--kernel-sizes", type=KERNELS, metavar="3,5,7", help="The same."),
    click.option("--dropout", type=float, help="The same."),
)


def space_data(space: Path | None, config: Path | None, **one: Any) -> Mapping[str, Any] | None:
    """The user's own space as `Unit` has it, None if there is none; a mistake ends the command.

    Args:
        space: a space file.
        config: the file of a configuration.
        one: what the options say of a configuration, None where they say nothing.
    """
    from rescnn_verify.spacefile import SpaceFileError, config_of, read_table, space_of

    given = {name: item for name, item in one.items() if item is not None}
    if space and (config or given):
        fail("--space cannot be combined with a configuration, which has a space of its own")
    try:
        if space:
            data = read_table(space)
            space_of(data, str(space))
            return {"space": data}
        if config or given:
            data = (read_table(config) if config else {}) | given
            config_of(data, str(config) if config else "the configuration of the command line")
            return {"near": data}
    except SpaceFileError as error:
        fail(str(error))
    return None


def selected(
    target: str, against: str | None, expression: str | None, space: Mapping[str, Any] | None
) -> tuple[str, tuple[str, ...]]:
    """The target as reports name it and the properties to run; a mistake ends the command."""
    from rescnn_verify.campaign import SelectionError, select
    from rescnn_verify.space import SpaceError
    from rescnn_verify.target import AGAINST, TargetError
    from rescnn_verify.unit import target_of

    target = f"{target}{AGAINST}{against}" if against else target
    try:
        pairs = target_of(target, space).twin is not None
        return target, tuple(p.name for p in select(expression, pairs=pairs))
    except SpaceError as error:
        fail(f"{target} promises nothing in this space: {error}")
    except (TargetError, SelectionError) as error:
        fail(str(error))


def usable_devices(device: str, require_cuda: bool) -> tuple[str, ...]:
    """The devices that ``--device`` names; ends the command if one that must be there is not."""
    import torch

    if (require_cuda or device == "cuda") and not torch.cuda.is_available():
        option = "--require-cuda" if require_cuda else "--device cuda"
        fail(f"{option}: this machine has no CUDA device that torch can use")
    return ("cpu", "cuda") if device == "all" else (device,)


def default_count(device: str) -> int:
    """As many processes as there are cores; one with CUDA, as each has a context on the device."""
    return usable_cores() if device == "cpu" else 1


def writable(file: Path | None, option: str) -> None:
    """Ends the command unless a file can be made where the option says, before anything runs."""
    if file and not file.absolute().parent.is_dir():
        fail(f"{option} {file}: there is no folder {file.absolute().parent}")


@dataclass
class Interrupt:
    """When Ctrl-C was pressed, in seconds of `time.monotonic`; infinity: not yet."""

    at: float = math.inf


@contextmanager
def stopping_on_interrupt() -> Iterator[Interrupt]:
    """Lets Ctrl-C end the run in order, with all that was found; pressed again, it ends at once."""
    interrupt = Interrupt()

    def handle(*_: object) -> None:
        interrupt.at = time.monotonic()
        signal.signal(signal.SIGINT, before)
        click.echo("stopping; Ctrl-C again ends it at once", err=True)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


class Witnesses:
    """Writes the witness of each falsified property as soon as it is known.

    Args:
        target: the target as reports name it.
        folder: where they go.
    """

    def __init__(self, target: str, folder: Path) -> None:
        self.written: dict[str, Path] = {}
        self._target, self._folder = target, folder
        self._warned = False

    def add(self, outcome: Outcome) -> None:
        """Writes the witness of an outcome, if it has one; a full disk is said once."""
        from rescnn_verify.report import witness_of

        witness = witness_of(outcome, self._target)
        if witness is None:
            return
        try:
            self.written[witness.filename] = witness.write(self._folder)
        except OSError as error:
            if not self._warned:
                text = f"warning: cannot write witnesses to {self._folder}: {error.strerror}"
                click.echo(text, err=True)
            self._warned = True

    def complete(self, run: Run) -> dict[str, Path]:
        """The files of a run's witnesses; those of outcomes that an earlier run found, too."""
        from rescnn_verify.report import witness_of

        for outcome in run.outcomes:
            witness = witness_of(outcome, self._target)
            if witness and witness.filename not in self.written:
                self.add(outcome)
        return self.written


def conclude(
    run: Run, witnesses: Witnesses, json_file: Path | None, junit_file: Path | None
) -> None:
    """Prints the report and writes it to files."""
    from rescnn_verify import report

    written = witnesses.complete(run)
    report.print_report(report.console(), run, written)
    for file, option, text in (
        (json_file, "--json", report.json_text),
        (junit_file, "--junit", report.junit_text),
    ):
        try:
            if file:
                write_whole(file, text(run, written))
        except OSError as error:
            fail(f"{option} {file}: {error.strerror}")


def fail(message: str) -> NoReturn:
    """Ends the command with exit code 2 and one line."""
    click.echo(f"error: {message}", err=True)
    sys.exit(2)
