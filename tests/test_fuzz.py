"""Fuzzing: which cases are tried, how a campaign ends, and what it hands over."""

import errno
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from rescnn_verify import campaign, cli_campaigns, engine, fuzz
from rescnn_verify.case import Case
from rescnn_verify.cli import main
from rescnn_verify.corpus import Corpus, Kept
from rescnn_verify.fuzz import Campaign, FuzzPlan
from rescnn_verify.outcome import FALSIFIED, HELD
from rescnn_verify.statement import find_property
from rescnn_verify.unit import target_of
from rescnn_verify.witness import Witness
from rescnn_verify.workers import Here
from tests.test_cli import ROOT, run

STACK = "rescnn:ResCNNStack"
SHAPE, WIDTHS = "shape.shape_dtype_and_device_are_kept", "split.widths_sum_to_channels"
FIELD = "receptive_field.claimed_field_is_the_formula"
TWO = ("-k", "shape_dtype or claimed_field")

#: Wrong in two ways: the field that it claims, and the length of what it returns.
WRONG = """
from rescnn import ResCNNStack


class Wrong(ResCNNStack):
    def get_receptive_field(self):
        return 0

    def forward(self, x):
        return super().forward(x)[..., 1:]
"""


def in_process(*arguments):
    """A command whose units run in this process, so that no worker has to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli_campaigns, "Processes", lambda count: Here())
        return CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)


def target_in(folder, source=WRONG, name="Wrong"):
    """A target from source, named so that every process finds it."""
    (folder / "target.py").write_text(source)
    return f"{folder / 'target.py'}:{name}"


def properties_of(file):
    """The properties in the ``--json`` file of a run, by name."""
    return {entry["name"]: entry for entry in json.loads(file.read_text())["properties"]}


@contextmanager
def recorded(seconds=0.0):
    """The trials that searches in this process try, each with its property; none is run."""
    tried = []

    def record(prop, target, trial, tally=None, journal=None):
        time.sleep(seconds)
        tally.cases += len(trial)
        tally.assertions += 1
        tried.append((prop.name, tuple(trial)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "run_trial", record)
        yield tried


def rounds_of(*names, rounds=1, **plan):
    """The cases of a campaign's first rounds, in order, each with its property."""
    plan = FuzzPlan(**{"target": STACK, "properties": names, "seconds": 60, "seed": 0} | plan)
    cases = []
    with recorded() as tried:
        for event in Campaign(plan).run(Here()):
            if event.round > rounds:
                return cases
            cases += [(name, case) for name, trial in tried for case in trial]
            tried.clear()
    raise AssertionError("the campaign ended")


def cases_of_a_run(*arguments):
    """The cases of a command."""
    with recorded() as tried:
        result = in_process("fuzz", *arguments)
    assert result.exit_code == 0, result.output
    return {case for _, trial in tried for case in trial}


def chosen_anew(cases):
    """The cases that are not the simplest or the documented one, whose seed is 0."""
    return {case for case in cases if case.seed}


# --- which cases are tried -----------------------------------------------------------------------


