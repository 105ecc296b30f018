"""Campaigns in several processes: what ends one is falsified, and nothing is lost or accused."""

import json
import math
import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import BrokenExecutor, Future
from dataclasses import replace
from pathlib import Path

import pytest

from rescnn_verify import alone
from rescnn_verify.campaign import run_units
from rescnn_verify.case import Case
from rescnn_verify.engine import Search
from rescnn_verify.outcome import FALSIFIED, HELD, QUIET, UNFINISHED
from rescnn_verify.unit import Unit
from rescnn_verify.witness import Witness
from rescnn_verify.workers import Here, Processes

SHAPE = "shape.shape_dtype_and_device_are_kept"
QUICK = Search(sampled=4, drawn=1, shrinking=1.0)
#: Many processes until nothing smaller ends one; the space is small, so it ends before its time.
ENDING = Search(sampled=9, shrinking=60.0)
#: Seconds after which a case is a hang.
TIMEOUT = 2.0
#: One small architecture; what varies is the target's own fault.
PLAIN = {
    "channels": 4,
    "kernel_sizes": [[3]],
    "num_blocks": 1,
    "dropout": 0.0,
    "batch": 1,
    "length": 8,
    "dtype": "float32",
    "layout": "contiguous",
    "mode": "eval",
    "seed": 0,
}

TARGETS = """
import ctypes, os, time
from rescnn import ResCNNStack

class Crashes(ResCNNStack):
    def forward(self, x):
        if x.shape[2] > 40:
            ctypes.string_at(0)
        return super().forward(x)

class Exits(ResCNNStack):
    def forward(self, x):
        if x.shape[0] == 5:
            os._exit(3)
        return super().forward(x)

class Hangs(ResCNNStack):
    def forward(self, x):
        if x.shape[1] == 6:
            time.sleep(600)
        return super().forward(x)
"""


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """The file of targets that end their process."""
    file = tmp_path_factory.mktemp("targets") / "targets.py"
    file.write_text(TARGETS)
    return file


def unit(target, *, tag="", search=QUICK, **space):
    """A unit that runs a target in a space like the plain one."""
    return Unit(SHAPE, target, search, space={"space": {**PLAIN, **space}}, tag=tag)


RIGHT = unit("rescnn:ResCNNStack", length="1..20")


def ending(targets):
    """The units that end their process: by a crash, an exit and a hang."""
    crash = unit(f"{targets}:Crashes", tag="crash", search=ENDING, length="38..46")
    leave = unit(f"{targets}:Exits", tag="exit", search=ENDING, batch=[3, 5])
    hang = unit(f"{targets}:Hangs", tag="hang", search=ENDING, channels=[8, 6])
    return crash, leave, replace(hang, case_timeout=TIMEOUT)


# --- units that end their process ----------------------------------------------------------------


@pytest.fixture(scope="module")
def campaign(targets):
    """The units of one campaign, and what came of them: faults among right ones."""
    units = []
    for i, bad in enumerate(ending(targets)):
        units += [replace(RIGHT, tag=f"right {i}", seed=i), bad]
    units.append(replace(RIGHT, tag="right last"))
    with Processes(2) as crew:
        return units, list(run_units(iter(units), crew))


def test_every_unit_has_one_outcome(campaign):
    units, done = campaign
    assert Counter(unit.tag for unit, _ in done) == {unit.tag: 1 for unit in units}


def test_units_beside_those_that_end_their_process_are_held(campaign):
    _, done = campaign
    right = {unit.tag: outcome for unit, outcome in done if unit.tag.startswith("right")}
    assert {tag: outcome.verdict for tag, outcome in right.items()} == dict.fromkeys(right, HELD)
    assert all(outcome.sampled == QUICK.sampled for outcome in right.values())
    assert len(right) == 4


@pytest.mark.parametrize(
    ("tag", "how", "smallest"),
    [
        ("crash", "killed by SIGSEGV", {"length": 41}),
        ("exit", "exit code 3", {"batch": 5}),
        ("hang", "no answer within 2 s", {"channels": 6}),
    ],
)
def test_what_ends_its_process_is_falsified_with_its_smallest_case(campaign, tag, how, smallest):
    [outcome] = [outcome for unit, outcome in campaign[1] if unit.tag == tag]
    assert (outcome.verdict, outcome.ended) == (FALSIFIED, True)
    assert (outcome.expected, outcome.got) == ("it returns", how)
    assert outcome.what == "the process that runs the target"
    plain = Case(channels=4, batch=1, length=8)
    assert outcome.trial == (replace(plain, **smallest),)


