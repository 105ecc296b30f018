"""Timing: what is reported is what the device did, also when the host does not wait for it."""

import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rescnn import ResCNNBlock, ResCNNStack
from rescnn_verify.bench import HOWS, load
from rescnn_verify.bench.cost import flops_of, least_bytes, valid_taps
from rescnn_verify.bench.devices import Cpu, device_named, tensor_floats_allowed
from rescnn_verify.bench.jobs import MOST_JOBS, jobs, prepared
from rescnn_verify.bench.measure import BATCH, Measurement, measure
from rescnn_verify.bench.pairs import AMBIGUOUS, FASTER, SAME, SLOWER, interleaved, judged
from rescnn_verify.space import Choice, Integers, Space, SpaceError
from rescnn_verify.target import Target, contract_target

ROOT = Path(__file__).resolve().parents[1]

STACK = contract_target(ResCNNStack, "stack")
SIZES = pytest.mark.parametrize("true", [20e-6, 200e-6, 2e-3])
LAUNCHES = pytest.mark.parametrize("launches", [1, 42, 200])


class Asynchronous:
    """A device with a clock of its own: calls return at once, and work is done one after the other.

    Time is virtual, so these tests time nothing. A launch keeps the host for 4 µs, an event for
    1 µs and the device for half a microsecond, and to see that the device is idle takes 10 µs. No
    more than 1024 launches wait for the device; the next one keeps the host until one is done.
    """

    name, timer = "fake", "virtual events"

    def __init__(self):
        self.host = self.idle_from = 0.0
        self.waits = 0
        self.done_at = deque([0.0] * 1024, maxlen=1024)

    def launch(self, seconds, cost=4e-6):
        self.host = max(self.host, self.done_at[0]) + cost
        self.idle_from = max(self.idle_from, self.host) + seconds
        self.done_at.append(self.idle_from)

    def run(self, seconds, launches=1):
        for _ in range(launches):
            self.launch(seconds / launches)

    def now(self):
        return self.host

    def mark(self):
        self.launch(0.5e-6, cost=1e-6)
        return self.idle_from

    def wait(self):
        self.waits += 1
        self.host = max(self.host, self.idle_from) + 10e-6

    def seconds(self, start, stop):
        return stop - start

    def hold(self, seconds):
        self.run(max(30e-6, seconds))

    def peak_memory(self, run):
        run()
        return 0

    def describe(self):
        return "virtual"


class Benchmark:
    """What pytest-benchmark does: a timer around the call."""

    def __init__(self, device):
        self.device = device

    def __call__(self, work, *arguments):
        start = self.device.now()
        work(*arguments)
        return self.device.now() - start


# --- measuring -----------------------------------------------------------------------------------


@SIZES
@LAUNCHES
def test_what_is_reported_is_what_the_device_did(true, launches):
    """Also of work that the host enqueues more slowly than the device does it."""
    device = Asynchronous()

    def work(_):
        device.run(true, launches)

    found = measure(device, work, [0, 1, 2], seconds=300 * true)
    assert 1.00 <= found.median / true <= 1.07
    assert min(found.seconds) / true >= 1.00 - 1e-9 and max(found.seconds) / true <= 1.07


@SIZES
def test_the_naive_way_is_off(true):
    device = Asynchronous()
    assert Benchmark(device)(device.run, true) / true < 0.5


@SIZES
@LAUNCHES
def test_what_the_call_costs_its_caller_is_reported_apart(true, launches):
    """It does not grow with the work: the launches of many rounds would block the host."""
    device = Asynchronous()

    def work(_):
        device.run(true, launches)

    found = measure(device, work, [0], seconds=300 * true)
    assert all(math.isclose(seconds, 4e-6 * launches, rel_tol=1e-6) for seconds in found.enqueue)
    least = max(true, 4e-6 * launches) + 10e-6
    assert all(least <= seconds <= least + true / launches + 5e-6 for seconds in found.latency)