def test_every_run_without_a_seed_tries_other_cases_also_in_ci(tmp_path):
    script = (
        "from tests.test_fuzz import cases_of_a_run\n"
        "for _ in range(2):\n"
        "    cases = cases_of_a_run('-k', 'shape_dtype', '--max-time', '1s')\n"
        "    print(*(case.dumps() for case in cases), sep='\\n', end='\\n\\n')\n"
    )
    environment = {**os.environ, "CI": "true", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    one, another = (
        {Case.from_json(json.loads(line)) for line in part.splitlines()}
        for part in result.stdout.strip().split("\n\n")
    )
    assert min(len(chosen_anew(one)), len(chosen_anew(another))) > 20
    assert chosen_anew(one & another) == set()


def test_equal_seeds_try_equal_cases_in_the_first_round_and_others_do_not():
    rounds_of(SHAPE, WIDTHS)  # Hypothesis also draws constants of the modules imported so far
    first = rounds_of(SHAPE, WIDTHS, seed=5)
    assert {name for name, _ in first} == {SHAPE, WIDTHS}
    assert rounds_of(SHAPE, WIDTHS, seed=5) == first
    assert len(set(rounds_of(SHAPE, WIDTHS, seed=6)) & set(first)) < len(set(first)) / 2


def test_each_round_tries_cases_that_the_ones_before_did_not():
    cases = rounds_of(SHAPE, rounds=3)
    assert len(set(cases)) > 0.8 * len(cases)
    assert len(cases) > 3 * len(rounds_of(SHAPE))


def test_shards_try_different_cases():
    parts = [set(rounds_of(SHAPE, rounds=3, shard=(index, 3))) for index in range(3)]
    documented = {(SHAPE, case) for _, case in set.union(*parts) if case.channels == 512}
    for index, part in enumerate(parts):
        assert len(part) > 100
        for other in parts[:index]:
            assert part & other <= documented


def test_the_seeds_of_a_shard_are_its_number_modulo_the_number_of_shards():
    for index in range(3):
        cases = rounds_of(SHAPE, shard=(index, 3))
        large = [case.seed for _, case in cases if case.seed > 1000]
        assert len(large) > 10
        assert {seed % 3 for seed in large} == {index}


@pytest.mark.parametrize("shard", [(0, 1), (0, 3), (1, 3), (2, 3)])
@pytest.mark.parametrize("seeds", [[7, 9], "7..12"], ids=str)
def test_a_users_space_is_never_left_whatever_the_shard(seeds, shard):
    data = {"space": {"channels": [4, 6], "kernel_sizes": [[3]], "seed": seeds, "length": 5}}
    space = find_property(SHAPE).space_for(target_of(STACK, data))
    cases = rounds_of(SHAPE, rounds=2, shard=shard, space=data)
    assert {case.channels for _, case in cases} == {4, 6}
    assert [case for _, case in cases if case not in space] == []


def test_a_corpus_runs_before_anything_else_and_what_failed_comes_first(tmp_path):
    corpus = Corpus.read(tmp_path)
    for seed, why in ((1, "corner"), (2, "tight"), (3, "failed"), (4, "corner")):
        corpus.add(Kept(SHAPE, (Case(seed=seed, length=9),), why))
    cases = rounds_of(SHAPE, first=Corpus.read(tmp_path).trials())
    seeds = [case.seed for _, case in cases[:4]]
    assert seeds[:2] == [3, 2]
    assert sorted(seeds) == [1, 2, 3, 4]
    assert len(cases) > 50


def test_every_kept_case_runs_however_long_they_take(monkeypatch):
    monkeypatch.setattr(fuzz, "SLICE", 0.05)
    first = {SHAPE: tuple((Case(seed=seed),) for seed in range(1000, 1030))}
    with recorded(seconds=0.02) as tried:
        list(Campaign(FuzzPlan(STACK, (SHAPE,), 1.5, 0, first=first)).run(Here()))
    seeds = {case.seed for _, trial in tried for case in trial}
    assert seeds >= set(range(1000, 1030))


def test_a_kept_case_that_is_not_to_be_run_here_is_not_run():
    kept = (
        Case(channels=8, seed=11),  # outside of the user's space
        Case(channels=4, seed=12, device="cuda"),  # of another machine
        Case(channels=4, seed=13),
    )
    first = {SHAPE: tuple((case,) for case in kept)}
    cases = rounds_of(SHAPE, first=first, space={"space": {"channels": [4]}})
    assert [case.seed for _, case in cases if case.seed in (11, 12, 13)] == [13]


def test_the_kept_case_of_a_stack_does_not_falsify_a_block(tmp_path):
    corpus = Corpus.read(tmp_path / "c")
    corpus.add(Kept(FIELD, (Case(num_blocks=3, length=20),), "corner"))
    arguments = ("-k", "claimed_field", "--max-time", "1s", "--witnesses", tmp_path / "w")
    result = in_process("fuzz", "rescnn:ResCNNBlock", *arguments, "--corpus", tmp_path / "c")
    assert result.exit_code == 0, result.output


# --- how a campaign ends -------------------------------------------------------------------------


@pytest.mark.parametrize("keep_going", [False, True])
def test_a_falsification_ends_the_run_unless_it_is_to_go_on(keep_going, tmp_path):
    option = ["--continue-on-failure"] * keep_going
    files = ("--json", tmp_path / "o.json", "--witnesses", tmp_path / "w")
    result = in_process("fuzz", target_in(tmp_path), *TWO, "--max-time", "30s", *files, *option)
    assert result.exit_code == 1, result.output
    verdicts = [entry["verdict"] for entry in properties_of(tmp_path / "o.json").values()]
    assert verdicts.count(FALSIFIED) == 1 + keep_going
    assert len(list((tmp_path / "w").iterdir())) == 1 + keep_going


def test_a_campaign_that_falsified_everything_ends_before_its_budget(tmp_path):
    plan = FuzzPlan(target_in(tmp_path), (SHAPE, FIELD), 3600.0, 0, keep_going=True)
    fuzzing = Campaign(plan)
    events = list(fuzzing.run(Here()))
    assert [event.outcome.verdict for event in events] == [FALSIFIED, FALSIFIED]
    assert [outcome.name for outcome in fuzzing.outcomes] == [SHAPE, FIELD]


def test_a_result_that_comes_after_the_time_is_up_still_counts(monkeypatch):
    monkeypatch.setattr(campaign, "GRACE", 0.0)
    fuzzing = Campaign(FuzzPlan(STACK, (SHAPE,), 0.05, 0))
    with recorded(seconds=0.3) as tried:
        list(fuzzing.run(Here()))
    (outcome,) = fuzzing.outcomes
    assert outcome.cases == sum(len(trial) for _, trial in tried) > 0
    assert outcome.verdict == HELD


def test_the_run_of_a_right_target_ends_within_its_time_and_five_seconds(tmp_path):
    start = time.monotonic()
    result = run("fuzz", "-k", "shape_dtype", "--max-time", "6s", "-n", "2", cwd=tmp_path)
    seconds = time.monotonic() - start
    assert result.returncode == 0, result.stdout + result.stderr
    assert 5 < seconds < 6 + 5


SLOW_TO_SHRINK = """
import time
from pathlib import Path
from rescnn import ResCNNStack


class Wrong(ResCNNStack):
    def get_receptive_field(self):
        return 0

    def forward(self, x):
        x = super().forward(x)
        if x.shape[1] < 3:
            return x
        with Path(__file__).with_name("calls").open("a") as file:
            file.write("x")
        time.sleep(0.5)
        return x[..., 1:]
"""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The folder of a run that got Ctrl-C while a second falsification shrank, and its process."""
    folder = tmp_path_factory.mktemp("interrupted")
    target = target_in(folder, SLOW_TO_SHRINK)
    files = ("--json", "o.json", "--corpus", "corpus")
    arguments = (*TWO, "--max-time", "60s", "-n", "2", "--continue-on-failure", *files)
    process = subprocess.Popen(
        [sys.executable, "-m", "rescnn_verify", "fuzz", target, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    calls, give_up = folder / "calls", time.monotonic() + 50
    while not (calls.exists() and calls.stat().st_size > 1 and _kept(folder, FIELD)):
        assert process.poll() is None and time.monotonic() < give_up, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    output = process.communicate(timeout=30)
    return folder, subprocess.CompletedProcess(process.args, process.returncode, *output)


def _kept(folder, name):
    return list((folder / "corpus").glob(f"{name}-*.json"))


def test_an_interrupted_run_hands_over_what_it_found(interrupted):
    folder, process = interrupted
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    assert f"falsified: {FIELD}" in process.stdout
    entry = properties_of(folder / "o.json")[FIELD]
    assert entry["verdict"] == FALSIFIED
    assert (folder / entry["counterexample"]["witness"]).is_file()


def test_what_was_being_shrunk_when_it_was_interrupted_is_handed_over_too(interrupted):
    folder, _ = interrupted
    entry = properties_of(folder / "o.json")[SHAPE]
    assert entry["verdict"] == FALSIFIED
    assert (folder / entry["counterexample"]["witness"]).is_file()


def test_an_interrupted_run_that_found_nothing_exits_with_2(tmp_path, monkeypatch):
    calls = []

    def interrupt(prop, target, trial, tally, journal):
        tally.assertions += 1
        calls.append(trial)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(engine, "run_trial", interrupt)
    files = ("--json", tmp_path / "o.json", "--witnesses", tmp_path / "w")
    result = in_process("fuzz", "-k", "shape_dtype", "--max-time", "60s", *files)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "error: interrupted; what was found until then is above"
    )
    assert properties_of(tmp_path / "o.json")[SHAPE]["assertions"] >= 3


# --- what cannot be written ----------------------------------------------------------------------


def test_a_full_disk_is_warned_of_and_the_falsifications_are_shown(tmp_path, monkeypatch):
    def full(self, text, *arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = target_in(tmp_path)
    monkeypatch.setattr(Path, "write_text", full)
    folders = ("--corpus", tmp_path / "c", "--witnesses", tmp_path / "w")
    result = in_process(
        "fuzz", target, *TWO, "--max-time", "30s", "--continue-on-failure", *folders
    )
    assert result.exit_code == 1, result.output
    for name in (SHAPE, FIELD):
        assert f"falsified: {name}" in result.stdout
    assert result.stdout.count("reproduce(") == 2
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning")]
    assert warnings == [
        f"warning: cannot write witnesses to {tmp_path / 'w'}: No space left on device",
        f"warning: corpus {tmp_path / 'c'}: OSError: [Errno 28] No space left on device",
    ]


def test_a_witness_folder_that_cannot_be_made_is_warned_of(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "w"
    arguments = ("-k", "claimed_field", "--max-time", "30s", "--witnesses", folder)
    result = in_process("fuzz", target_in(tmp_path), *arguments)
    assert result.exit_code == 1, result.output
    assert f"warning: cannot write witnesses to {folder}: Not a directory" in result.stderr
    assert f"falsified: {FIELD}" in result.stdout


def test_a_corpus_that_cannot_be_read_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with recorded() as tried:
        result = in_process("fuzz", "-k", "shape_dtype", "--corpus", tmp_path / "file" / "c")
    assert result.exit_code == 2
    assert result.stderr == f"error: corpus {tmp_path / 'file' / 'c'}: Not a directory\n"
    assert tried == []


def test_a_damaged_file_in_the_corpus_is_warned_of_and_the_others_run(tmp_path):
    corpus = Corpus.read(tmp_path)
    corpus.add(Kept(SHAPE, (Case(seed=77, length=9),), "failed"))
    (tmp_path / "damaged.json").write_text("{")
    with recorded() as tried:
        result = in_process("fuzz", "-k", "shape_dtype", "--max-time", "1s", "--corpus", tmp_path)
    assert result.exit_code == 0, result.output
    assert f"warning: corpus: {tmp_path / 'damaged.json'}: " in result.stderr
    assert "it is left as it is" in result.stderr
    assert tried[0] == (SHAPE, (Case(seed=77, length=9),))


# --- what a run reports --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The JSON, the JUnit root and the output of a run on a target that is wrong in one way."""
    folder = tmp_path_factory.mktemp("reported")
    target = target_in(folder, WRONG.replace("[..., 1:]", ""))
    expression = "output_is_finite or claimed_field or export_is"
    arguments = ("--max-time", "2s", "--continue-on-failure", "--witnesses", folder / "w")
    files = ("--json", folder / "o.json", "--junit", folder / "j.xml")
    result = in_process("fuzz", target, "-k", expression, "--seed", "3", *arguments, *files)
    assert result.exit_code == 1, result.output
    data = json.loads((folder / "o.json").read_text())
    return data, ElementTree.parse(folder / "j.xml").getroot(), result.stdout


def test_json_says_what_was_covered_and_discarded_and_what_follows(reported):
    data, _, _ = reported
    held = [entry for entry in data["properties"] if entry["verdict"] == "held"]
    assert held
    for entry in held:
        assert entry["cases"] >= entry["architectures"] > 0
        assert 0 < entry["pairs"]["met"] <= entry["pairs"]["possible"]
        assert entry["discarded"] >= 0
        assert 0 < entry["failure_rate_below"] < 1
    (wrong,) = (entry for entry in data["properties"] if entry["verdict"] == FALSIFIED)
    assert wrong["name"] == FIELD
    assert wrong["failure_rate_below"] is None
    assert (data["seed"], data["shard"], data["max_time"]) == (3, "1/1", 2.0)


def test_junit_has_a_case_for_each_property_and_counts_them(reported):
    data, suite, _ = reported
    cases = suite.findall("testcase")
    names = {f"{case.get('classname')}.{case.get('name')}" for case in cases}
    assert names == {entry["name"] for entry in data["properties"]}
    verdicts = [entry["verdict"] for entry in data["properties"]]
    assert int(suite.get("tests")) == len(cases) == len(verdicts)
    assert int(suite.get("failures")) == len(suite.findall(".//failure")) == 1
    assert verdicts.count("not run") == 1  # what is slow
    quiet = verdicts.count("not run") + verdicts.count("not applicable")
    assert int(suite.get("skipped")) == len(suite.findall(".//skipped")) == quiet
    assert int(suite.get("errors")) == len(suite.findall(".//error")) == 0
    assert "reproduce(" in suite.find(".//failure").text


def test_a_run_that_compared_nothing_is_no_success(tmp_path):
    with recorded() as tried, pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "run_trial", lambda *arguments: tried.append(arguments))
        result = in_process("fuzz", "-k", "shape_dtype", "--max-time", "1s")
    assert tried
    assert result.exit_code == 2
    assert "nothing asserted" in result.stdout