@pytest.mark.parametrize("tag", ["crash", "exit", "hang"])
def test_the_case_shows_it_again_in_a_process_of_its_own(campaign, tag):
    [(bad, outcome)] = [(unit, outcome) for unit, outcome in campaign[1] if unit.tag == tag]
    witness = Witness(
        bad.name, bad.target, outcome.trial, outcome.what, outcome.expected, outcome.got, alone=True
    )
    again = alone.replay_alone(witness, case_timeout=TIMEOUT)
    assert (again.what, again.expected, again.got) == (
        outcome.what, outcome.expected, outcome.got
    )  # fmt: skip


def test_a_case_that_ends_no_process_is_not_shown_again(targets):
    witness = Witness(SHAPE, f"{targets}:Crashes", (Case(length=40),), "", "", "", alone=True)
    assert alone.replay_alone(witness) is None


def test_of_a_trial_only_what_ends_the_process_is_kept(targets):
    """The cases before are not what ended it, and the ones after never ran."""
    trial = tuple(Case(channels=4, length=length) for length in (39, 45, 46))
    bad = replace(ending(targets)[0], search=replace(ENDING, trials=(trial,)))
    with Processes(1) as crew:
        [(_, outcome)] = run_units(iter([bad]), crew)
    assert [case.length for case in outcome.trial] == [41]


#: Wrong once; from then on what is wrong does something else.
WRONG_ONCE = """
import os, time
from pathlib import Path
from rescnn import ResCNNStack

FOUND = Path(__file__).with_name("found")

class Wrong(ResCNNStack):
    def forward(self, x):
        if x.shape[2] <= 20:
            return super().forward(x)
        if FOUND.exists():
            {then}
        FOUND.touch()
        return super().forward(x)[:, :, 1:]
"""


def wrong_once(folder, then):
    """A unit whose first case falsifies, and which shrinks for a minute."""
    (folder / "wrong.py").write_text(WRONG_ONCE.format(then=then))
    search = Search(trials=((Case(channels=4, length=30),),), shrinking=60.0)
    return unit(f"{folder}/wrong.py:Wrong", tag="wrong", search=search, length="1..60")


HANGS_ONCE = """
import time
from pathlib import Path
from rescnn import ResCNNStack

SEEN = Path(__file__).with_name("seen")

class HangsOnce(ResCNNStack):
    def forward(self, x):
        if not SEEN.exists():
            SEEN.touch()
            time.sleep(600)
        return super().forward(x)
"""


def test_a_hang_that_does_not_come_again_accuses_nobody(tmp_path):
    (tmp_path / "once.py").write_text(HANGS_ONCE)
    search = Search(trials=((Case(channels=4, length=8),),))
    bad = replace(unit(f"{tmp_path}/once.py:HangsOnce", search=search), case_timeout=TIMEOUT)
    with Processes(1) as crew:
        [(_, outcome)] = run_units(iter([bad]), crew)
    assert (tmp_path / "seen").exists()
    assert (outcome.verdict, outcome.cases) == (HELD, 1)


# --- a worker that is ended from outside ---------------------------------------------------------

VICTIM = """
import os, time
from pathlib import Path
from rescnn import ResCNNStack

PID = Path(__file__).with_name("pid")

class Victim(ResCNNStack):
    def forward(self, x):
        if not PID.exists():
            PID.with_suffix(".new").write_text(str(os.getpid()))
            PID.with_suffix(".new").rename(PID)
            time.sleep(600)
        return super().forward(x)
"""


def test_a_worker_that_is_killed_from_outside_loses_no_unit_and_accuses_nobody(tmp_path):
    (tmp_path / "victim.py").write_text(VICTIM)
    pid = tmp_path / "pid"
    stop = threading.Event()

    def kill():
        while not pid.exists():
            if stop.wait(0.02):
                return
        os.kill(int(pid.read_text()), signal.SIGKILL)

    units = [replace(RIGHT, tag="before"), unit(f"{tmp_path}/victim.py:Victim", tag="victim")]
    units += [replace(RIGHT, tag=f"right {i}", seed=i) for i in range(3)]
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with Processes(2) as crew:
            done = list(run_units(iter(units), crew))
    finally:
        stop.set()
        killer.join()
    assert pid.exists()
    assert Counter(unit.tag for unit, _ in done) == {unit.tag: 1 for unit in units}
    assert {outcome.verdict for _, outcome in done} == {HELD}
    assert {outcome.cases > 0 for _, outcome in done} == {True}