def test_the_device_is_waited_for_once_in_a_batch():
    device = Asynchronous()
    found = measure(device, device.run, [1e-3], seconds=0.0, least=2 * BATCH + 1)
    assert len(found.seconds) == 2 * BATCH + 1
    singles = found.warm_up + len(found.latency)
    assert device.waits == 3 + 2 * singles  # three batches, and two waits for each round alone


def test_inputs_take_turns():
    device, seen = Asynchronous(), []

    def work(seconds):
        seen.append(seconds)
        device.run(seconds)

    measure(device, work, [1e-3, 2e-3, 3e-3], seconds=0.1)
    assert all(a != b for a, b in itertools.pairwise(seen))


def test_the_number_of_rounds_follows_the_time_within_its_bounds():
    for seconds, rounds in ((1e-9, 10), (0.05, 50), (10.0, 100)):
        device = Asynchronous()
        found = measure(device, device.run, [1e-3 - 14e-6], seconds=seconds, least=10, most=100)
        assert len(found.seconds) == rounds


def test_noise_is_the_interquartile_range_over_the_median():
    found = Measurement("cpu", "t", (1.0, 2.0, 3.0, 4.0, 5.0), (), (), 0, 0, None)
    assert found.median == 3.0
    assert found.noise == (4.0 - 2.0) / 3.0


def test_a_cpu_says_that_it_is_one():
    found = measure(Cpu(), torch.relu, [torch.ones(10)], seconds=0.0, least=3)
    assert (found.device, found.timer) == ("cpu", "perf_counter")
    assert all(seconds > 0 for seconds in found.seconds)


def test_peak_memory_is_what_tensors_held_at_once():
    x = torch.ones(1000)
    assert Cpu().peak_memory(lambda: x + x) == 4000
    assert Cpu().peak_memory(lambda: (x + x) + (x + x)) == 12000
    assert Cpu().peak_memory(lambda: [x + x, x + x]) == 8000
    assert Cpu().peak_memory(lambda: (x + x).sum() + (x + x).sum()) == 4000 + 4 + 4


# --- the machine ---------------------------------------------------------------------------------


def stat(user: int, steal: int = 0) -> str:
    return f"cpu  {user} 0 0 999 5 0 0 {steal} 0 0\ncpu0 1 1\n"


@pytest.mark.parametrize(
    ("after", "others", "contended"),
    [(stat(1000), 0.0, False), (stat(1080), 0.8, True), (stat(1000, steal=50), 0.5, True)],
)
def test_others_on_the_machine_are_noticed(tmp_path, monkeypatch, after, others, contended):
    file, times = tmp_path / "stat", iter([0.0, 1.0])
    file.write_text(stat(1000))
    monkeypatch.setattr(load, "_STAT", file)
    monkeypatch.setattr(load.os, "sysconf", lambda _: 100)
    monkeypatch.setattr(load.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(load.time, "process_time", lambda: 3.0)
    with load.loads() as found:
        file.write_text(after)
    assert found().others == pytest.approx(others)
    assert found().contended is contended


def test_own_work_is_not_contention(tmp_path, monkeypatch):
    file, times, own = tmp_path / "stat", iter([0.0, 1.0]), iter([3.0, 4.9])
    file.write_text(stat(1000))
    monkeypatch.setattr(load, "_STAT", file)
    monkeypatch.setattr(load.os, "sysconf", lambda _: 100)
    monkeypatch.setattr(load.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(load.time, "process_time", lambda: next(own))
    with load.loads() as found:
        file.write_text(stat(1190))
    assert found().own == pytest.approx(1.9)
    assert not found().contended


def test_where_the_system_does_not_tell_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "_STAT", tmp_path / "nothing")
    with load.loads() as found:
        pass
    assert found() is None


# --- comparing -----------------------------------------------------------------------------------


def noisy(rng, count=200, sigma=0.03, ratio=1.0):
    return [ratio * math.exp(rng.gauss(0, sigma)) for _ in range(count)]


def test_the_same_against_itself_never_alarms():
    rng = random.Random(0)
    verdicts = {judged(noisy(rng)).verdict for _ in range(200)}
    assert verdicts <= {SAME, AMBIGUOUS}


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(0.9, FASTER), (1.0, SAME), (1.1, SLOWER), (0.99, AMBIGUOUS)]
)
def test_a_comparison_says_which_is_faster(ratio, verdict):
    found = judged(noisy(random.Random(1), count=1000, sigma=0.02, ratio=ratio))
    assert found.verdict == verdict
    assert found.low <= ratio <= found.high
    assert verdict in str(found)


