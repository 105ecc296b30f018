"""The command that times: ``bench``. It runs the benchmarks in pytest, with pytest-benchmark."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from rescnn_verify.bench import HOWS
from rescnn_verify.options import (
    DEFAULT_TARGET,
    DURATION,
    device_option,
    fail,
    json_option,
    usable_devices,
    writable,
)

__all__ = ["bench"]


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", metavar="[TARGET] [--benchmark-…]", nargs=-1, type=click.UNPROCESSED)
@click.option("--against", metavar="PLAIN", help="Also time the target PLAIN, in turn with TARGET.")
@device_option
@click.option(
    "--space",
    "space_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.toml",
    help="Time the cases of this space.  [default: the documented stack, a few batch sizes]",
)
@click.option(
    "--how",
    "hows",
    type=click.Choice(HOWS),
    multiple=True,
    help="Run the model as it is, compiled, or from a CUDA graph; several times for several.",
)
@click.option(
    "--max-time",
    type=DURATION,
    default="1s",
    show_default=True,
    help="About how long to measure each.",
)
@click.option("-k", "expression", metavar="EXPR", help="Only benchmarks whose names match.")
@json_option
def bench(
    arguments: tuple[str, ...],
    against: str | None,
    device: str,
    space_file: Path | None,
    hows: tuple[str, ...],
    max_time: float,
    expression: str | None,
    json_file: Path | None,
) -> None:
    """Time TARGET: forward and backward, in both modes, on a CPU or a CUDA device.

    Options of pytest-benchmark may follow, such as --benchmark-autosave or --benchmark-compare.
    """
    writable(json_file, "--json")
    target, further = _split(arguments)
    import pytest

    from rescnn_verify.bench.jobs import jobs
    from rescnn_verify.space import SpaceError
    from rescnn_verify.spacefile import SpaceFileError, read_space
    from rescnn_verify.target import AGAINST, TargetError, load

    devices = usable_devices(device, require_cuda=False)
    target = f"{target}{AGAINST}{against}" if against else target
    try:
        space = read_space(space_file) if space_file else None
        jobs(load(target), space, devices, hows or HOWS[:1])
    except (TargetError, SpaceError, SpaceFileError) as error:
        fail(str(error))
    benchmarks = Path(__file__).parent / "bench" / "benchmarks.py"
    options = ["-p", "rescnn_verify.plugin", "-p", "no:cacheprovider", "-q", "-rs"]
    # No settings of a project that happens to be around apply.
    options += ["-c", os.devnull, "--rootdir", str(benchmarks.parent)]
    options += [f"--target={target}", f"--verify-device={device}"]
    options += [f"--benchmark-max-time={max_time}", "--benchmark-columns=min,median,iqr,rounds"]
    options += [f"--bench-how={how}" for how in hows]
    options += [f"--bench-space={space_file}"] if space_file else []
    options += ["-k", expression] if expression else []
    options += [f"--benchmark-json={json_file}"] if json_file else []
    status = pytest.main([str(benchmarks), *options, *further])
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        fail(f"-k {expression!r}: no benchmark matches")
    sys.exit(0 if status == pytest.ExitCode.OK else 2)


def _split(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The target, and the options of pytest-benchmark with their values."""
    target, further = DEFAULT_TARGET, []
    before = ""
    for argument in arguments:
        is_value = before.startswith("--benchmark-") and "=" not in before
        if argument.startswith("--benchmark-") or (is_value and ":" not in argument):
            further.append(argument)
        elif argument.startswith("-"):
            fail(f"there is no option {argument}; those of pytest-benchmark begin --benchmark-")
        elif target is not DEFAULT_TARGET:
            fail(f"{target} is one target and {argument} another; --against compares two")
        else:
            target = argument
        before = argument
    return target, further
