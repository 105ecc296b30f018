"""A campaign on a cluster: a real scheduler and worker processes on this machine."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import distributed
import pytest

from rescnn_verify import cluster, unit
from rescnn_verify.alone import hanging
from rescnn_verify.cluster import Cluster, ClusterError
from rescnn_verify.engine import Search
from rescnn_verify.outcome import NOTHING_ASSERTED, UNFINISHED
from tests.test_cli import ROOT
from tests.test_fuzz import FIELD, SHAPE, STACK, TWO, WIDTHS, in_process, properties_of, target_in
from tests.test_sweep import SLOW, arguments_of, lines_of, sweep_whole, totals_of


def daemon(*arguments, **environment):
    """A process of distributed's own, which ends with `stop`."""
    paths = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
    return subprocess.Popen(
        [sys.executable, "-m", *arguments, "--no-dashboard"],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def stop(*processes):
    for process in processes:
        process.kill()
        process.wait()


def wait_for(happened, *processes):
    give_up = time.monotonic() + 60
    while not (found := happened()):
        assert time.monotonic() < give_up
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    return found


@contextmanager
def within(seconds):
    """Ends what hangs."""

    def end(*_):
        raise AssertionError(f"it hangs: no end in {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def started(folder, workers):
    """The address of a new scheduler, its process, and those of its workers."""
    file = folder / "scheduler.json"
    options = ("--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file))
    scheduler = daemon("distributed.cli.dask_scheduler", *options)
    options = ("--scheduler-file", str(file), "--no-nanny", "--nthreads", "1")
    crew = [
        daemon("distributed.cli.dask_worker", *options, SECONDS_TO_BUILD="0.01")
        for _ in range(workers)
    ]
    address = wait_for(lambda: _address_in(file), scheduler)
    return address, scheduler, crew


def _address_in(file):
    """The scheduler's address, None as long as it has not written its file to the end."""
    try:
        return json.loads(file.read_text())["address"]
    except (FileNotFoundError, json.JSONDecodeError):
        return None


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """The address of a scheduler and its two workers, of which a test may kill the first."""
    address, scheduler, workers = started(tmp_path_factory.mktemp("cluster"), 2)
    with distributed.Client(address, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=60)
    yield address, workers
    stop(scheduler, *workers)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep without a cluster: its output, its totals, and how many units it had."""
    return sweep_whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def impatient(monkeypatch):
    """Waits for a scheduler and for workers shortly, to save the time."""
    client, wait_for_workers = distributed.Client, distributed.Client.wait_for_workers

    def connect(address, **options):
        return client(address, **options | {"timeout": "1s"})

    monkeypatch.setattr(
        client,
        "wait_for_workers",
        lambda self, count, timeout=None: wait_for_workers(self, count, timeout=0.5),
    )
    monkeypatch.setattr(distributed, "Client", connect)


# --- what comes back -----------------------------------------------------------------------------


def test_a_sweep_comes_to_the_same_totals_as_without_a_cluster(machines, whole, tmp_path):
    result = in_process(*arguments_of(tmp_path), "--scheduler", machines[0])
    assert result.exit_code == 0, result.output
    assert totals_of(tmp_path) == whole[1]


def test_a_campaign_falsifies_on_a_cluster_and_shrinks_there(machines, tmp_path):
    address, _ = machines
    files = ("--json", tmp_path / "o.json", "--witnesses", tmp_path / "w")
    arguments = ("--max-time", "30s", "--continue-on-failure", "--scheduler", address)
    result = in_process("fuzz", target_in(tmp_path), *TWO, *arguments, *files)
    assert result.exit_code == 1, result.output
    entries = properties_of(tmp_path / "o.json")
    for name in (SHAPE, FIELD):
        case = entries[name]["counterexample"]["case"]
        assert (case["channels"], case["num_blocks"], case["kernel_sizes"]) == (1, 1, [3])
    assert len(list((tmp_path / "w").iterdir())) == 2


# --- what goes wrong -----------------------------------------------------------------------------


def test_a_worker_that_is_killed_loses_no_unit(machines, whole, tmp_path):
    (address, workers), (_, expected, units) = machines, whole
    arguments = arguments_of(tmp_path, target_in(tmp_path, SLOW, "Slow"))
    left = []

    def kill():
        wait_for(lambda: len(lines_of(tmp_path / "state")) > 2, *workers)
        left.append(units + 1 - len(lines_of(tmp_path / "state")))
        os.kill(workers[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    result = in_process(*arguments, "--scheduler", address)
    killer.join()
    assert left and left[0] > 2  # it was killed in mid-run
    assert workers[0].wait(timeout=10) == -signal.SIGKILL
    assert result.exit_code == 0, result.output
    assert totals_of(tmp_path) == expected
    tags = [json.loads(line)["unit"] for line in lines_of(tmp_path / "state")[1:]]
    assert len(tags) == len(set(tags)) == units


def test_a_scheduler_that_goes_away_is_no_verdict(whole, tmp_path):
    address, scheduler, workers = started(tmp_path, 1)
    arguments = arguments_of(tmp_path, target_in(tmp_path, SLOW, "Slow"))

    def end():
        wait_for(lambda: lines_of(tmp_path / "state"), scheduler)
        scheduler.kill()

    killer = threading.Thread(target=end)
    killer.start()
    try:
        with within(60):
            result = in_process(*arguments, "--scheduler", address)
    finally:
        killer.join()
        stop(scheduler, *workers)
    assert result.exit_code == 2, result.output
    assert in_process(*arguments).exit_code == 0
    assert totals_of(tmp_path) == whole[1]


def test_a_unit_without_a_journal_says_nothing_about_how_long_it_has_been_running(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    os.utime(tmp_path, (0, 0))
    assert hanging(unit.Unit(WIDTHS, STACK, Search()), 15.0) is None


@pytest.mark.parametrize(
    ("seconds", "verdict"), [(2, None), (8, NOTHING_ASSERTED), (40, UNFINISHED)]
)
def test_for_how_long_the_last_case_has_been_running_is_said_if_it_is_long(
    tmp_path, seconds, verdict
):
    journal = tmp_path / "journal"
    journal.write_text("")
    began = time.time() - seconds
    os.utime(journal, (began, began))
    found = hanging(unit.Unit(WIDTHS, STACK, Search(), journal=str(journal)), 30.0)
    assert (found and found.verdict) == verdict
    assert verdict is None or f"had been running for {seconds} s" in found.reason


@pytest.mark.filterwarnings("ignore:Port .* is already in use")
def test_workers_of_several_threads_are_refused():
    with (
        distributed.LocalCluster(
            processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None
        ) as local,
        pytest.raises(ClusterError, match=r"several threads.*dask worker --nthreads 1"),
    ):
        Cluster(local.scheduler_address)


def test_without_a_scheduler_at_the_address_there_is_one_line(impatient):
    address = "tcp://127.0.0.1:1"
    result = in_process("fuzz", STACK, "-k", "shape_dtype", "--scheduler", address)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: --scheduler {address}: ")
    assert result.stdout == ""


def test_a_scheduler_without_workers_is_refused(impatient, tmp_path):
    address, scheduler, _ = started(tmp_path, 0)
    with pytest.raises(ClusterError, match="no workers there"):
        Cluster(address)
    stop(scheduler)


def test_without_the_extra_it_is_said_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(cluster.importlib, "import_module", missing)
    with pytest.raises(ClusterError, match=r"pip install 'rescnn-verify\[cluster\]'"):
        Cluster("tcp://127.0.0.1:1")