def test_too_few_pairs_say_nothing():
    found = judged([0.5] * 5)
    assert (found.verdict, found.low, found.high) == (AMBIGUOUS, 0.0, math.inf)


@pytest.mark.parametrize("count", [15, 16, 40, 101])
def test_the_interval_is_the_narrowest_that_the_sign_test_allows(count):
    """Its ranks are seen by the ratios being their own ranks; α is 10⁻⁴."""
    found = judged([float(rank) for rank in range(1, count + 1)], alpha=1e-4)
    rank = int(found.low)
    assert found.high == count + 1 - rank

    def missed(k: int) -> float:
        return 2 * sum(math.comb(count, i) for i in range(k)) / 2**count

    assert missed(rank) <= 1e-4 < missed(rank + 1)


@pytest.mark.parametrize(("first", "second"), [(1e-4, 2e-4), (3e-3, 3e-3), (2e-5, 1e-5)])
@LAUNCHES
def test_pairs_are_compared_on_the_device(first, second, launches):
    """And not by what the host needs to enqueue them, which is the same for both."""
    device = Asynchronous()
    found = interleaved(
        device,
        lambda _: device.run(first, launches),
        lambda _: device.run(second, launches),
        [0],
        seconds=0.1,
    )
    assert found.ratio == pytest.approx(first / second, rel=0.05)
    assert found.count >= 40


def test_a_comparison_keeps_to_its_time():
    device = Asynchronous()
    interleaved(device, lambda _: device.run(1e-3), lambda _: device.run(5e-2), [0], seconds=20.0)
    assert 18 < device.host < 25


def slower_with_time(device):
    return 1e-3 * (1 + device.host)


def slower_the_second_time(device):
    return 1e-3 * (1.0 if device.waits % 2 else 1.02)


def in_bursts(device):
    return 1e-3 * (1 + (device.waits % 7 == 0))


@pytest.mark.parametrize("takes", [slower_with_time, slower_the_second_time, in_bursts])
@pytest.mark.parametrize("seed", range(5))
def test_a_model_is_not_faster_or_slower_than_itself(takes, seed):
    device, rng = Asynchronous(), random.Random(seed)

    def work(_):
        device.run(takes(device) * math.exp(rng.gauss(0, 0.02)))

    found = interleaved(device, work, work, [0], seconds=2.0)
    assert found.verdict in (SAME, AMBIGUOUS)


def test_work_without_inputs_is_refused():
    with pytest.raises(ValueError, match="at least one input"):
        measure(Asynchronous(), print, [])
    with pytest.raises(ValueError, match="at least one input"):
        interleaved(Asynchronous(), print, print, [])


def test_a_device_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="'cuda:0' is not known; allowed: cpu, cuda"):
        device_named("cuda:0")


# --- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 7, 20])
@pytest.mark.parametrize("kernel", [1, 2, 5, 9])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 4, 1), (2, 0, 1), (3, 9, 2)])
def test_taps_on_padding_are_not_counted(length, kernel, stride, padding, dilation):
    x, weight = torch.ones(1, 1, length), torch.ones(1, 1, kernel)
    if length + 2 * padding < dilation * (kernel - 1) + 1:
        return
    met = F.conv1d(x, weight, stride=stride, padding=padding, dilation=dilation)
    assert valid_taps(length, kernel, stride, padding, dilation, met.shape[2]) == met.sum()