# --- replay --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A wrong target, and the corpus and witnesses of its run, copied to another folder."""
    folder, elsewhere = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    target = target_in(folder)
    folders = ("--corpus", folder / "corpus", "--witnesses", folder / "witnesses")
    result = in_process("fuzz", target, "-k", "shape_dtype", "--max-time", "30s", *folders)
    assert result.exit_code == 1, result.output
    for name in ("corpus", "witnesses"):
        shutil.move(folder / name, elsewhere / name)
    return target, elsewhere


@pytest.fixture
def elsewhere(copied, monkeypatch):
    monkeypatch.chdir(copied[1])
    return copied[1]


def test_a_copied_witness_is_reproduced_in_a_fresh_process(copied):
    result = run("replay", "witnesses", cwd=copied[1])
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"reproduced: {SHAPE}" in result.stdout
    assert "expected  (1, 1, 1)" in result.stdout
    assert "got       (1, 1, 0)" in result.stdout


@pytest.mark.parametrize("place", ["file", "folder", "id", "id of another folder"])
def test_a_witness_is_found_by_its_file_its_folder_or_its_id(place, elsewhere):
    (witness,) = Path("witnesses").iterdir()
    number = witness.stem.rpartition("-")[2]
    shutil.copytree("witnesses", "others", dirs_exist_ok=True)
    places = {
        "file": [witness],
        "folder": ["witnesses"],
        "id": [number],
        "id of another folder": [number, "--witnesses", "others"],
    }
    result = in_process("replay", *places[place])
    assert result.exit_code == 1, result.output
    assert result.stdout.count(f"reproduced: {SHAPE}") == 1


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("0000000000", "is no file, no folder and no ID of a witness in witnesses"),
        ("corpus", "has no 'before'"),
    ],
)
def test_what_is_no_witness_is_refused(place, said, elsewhere):
    result = in_process("replay", place)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_script_of_a_witness_ends_with_what_differs(elsewhere):
    result = in_process("replay", "--script", "witnesses")
    assert result.exit_code == 0
    Path("script.py").write_text(result.stdout)
    with pytest.raises(SystemExit) as ended:  # with a text, which is exit code 1
        runpy.run_path("script.py")
    assert "expected (1, 1, 1), got (1, 1, 0)" in ended.value.code


