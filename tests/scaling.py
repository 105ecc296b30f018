"""What it costs to spread a campaign: ``python -m tests.scaling`` prints the table of its document.

Every figure is a median over repetitions, in microseconds unless it says otherwise.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from rescnn_verify.cluster import Cluster
from rescnn_verify.corpus import Corpus, Kept
from rescnn_verify.drawing import RandomDraw, draw_trial
from rescnn_verify.engine import Search
from rescnn_verify.journal import Journal
from rescnn_verify.space import ARCHITECTURES, INPUTS, USUAL
from rescnn_verify.unit import Unit, run_unit
from rescnn_verify.workers import Crew, Here, Processes

NAME, TARGET = "shape.shape_dtype_and_device_are_kept", "rescnn:ResCNNStack"


def median(action: Callable[[], object], repetitions: int) -> float:
    """Median microseconds of an action."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def empty_unit() -> str:
    return Unit(NAME, TARGET, Search()).dumps()


def per_unit(crew: Crew, count: int = 200) -> float:
    """Microseconds of wall time for each of many units that have nothing to do."""
    for future in [crew.submit(run_unit, empty_unit()) for _ in range(2 * crew.size)]:
        future.result()
    start = time.perf_counter()
    for future in [crew.submit(run_unit, empty_unit()) for _ in range(count)]:
        future.result()
    return 1e6 * (time.perf_counter() - start) / count


@contextmanager
def cluster(processes: int) -> Iterator[str]:
    """A scheduler and its workers on the loopback interface; yields the address."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scheduler.json"
        common = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
        address = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
        where = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": where}
        scheduler = subprocess.Popen(
            [*common, *address, "--scheduler-file", str(file)], **quiet, cwd=folder
        )
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--nthreads", "1"]
        workers = [
            subprocess.Popen(
                [*worker, "--scheduler-file", str(file), "--no-dashboard"], **quiet, cwd=folder
            )
            for _ in range(processes)
        ]
        try:
            while not file.exists():
                time.sleep(0.05)
            yield json.loads(file.read_text())["address"]
        finally:
            for process in (*workers, scheduler):
                process.terminate()
                process.wait()


def main() -> None:
    torch.set_num_threads(1)
    draw = RandomDraw(0)
    trials = [draw_trial(draw, ARCHITECTURES * INPUTS * USUAL) for _ in range(300)]
    one = trials[0]
    rows: list[tuple[str, float]] = []
    rows.append(
        ("a case to JSON and back", median(lambda: one[0].from_json(one[0].to_json()), 500))
    )
    unit = Unit(NAME, TARGET, Search(trials=tuple(trials[:10])))
    rows.append(
        ("a unit of 10 trials to JSON and back", median(lambda: unit.loads(unit.dumps()), 50))
    )
    with tempfile.TemporaryDirectory() as folder:
        with Journal.open(Path(folder) / "journal", case_timeout=60.0) as journal:

            def noted() -> None:
                with journal.running(one):
                    pass

            rows.append(("noting a case in the journal, with a time limit", median(noted, 500)))
        corpus = Corpus.read(Path(folder) / "corpus")
        entries = iter([Kept(f"p{i}", trial, "failed") for i, trial in enumerate(trials)])
        rows.append(("keeping a case in a corpus", median(lambda: corpus.add(next(entries)), 300)))
        size = len(corpus)
        rows.append(
            (
                f"reading a corpus, for each of {size} cases",
                median(lambda: Corpus.read(corpus.folder), 5) / size,
            )
        )
    rows.append(("a unit without cases, in this process", per_unit(Here())))
    for count in (1, 2):
        with Processes(count) as crew:
            rows.append((f"a unit without cases, {count} process(es)", per_unit(crew)))
    with cluster(2) as address, Cluster(address) as crew:
        rows.append(("a unit without cases, dask, 2 processes", per_unit(crew)))
    busy = replace(unit, search=Search(sampled=40))
    rows.append(("40 trials of a cheap property", median(lambda: run_unit(busy.dumps()), 5)))
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, one thread for each worker\n")
    for name, microseconds in rows:
        print(f"{name:55}{microseconds:>12,.0f} µs")


if __name__ == "__main__":
    main()
