"""Sweeping: every case once, whatever ends the run in between."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from rescnn_verify import engine
from rescnn_verify.case import Case
from rescnn_verify.outcome import FALSIFIED, HELD, NOT_APPLICABLE, NOT_RUN, NOTHING_ASSERTED
from rescnn_verify.sweep import CHUNK, Sweep, SweepError, SweepPlan
from rescnn_verify.workers import Here
from tests.test_cli import ROOT
from tests.test_fuzz import (
    FIELD,
    SHAPE,
    STACK,
    WIDTHS,
    in_process,
    properties_of,
    recorded,
    target_in,
)

SPACE = {
    "channels": "1..6",
    "num_blocks": [1, 2],
    "kernel_sizes": {"allowed": [1, 3], "branches": "1..3"},
    "dropout": 0.0,
}
#: Lists of one, two and three kernels of two sizes, with at least one channel for each.
CONFIGS = [
    (channels, blocks, kernels)
    for branches in (1, 2, 3)
    for kernels in itertools.product((1, 3), repeat=branches)
    for channels in range(1, 7)
    for blocks in (1, 2)
    if channels >= branches
]
FILE = """
channels = "1..6"
num_blocks = [1, 2]
kernel_sizes = {allowed = [1, 3], branches = "1..3"}
dropout = 0.0
"""

#: As slow as the environment says.
SLOW = """
import os
import time
from rescnn import ResCNNStack


class Slow(ResCNNStack):
    def __init__(self, *arguments, **options):
        time.sleep(float(os.environ.get("SECONDS_TO_BUILD", 0)))
        super().__init__(*arguments, **options)
"""


def plan_of(*names, target=STACK, space=SPACE, **more):
    return SweepPlan(target, names, space, **more)


def swept(plan, state):
    """The outcomes of a sweep that runs to its end."""
    work = Sweep(plan, state)
    list(work.run(Here()))
    return work.outcomes


def arguments_of(folder, target=STACK, space=FILE, expression="widths_sum or claimed_field"):
    """What a command that sweeps is given."""
    (folder / "space.toml").write_text(space)
    files = ("--state", folder / "state", "--json", folder / "o.json", "--witnesses", folder / "w")
    return ("sweep", target, "--space", folder / "space.toml", "-k", expression, *files)


def totals_of(folder):
    """What must not depend on how often a sweep was ended."""
    keys = ("verdict", "evidence", "cases", "assertions", "architectures", "pairs")
    entries = properties_of(folder / "o.json")
    return {name: {key: entry[key] for key in keys} for name, entry in entries.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The output of a sweep that nothing ended, its totals, and how many units it had."""
    return sweep_whole(tmp_path_factory.mktemp("whole"))


def sweep_whole(folder):
    result = in_process(*arguments_of(folder))
    assert result.exit_code == 0, result.output
    return result.stdout, totals_of(folder), len(lines_of(folder / "state")) - 1


def lines_of(state):
    """The complete lines of a state file."""
    return state.read_text().split("\n")[:-1] if state.exists() else []


# --- every case once -----------------------------------------------------------------------------


def test_a_space_is_exhausted_over_as_many_cases_as_counting_says(whole):
    output, totals, _ = whole
    assert len(CONFIGS) == 2 * (2 * 6 + 4 * 5 + 8 * 4)
    assert output.count(f"exhausted over {len(CONFIGS)} cases") == 2
    assert set(totals) == {WIDTHS, FIELD}
    for entry in totals.values():
        assert entry["verdict"] == HELD
        assert entry["evidence"] == f"exhausted over {len(CONFIGS)} cases"
        assert entry["cases"] == entry["architectures"] == len(CONFIGS)


def test_each_configuration_is_tried_once(tmp_path):
    with recorded() as tried:
        swept(plan_of(WIDTHS), tmp_path / "state")
    cases = [case for _, trial in tried for case in trial]
    expected = [Case(c, blocks, kernels, 0.0) for c, blocks, kernels in CONFIGS]
    assert len(cases) == len(expected)
    assert set(cases) == set(expected)