def test_a_block_costs_its_multiply_adds():
    """Kernels 3 and 5 on 10 positions meet 28 and 44; the fusion is 1×1. Twice for each."""
    block, x = ResCNNBlock(6, [3, 5], 0.0).eval(), torch.randn(4, 6, 10)
    forward = 2 * 4 * (3 * 6 * 28 + 3 * 6 * 44 + 6 * 6 * 10)
    with torch.no_grad():
        assert flops_of(lambda: block(x)) == forward

    def both():
        block(x.detach().requires_grad_()).sum().backward()

    assert flops_of(both) == 3 * forward


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_and_grouped_convolutions_cost_what_they_do(groups):
    x = torch.randn(2, 4, 9)
    plain, back = torch.randn(6, 4 // groups, 3), torch.randn(4, 6 // groups, 3)
    products = 2 * 2 * 6 * (4 // groups) * 9 * 3
    assert flops_of(lambda: F.conv1d(x, plain, groups=groups)) == products * 7 // 9
    assert flops_of(lambda: F.conv_transpose1d(x, back, groups=groups)) == products


def test_bytes_are_those_that_nothing_can_avoid():
    norm, x = nn.BatchNorm1d(5), torch.ones(2, 5, 3)
    once = 4 * (30 + 30 + 5 + 5)
    buffers = 4 * (5 + 5) + 8
    assert least_bytes((x, x), norm, backward=False) == once + buffers
    assert least_bytes((x, x), norm, backward=True) == 2 * once + buffers


# --- the grid ------------------------------------------------------------------------------------


def test_the_default_grid_is_the_documented_stack():
    grid = jobs(STACK, None, ["cpu"])
    assert {(job.case.channels, job.case.num_blocks, job.case.length) for job in grid} == {
        (512, 3, 960)
    }
    assert len({job.case.batch for job in grid}) > 1
    assert {(job.case.mode, job.backward) for job in grid} == set(
        itertools.product(("eval", "train"), (False, True))
    )
    assert len({str(job) for job in grid}) == len(grid)


def test_a_space_narrows_the_grid():
    grid = jobs(
        STACK, Space(batch=Choice(2), mode=Choice("eval"), dtype=Choice("float64")), ["cpu"]
    )
    assert {(job.case.batch, job.case.mode, job.case.dtype) for job in grid} == {
        (2, "eval", "float64")
    }
    assert {job.case.channels for job in grid} == {512}


def test_float32_on_cuda_is_timed_without_and_with_tf32():
    grid = [job for job in jobs(STACK, None, ["cuda"]) if job.case.dtype == "float32"]
    assert sum(job.tensor_floats for job in grid) == len(grid) / 2
    assert len({str(job) for job in grid}) == len(grid)


def test_only_forward_passes_on_cuda_are_replayed_from_a_graph():
    grid = jobs(STACK, None, ["cuda", "cpu"], ["graph"])
    assert {(job.case.device, job.backward) for job in grid} == {("cuda", False)}


def test_a_space_with_too_many_cases_is_refused():
    with pytest.raises(SpaceError, match=f"more than {MOST_JOBS} benchmarks"):
        jobs(STACK, Space(length=Integers(1, 200)), ["cpu"])


def test_an_option_without_a_value_is_named():
    space = Space({"option.growth": Choice(1, 2)}, channels=Integers(1, 512))
    own = Target(lambda config: ResCNNStack(config.channels), space=space)
    with pytest.raises(SpaceError, match=r"option growth has no value; name one under \[option\]"):
        jobs(own, None, ["cpu"])


def test_nothing_to_time_is_a_mistake():
    with pytest.raises(SpaceError, match="nothing to time"):
        jobs(STACK, None, ["cpu"], ["graph"])


def test_what_the_target_does_not_promise_is_not_timed():
    block = contract_target(ResCNNBlock, "block")
    assert {job.case.num_blocks for job in jobs(block, None, ["cpu"])} == {1}
    own = replace(STACK, kind="custom", space=Space(channels=Choice(512), dtype=Choice("float32")))
    assert {job.case.dtype for job in jobs(own, None, ["cpu"])} == {"float32"}


def test_names_can_be_chosen_by():
    """What `pytest -k` takes as one word."""
    grid = jobs(STACK, Space(layout=Choice("strided"), dropout=Choice(0.0)), ["cuda"], HOWS)
    for job in grid:
        assert re.fullmatch(r"[\w:+.\-]+", str(job))
        assert json.loads(json.dumps(job.described))["how"] in HOWS


# --- the command ---------------------------------------------------------------------------------

TINY = """
channels = 4
num_blocks = 1
kernel_sizes = [[3]]
length = 16
batch = [1, 2]
dtype = "float32"
"""


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    (folder / "tiny.toml").write_text(TINY)
    return run(folder, "-m", "rescnn_verify", "bench", *arguments)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    # pytest-benchmark measures nothing in what it takes for a worker of pytest-xdist.
    environment = {key: v for key, v in os.environ.items() if not key.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """A run of the grid on all devices against the same model again, and its folder."""
    folder = tmp_path_factory.mktemp("timed")
    done = bench(
        folder, "rescnn:ResCNNStack", "--against", "rescnn:ResCNNStack", "--space", "tiny.toml",
        "--device", "all", "--max-time", "0.05", "--json", "out.json", "--benchmark-autosave",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done, folder


@pytest.fixture
def entries(timed):
    _, folder = timed
    found = json.loads((folder / "out.json").read_text())["benchmarks"]
    return [one for one in found if one["extra_info"]["device"] == "cpu"]


def test_the_json_says_what_was_measured_and_how_near_the_peak_it_came(entries):
    assert len(entries) == 2 * 2 * 2
    for one in entries:
        info = one["extra_info"]
        assert info["timer"] == "perf_counter"
        assert one["stats"]["median"] == pytest.approx(info["median"])
        assert info["percent_of_peak"] == pytest.approx(
            100 * info["flops"] / info["median"] / info["peak"]
        )
        assert info["floor"] == max(info["flops"] / info["peak"], info["bytes"] / info["bandwidth"])
        job = info["job"]
        if not job["backward"]:
            assert info["flops"] == job["batch"] * 2 * (4 * 4 * (3 * 16 - 2) + 4 * 4 * 16)


def test_two_are_compared_in_turn(timed, entries):
    done, _ = timed
    for one in entries:
        pairs = one["extra_info"]["against"]
        assert pairs["low"] <= pairs["ratio"] <= pairs["high"]
        assert pairs["text"] in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_its_benchmarks_are_visibly_skipped(timed):
    done, _ = timed
    assert "no CUDA device" in done.stdout
    assert "8 passed, 16 skipped" in done.stdout


def test_runs_are_stored_compared_and_drawn(timed):
    _, folder = timed
    done = bench(
        folder, "--space", "tiny.toml", "-k", "cpu and 1x4 and eval and not backward",
        "--max-time", "0.01", "--benchmark-compare", "--benchmark-histogram=drawn",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(NOW)" in done.stdout and "(0001_" in done.stdout
    assert list(folder.glob("drawn*.svg"))


def test_a_second_implementation_made_for_eval_mode_is_timed_there(tmp_path):
    done = bench(
        tmp_path, f"{ROOT}/examples/fast.py:fold", "--against", "rescnn:ResCNNStack", "--space",
        "tiny.toml", "-k", "1x4 and not backward", "--max-time", "0.01",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 1 skipped" in done.stdout
    assert "no second implementation in train mode" in done.stdout


def test_a_second_implementation_that_cannot_be_made_fails_in_one_line(tmp_path):
    (tmp_path / "other.py").write_text(
        "from rescnn import ResCNNStack\n"
        "class Other(ResCNNStack):\n"
        "    def load_state_dict(self, *args, **kwargs):\n"
        "        raise RuntimeError('another state_dict')\n"
    )
    done = bench(
        tmp_path, "other.py:Other", "--against", "rescnn:ResCNNStack", "--space", "tiny.toml",
        "-k", "1x4 and eval and not backward", "--max-time", "0.01",
    )  # fmt: skip
    assert done.returncode == 2
    assert "no second implementation: RuntimeError: another state_dict" in done.stdout
    assert "Traceback" not in done.stdout


OWN = """
import pytest
import torch

pytest_plugins = ["rescnn_verify.plugin"]


@pytest.mark.benchmark(group="mine")
def test_mine(device_benchmark):
    found = device_benchmark(torch.relu, [torch.ones(4), torch.ones(4)])
    assert found.device == "cpu"


def test_elsewhere(device_benchmark):
    with pytest.raises(ValueError, match="device 'cuda' is given, and inputs are on cpu"):
        device_benchmark(torch.relu, [torch.ones(4)], device="cuda")
    with pytest.raises(ValueError, match="name the device"):
        device_benchmark(len, ["no tensor"])
    device_benchmark(len, ["no tensor"], device="cpu")
"""


def test_the_fixture_works_in_tests_of_ones_own(tmp_path):
    (tmp_path / "test_own.py").write_text(OWN)
    done = run(
        tmp_path, "-m", "pytest", "-q", "--benchmark-max-time=0.3", "--benchmark-json=out.json"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert found[0]["group"] == "mine"
    assert found[0]["stats"]["rounds"] > 5
    disabled = run(tmp_path, "-m", "pytest", "-q", "--benchmark-disable")
    assert disabled.returncode == 0, disabled.stdout + disabled.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "tpu"], "'tpu' is not one of 'cpu', 'cuda', 'all'"),
        (["nowhere.py:Stack"], "there is no file nowhere.py"),
        (["--space", "nothing.toml"], "there is no file nothing.toml"),
        (["--json", "no/folder/out.json"], "--json no/folder/out.json: there is no folder"),
        (["--how", "faster"], "'faster' is not one of"),
        (["--how", "graph"], "a graph was asked for without CUDA"),
        (["--nonsense"], "there is no option --nonsense"),
        (["a.py:A", "b.py:B"], "a.py:A is one target and b.py:B another"),
        (["-k", "nothing_like_it"], "no benchmark matches"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(tmp_path, arguments, said):
    done = bench(tmp_path, *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert said in line


# --- with a GPU ----------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_cuda
def test_events_tell_how_long_the_device_worked():
    device = device_named("cuda")
    x = [torch.randn(2**26, device="cuda") for _ in range(2)]
    once, twice = (
        measure(device, work, x, seconds=0.2).median
        for work in (lambda x: x.neg(), lambda x: x.neg().neg())
    )
    assert twice / once == pytest.approx(2, rel=0.1)


@needs_cuda
def test_peak_memory_on_the_device_is_what_tensors_held_at_once():
    x = torch.ones(2**20, device="cuda")
    assert device_named("cuda").peak_memory(lambda: (x + x) + (x + x)) == 3 * 2**22


@needs_cuda
@pytest.mark.parametrize("how", HOWS)
def test_every_way_to_run_it_gives_the_same(how):
    space = Space(
        channels=Choice(8), length=Choice(32), batch=Choice(2), dtype=Choice("float64"),
        mode=Choice("eval"),
    )  # fmt: skip
    (job,) = (job for job in jobs(STACK, space, ["cuda"], [how]) if not job.backward)
    model = STACK.build(job.case.config).to("cuda", torch.float64).eval()
    with prepared(job, model, STACK.call) as ready, torch.inference_mode():
        for x in ready.inputs:
            out = ready.work(x)
            if out is not None:
                assert torch.allclose(out, model(x))


@needs_cuda
def test_tf32_is_allowed_within_and_not_after():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    for allowed in (True, False):
        with tensor_floats_allowed(allowed):
            assert torch.backends.cuda.matmul.allow_tf32 is allowed
            assert torch.backends.cudnn.allow_tf32 is allowed
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_could_not_run(tmp_path):
    done = bench(tmp_path, "--device", "cuda")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: --device cuda: this machine has no CUDA device that torch can use"
    )