def test_the_script_of_a_witness_that_is_not_reproduced_says_so(elsewhere, capsys):
    result = in_process("replay", "--script", "witnesses", "--target", STACK)
    Path("right.py").write_text(result.stdout)
    runpy.run_path("right.py")
    assert capsys.readouterr().out == "not reproduced\n"


@pytest.mark.parametrize(
    ("what", "target"),
    [
        ('ends with "', "a.py:b"),
        ('quotes """ within', "a.py:b"),
        ("ends with \\", "a.py:b"),
        ("plain", r"C:\new\users\model.py:b"),
    ],
)
def test_a_script_is_python_whatever_its_texts_hold(what, target):
    witness = Witness(SHAPE, target, (Case(),), what, "1", "2")
    compile(witness.script(), "script.py", "exec")


def test_a_copied_corpus_falsifies_with_its_first_case(copied, tmp_path):
    target, folder = copied
    arguments = ("-k", "shape_dtype", "--max-time", "30s", "--witnesses", tmp_path / "w")
    files = ("--json", tmp_path / "o.json", "--corpus", folder / "corpus")
    result = in_process("fuzz", target, *arguments, *files)
    assert result.exit_code == 1, result.output
    assert properties_of(tmp_path / "o.json")[SHAPE]["cases"] == 1