class Breaking:
    """A crew of two whose first worker ends at once in a given case; the other one is never done.

    After it is restarted, it runs units in this process.
    """

    together = True
    size = 2
    lost = (BrokenExecutor,)

    def __init__(self, case):
        self.case, self.begun, self.restarted = case, [], 0

    def submit(self, run, text):
        begun, future = Unit.loads(text), Future()
        if self.restarted:
            future.set_result(run(text))
        elif not self.begun:
            Path(begun.journal).write_text(json.dumps({"case": self.case.to_json(), "index": 0}))
            future.set_exception(BrokenExecutor())
        self.begun.append(begun.tag)
        return future

    def restart(self):
        self.restarted += 1

    def gone(self):
        return None

    def kill(self):
        """Nothing runs."""


def test_what_ran_beside_the_culprit_runs_again(targets):
    crew = Breaking(Case(channels=4, length=41))
    units = [ending(targets)[0], replace(RIGHT, tag="right")]
    verdicts = {u.tag: o.verdict for u, o in run_units(iter(units), crew)}
    assert verdicts == {"crash": FALSIFIED, "right": HELD}
    assert crew.begun == ["crash", "right", "right"]
    assert crew.restarted == 1


def test_where_there_is_no_culprit_each_unit_runs_alone():
    crew = Breaking(Case(channels=4, length=8))
    units = [replace(RIGHT, tag=tag) for tag in ("one", "two", "three")]
    done = [(u.tag, o.verdict) for u, o in run_units(iter(units), crew)]
    assert sorted(done) == [("one", HELD), ("three", HELD), ("two", HELD)]
    assert crew.begun == ["one", "two", "three"]


class Refusing(Breaking):
    """A crew of two: the first unit is under way when the second one finds that a worker ended."""

    def submit(self, run, text):
        if self.restarted or not self.begun:
            future = Future()
            if self.restarted:
                future.set_result(run(text))
            self.first = future
            self.begun.append(Unit.loads(text).tag)
            return future
        self.first.set_exception(BrokenExecutor())
        raise BrokenExecutor


def test_a_unit_that_a_broken_crew_does_not_take_is_not_lost():
    crew = Refusing(Case())
    units = [replace(RIGHT, tag=tag) for tag in ("one", "two", "three")]
    done = [(u.tag, o.verdict) for u, o in run_units(iter(units), crew)]
    assert sorted(done) == [("one", HELD), ("three", HELD), ("two", HELD)]
    assert sorted(crew.begun) == ["one", "three", "two"]


def test_the_crew_works_on_after_a_worker_has_ended(targets):
    smallest = Case(channels=4, batch=5, length=1)
    bad = replace(ending(targets)[1], search=Search(trials=((smallest,),)))
    with Processes(1) as crew:
        for found in ([bad], [RIGHT], [bad, RIGHT]):
            verdicts = [outcome.verdict for _, outcome in run_units(iter(found), crew)]
            assert verdicts == [FALSIFIED if unit is bad else HELD for unit in found]


# --- a unit in a process of its own --------------------------------------------------------------


def test_a_unit_alone_has_the_outcome_that_it_has_here():
    [(_, here)] = run_units(iter([RIGHT]), Here())
    there = alone.run_alone(RIGHT, math.inf)
    assert replace(there, seconds=here.seconds) == here


@pytest.mark.parametrize(
    ("name", "how"),
    [("Crashes", "killed by SIGSEGV"), ("Exits", "exit code 3"), ("Hangs", "no answer within 2 s")],
)
def test_how_a_process_ended_is_said_with_the_cases_that_had_begun(targets, name, how):
    bad = Case(channels=6, batch=5, length=50)
    trial = (Case(channels=6, length=2), bad, bad)
    if name == "Hangs":
        trial = (bad, bad)
    search = Search(trials=((Case(),), trial))
    ended = alone.run_alone(
        Unit(SHAPE, f"{targets}:{name}", search, case_timeout=TIMEOUT), math.inf
    )
    assert ended == alone.Ended(how, trial[:-1], cut_off=False)