def test_each_input_of_each_configuration_is_tried_once(tmp_path):
    inputs = {"batch": "0..2", "length": "1..2", "dtype": ["float32", "float64"]}
    space = {"channels": [1, 2], "num_blocks": 1, "kernel_sizes": [[3], [1, 3]], "dropout": 0.0}
    with recorded() as tried:
        (outcome,) = swept(
            plan_of(SHAPE, space=space | inputs | {"layout": "strided", "seed": [3, 5]}),
            tmp_path / "state",
        )
    expected = [
        Case(channels, 1, kernels, 0.0, (), batch, length, dtype, "cpu", "strided", mode, seed)
        for channels, kernels in ((1, (3,)), (2, (3,)), (2, (1, 3)))
        for batch, length, dtype in itertools.product(range(3), (1, 2), ("float32", "float64"))
        for mode, seed in itertools.product(("eval", "train"), (3, 5))
        if mode == "eval" or batch * length > 1
    ]
    cases = [case for _, trial in tried for case in trial]
    assert len(cases) == len(expected) == outcome.cases
    assert set(cases) == set(expected)


def test_without_a_seed_in_the_space_every_seed_is_0(tmp_path):
    space = SPACE | {"channels": 4, "batch": 1, "length": 3, "layout": "strided", "mode": "eval"}
    with recorded() as tried:
        swept(plan_of(SHAPE, space=space), tmp_path / "state")
    assert {case.seed for _, trial in tried for case in trial} == {0}


def test_the_smallest_configurations_come_first(tmp_path):
    with recorded() as tried:
        swept(plan_of(WIDTHS), tmp_path / "state")
    sizes = [case.channels * case.num_blocks for _, trial in tried for case in trial]
    assert sizes[0] == 1
    assert sum(sizes[:CHUNK]) < sum(sizes[-CHUNK:]) / 2


def test_shards_are_disjoint_and_together_complete(tmp_path):
    parts = []
    for index in range(3):
        with recorded() as tried:
            swept(plan_of(WIDTHS, shard=(index, 3)), tmp_path / f"state{index}")
        parts.append([case.config for _, trial in tried for case in trial])
        assert len(parts[-1]) >= CHUNK
    together = list(itertools.chain(*parts))
    assert len(together) == len(set(together)) == len(CONFIGS)


def test_a_property_that_does_not_apply_is_said_not_to_and_the_others_run(tmp_path):
    (tmp_path / "target.py").write_text(
        "from rescnn import ResCNNStack\n"
        "from rescnn_verify import Target\n"
        "bare = Target(build=lambda config: ResCNNStack(config.channels, 1, (3,), 0.0))\n"
    )
    inputs = {"batch": 1, "length": [4, 5], "dtype": "float32", "layout": "strided", "mode": "eval"}
    space = SPACE | {"kernel_sizes": [[3]]} | inputs
    plan = plan_of(WIDTHS, SHAPE, target=f"{tmp_path / 'target.py'}:bare", space=space)
    first, second = swept(plan, tmp_path / "state")
    assert first.verdict == NOT_APPLICABLE
    assert "handles of the blocks" in first.reason
    assert (second.verdict, second.evidence) == (HELD, "exhausted over 24 cases")


# --- falsifications ------------------------------------------------------------------------------

WRONG = """
from rescnn import ResCNNStack


class Wrong(ResCNNStack):
    def get_receptive_field(self):
        return super().get_receptive_field() + (self.blocks[0].branches[0][0].in_channels == 5)
"""


def test_a_falsification_ends_the_sweep_with_its_smallest_case(tmp_path):
    target = target_in(tmp_path, WRONG)
    result = in_process(*arguments_of(tmp_path, target))
    assert result.exit_code == 1, result.output
    entry = properties_of(tmp_path / "o.json")[FIELD]
    case = entry["counterexample"]["case"]
    assert (case["channels"], case["num_blocks"], case["kernel_sizes"]) == (5, 1, [1])
    (witness,) = (tmp_path / "w").iterdir()
    assert in_process("replay", witness).exit_code == 1