def test_what_a_unit_alone_had_found_is_kept_if_its_process_ends(tmp_path):
    outcome = alone.run_alone_to_the_end(wrong_once(tmp_path, "os._exit(9)"), math.inf)
    assert (outcome.verdict, outcome.ended) == (FALSIFIED, False)
    assert (outcome.expected, outcome.got) == ("(1, 4, 30)", "(1, 4, 29)")


def test_a_process_that_is_cut_off_is_nobodys_fault(targets):
    hanging = Unit(SHAPE, f"{targets}:Hangs", Search(trials=((Case(channels=6),),)))
    ended = alone.run_alone(hanging, 0.5)
    assert (ended.how, ended.cut_off) == ("no answer within 0.5 s", True)
    outcome = alone.run_alone_to_the_end(hanging, time.monotonic())
    assert outcome.verdict == UNFINISHED
    assert outcome.verdict not in QUIET


# --- time ----------------------------------------------------------------------------------------


def test_when_the_time_is_up_nothing_is_begun():
    units = iter([RIGHT])
    assert list(run_units(units, Here(), until=lambda: time.monotonic() - 1.0)) == []
    assert next(units) is RIGHT


def test_a_unit_is_taken_only_when_a_worker_is_free_for_it():
    taken, free = [], []

    def units():
        for i in range(4):
            taken.append(i)
            yield replace(RIGHT, tag=str(i))

    for _ in run_units(units(), Here()):
        free.append(list(taken))
    assert free == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]


def test_what_comes_next_may_depend_on_what_came_before():
    seen = []

    def units():
        yield RIGHT
        yield replace(RIGHT, seed=seen[0].cases)

    for _, outcome in run_units(units(), Here()):
        seen.append(outcome)
    assert len(seen) == 2


def test_when_the_time_is_up_what_was_found_is_kept_though_shrinking_would_go_on(tmp_path):
    """The second call that is wrong never returns: the process is ended while it shrinks."""
    wrong, found = wrong_once(tmp_path, "time.sleep(600)"), tmp_path / "found"
    begun = []

    def until():
        """Half a second after the counterexample was found."""
        if not begun and found.exists():
            begun.append(time.monotonic())
        return begun[0] + 0.5 if begun else math.inf

    with Processes(1) as crew:
        done = {u.tag: o for u, o in run_units(iter([RIGHT, wrong]), crew, until=until)}
    outcome = done["wrong"]
    assert (outcome.verdict, outcome.ended) == (FALSIFIED, False)
    assert [case.length for case in outcome.trial] == [30]
    assert outcome.what == "output shape for an input of shape (1, 4, 30)"
    assert (outcome.expected, outcome.got) == ("(1, 4, 30)", "(1, 4, 29)")
    assert done[""].verdict == HELD
    witness = Witness(wrong.name, wrong.target, outcome.trial, outcome.what, "", "")
    found.unlink()
    assert alone.replay_alone(witness).got == outcome.got


def test_what_was_found_is_kept_if_the_process_ends_while_it_shrinks(tmp_path):
    with Processes(1) as crew:
        [(_, outcome)] = run_units(iter([wrong_once(tmp_path, "os._exit(9)")]), crew)
    assert (outcome.verdict, outcome.ended) == (FALSIFIED, False)
    assert (outcome.expected, outcome.got) == ("(1, 4, 30)", "(1, 4, 29)")


class Idle(Breaking):
    """A crew of one whose worker ends between two units."""

    size = 1

    def submit(self, run, text):
        if len(self.begun) == 1 and not self.restarted:
            raise BrokenExecutor
        from concurrent.futures import Future

        future = Future()
        future.set_result(run(text))
        self.begun.append(Unit.loads(text).tag)
        return future


def test_a_worker_that_ends_between_two_units_loses_none():
    crew, limit = Idle(Case()), time.monotonic() + 8.0  # without a limit it would spin for ever
    units = [replace(RIGHT, tag=tag) for tag in ("one", "two", "three")]
    done = [(u.tag, o.verdict) for u, o in run_units(iter(units), crew, until=lambda: limit)]
    assert done == [("one", HELD), ("two", HELD), ("three", HELD)]