def test_after_a_falsification_the_others_go_on_where_that_is_asked_for(tmp_path):
    target = target_in(tmp_path, WRONG)
    names = (FIELD, WIDTHS)
    first, second = swept(plan_of(*names, target=target), tmp_path / "a")
    assert (first.verdict, second.verdict) == (FALSIFIED, NOT_RUN)
    first, second = swept(plan_of(*names, target=target, keep_going=True), tmp_path / "b")
    assert (first.verdict, second.verdict) == (FALSIFIED, HELD)
    assert second.cases == len(CONFIGS)


def test_a_sweep_that_falsified_says_so_again_without_running(tmp_path):
    plan = plan_of(FIELD, target=target_in(tmp_path, WRONG))
    before = swept(plan, tmp_path / "state")
    with recorded() as tried:
        assert swept(plan, tmp_path / "state") == before
    assert tried == []


# --- ended and resumed ---------------------------------------------------------------------------


def test_after_kill_9_the_same_command_loses_nothing_and_counts_nothing_twice(whole, tmp_path):
    _, expected, units = whole
    arguments = arguments_of(tmp_path, target_in(tmp_path, SLOW, "Slow"))
    process = subprocess.Popen(
        [sys.executable, "-m", "rescnn_verify", *map(str, arguments), "-n", "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "SECONDS_TO_BUILD": "0.01"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    give_up = time.monotonic() + 60
    while len(lines_of(tmp_path / "state")) < 4:
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=10)
    done = len(lines_of(tmp_path / "state")) - 1
    assert 3 <= done < units
    assert not (tmp_path / "o.json").exists()
    again = in_process(*arguments)
    assert again.exit_code == 0, again.output
    assert totals_of(tmp_path) == expected
    assert json.loads((tmp_path / "o.json").read_text())["resumed"] == done
    tags = [
        json.loads(line)["unit"] for line in lines_of(tmp_path / "state")[1:] if line[-1] == "}"
    ]
    assert len(tags) == len(set(tags)) == units


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The plan of a small sweep, its finished state file and its outcomes."""
    plan = plan_of(WIDTHS, FIELD, space=SPACE | {"channels": [3, 4]})
    state = tmp_path_factory.mktemp("finished") / "state"
    outcomes = swept(plan, state)
    assert len(lines_of(state)) == 1 + 2 * 3
    return plan, state, outcomes


@pytest.mark.parametrize("kept", ["no line", "a part of the first line", "two lines and a half"])
def test_a_state_file_whose_last_line_is_cut_off_is_resumed(kept, finished, tmp_path):
    plan, state, outcomes = finished
    text = state.read_text()
    first, second, third = (len(line) + 1 for line in lines_of(state)[:3])
    length = {
        "no line": 0,
        "a part of the first line": first // 2,
        "two lines and a half": first + second + third // 2,
    }
    (tmp_path / "state").write_text(text[: length[kept]])
    with recorded() as tried:
        Sweep(plan, tmp_path / "state")
    assert tried == []
    again = swept(plan, tmp_path / "state")
    assert [_counted(outcome) for outcome in again] == [_counted(o) for o in outcomes]
    assert [_counted(o) for o in Sweep(plan, tmp_path / "state").outcomes] == [
        _counted(outcome) for outcome in outcomes
    ]


def _counted(outcome):
    return outcome.name, outcome.verdict, outcome.evidence, outcome.cases, outcome.assertions


@pytest.mark.parametrize("line", ["\0\0\0", "5", "{}", "[1]", '{"unit": "x", "outcome": {}}'])
def test_a_damaged_line_counts_as_not_done(line, finished, tmp_path):
    plan, state, outcomes = finished
    lines = lines_of(state)
    (tmp_path / "state").write_text("\n".join([*lines[:3], line, *lines[4:]]) + "\n")
    work = Sweep(plan, tmp_path / "state")
    assert len(work.done) == len(lines) - 2
    list(work.run(Here()))
    assert [_counted(outcome) for outcome in work.outcomes] == [_counted(o) for o in outcomes]


def test_what_is_done_is_not_run_again(finished, tmp_path):
    plan, state, outcomes = finished
    shutil.copy(state, tmp_path / "state")
    with recorded() as tried:
        assert swept(plan, tmp_path / "state") == outcomes
    assert tried == []
    assert (tmp_path / "state").read_bytes() == state.read_bytes()


def test_a_sweep_under_way_says_how_much_is_left(finished, tmp_path):
    plan, state, _ = finished
    (tmp_path / "state").write_text("\n".join(lines_of(state)[:3]) + "\n")
    first, second = Sweep(plan, tmp_path / "state").outcomes
    assert (first.verdict, first.reason) == (NOT_RUN, "1 of 3 units are still to be run")
    assert (second.verdict, second.reason) == (NOT_RUN, "3 of 3 units are still to be run")


def test_each_outcome_is_on_disk_before_it_is_given(finished, tmp_path):
    plan, _, _ = finished
    for count, _ in enumerate(Sweep(plan, tmp_path / "state").run(Here()), 1):
        assert len(lines_of(tmp_path / "state")) == 1 + count


def test_a_full_disk_ends_the_sweep_and_what_is_done_is_kept(tmp_path, monkeypatch):
    arguments = arguments_of(tmp_path)
    fsync, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    result = in_process(*arguments)
    assert result.exit_code == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    state = tmp_path / "state"
    assert errors == [
        f"error: --state {state}: No space left on device; what was done until then is kept"
    ]
    monkeypatch.setattr(os, "fsync", fsync)
    assert in_process(*arguments).exit_code == 0
    assert {entry["cases"] for entry in totals_of(tmp_path).values()} == {len(CONFIGS)}


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"space": SPACE},
        {"shard": (0, 2)},
        {"properties": (WIDTHS,)},
        {"target": "rescnn:ResCNNBlock"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_state_of_another_sweep_is_refused_and_left_as_it_is(change, finished, tmp_path):
    plan, state, _ = finished
    shutil.copy(state, tmp_path / "state")
    given = {"target": plan.target, "properties": plan.properties, "space": plan.space} | change
    with pytest.raises(SweepError, match="state is the state of another sweep"):
        Sweep(SweepPlan(**given), tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == state.read_bytes()


@pytest.mark.parametrize("content", [b"hello\n", b"\x80\xff\n", b"{}\n", b"[]\n", b"null\n"])
def test_what_is_no_state_file_is_refused_with_one_line_and_left_as_it_is(content, tmp_path):
    arguments = arguments_of(tmp_path)
    (tmp_path / "state").write_bytes(content)
    result = in_process(*arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert str(tmp_path / "state") in line
    assert (tmp_path / "state").read_bytes() == content


def test_a_space_with_real_numbers_is_refused_by_the_factor(tmp_path):
    result = in_process(*arguments_of(tmp_path, space=FILE.replace("0.0", '"0.1..0.5"')))
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "dropout" in line
    assert "the reals from 0.1 to 0.5 cannot all be tried" in line
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("inputs", "factors"),
    [
        ({"batch": "0..2000", "length": "1..9000"}, ("batch", "length")),
        ({"batch": "1..100", "length": "1..100", "seed": "1..100"}, ("batch", "length", "seed")),
    ],
)
def test_a_space_that_is_too_large_is_refused_by_its_largest_factors(inputs, factors, tmp_path):
    with pytest.raises(SweepError, match=r"more than 100,000,000; narrow it") as refused:
        Sweep(plan_of(SHAPE, space=SPACE | inputs), tmp_path / "state")
    for factor in factors:
        assert factor in str(refused.value).partition("narrow it")[2]
    assert not (tmp_path / "state").exists()


def test_a_property_that_compared_nothing_is_no_success(tmp_path, monkeypatch):
    real = engine.run_trial

    def run_trial(prop, *arguments):
        if prop.name != WIDTHS:
            real(prop, *arguments)

    monkeypatch.setattr(engine, "run_trial", run_trial)
    result = in_process(*arguments_of(tmp_path))
    assert result.exit_code == 2
    verdicts = {name: entry["verdict"] for name, entry in totals_of(tmp_path).items()}
    assert verdicts == {FIELD: HELD, WIDTHS: NOTHING_ASSERTED}
