"""The journal: what a process was about to do is on disk, whatever ends the process."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rescnn_verify.case import Case
from rescnn_verify.journal import Entry, Journal, last_entry

ROOT = Path(__file__).resolve().parents[1]
A, B, C = (Case(channels=4, length=length) for length in (1, 2, 3))
ODD = Case(
    kernel_sizes=(5, 3),
    options=(("groups", 2), ("norm", "grüp\n\u2028")),
    extra=(("value", math.inf), ("zeroed", ("a", 1))),
)


def entries(path):
    """The lines of a journal as data."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def line_of(case, index=0):
    """The line of a case in a journal."""
    return json.dumps({"case": case.to_json(), "index": index}) + "\n"


def in_a_process(path, *lines, case_timeout=0.0):
    """What a process returns that runs some lines with an open journal, and all it prints."""
    body = "\n".join(f"    {line}" for line in lines)
    script = (
        "import ctypes, os, time\n"
        "from pathlib import Path\n"
        "from rescnn_verify.case import Case\n"
        "from rescnn_verify.journal import Journal\n"
        f"with Journal.open(Path({str(path)!r}), {case_timeout}) as journal:\n{body}\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


# --- writing -------------------------------------------------------------------------------------


def test_a_case_is_on_disk_before_it_runs(tmp_path):
    path = tmp_path / "journal"
    with Journal.open(path) as journal, journal.running(A, 0):
        assert [entry["case"] for entry in entries(path)] == [A.to_json()]
        assert last_entry(path) == Entry((A,), None, timed_out=False)


def test_the_cases_of_a_trial_are_remembered_until_another_trial_begins(tmp_path):
    path = tmp_path / "journal"
    steps = [(A, 0, (A,)), (B, 1, (A, B)), (C, 2, (A, B, C)), (C, 0, (C,)), (A, 1, (C, A))]
    with Journal.open(path) as journal:
        for case, index, trial in steps:
            with journal.running(case, index):
                assert last_entry(path) == Entry(trial, None, timed_out=False)
        assert len(entries(path)) == len(steps)


def test_a_counterexample_is_on_disk_before_anything_is_tried_with_it(tmp_path):
    path = tmp_path / "journal"
    with Journal.open(path) as journal:
        with journal.running(A, 0):
            pass
        journal.found([A], "length", "1", "2")
        texts = {"what": "length", "expected": "1", "got": "2"}
        assert last_entry(path) == Entry((A,), ((A,), texts), timed_out=False)


def test_what_was_found_is_remembered_while_other_cases_run(tmp_path):
    path = tmp_path / "journal"
    with Journal.open(path) as journal:
        journal.found([A, B], "it", "this", "that")
        with journal.running(C, 0):
            entry = last_entry(path)
    assert entry.trial == (C,)
    assert entry.found == ((A, B), {"what": "it", "expected": "this", "got": "that"})


def test_the_last_counterexample_found_counts(tmp_path):
    path = tmp_path / "journal"
    with Journal.open(path) as journal, journal.running(A, 0):
        journal.found([C], "it", "3", "x")
        journal.found([A], "it", "1", "y")
        assert last_entry(path).found == ((A,), {"what": "it", "expected": "1", "got": "y"})


@pytest.mark.parametrize("text", ["two\nlines", "\u2028 and \x85 and \r", 'a "quote"', "\ud800"])
def test_any_text_is_one_line_and_comes_back(tmp_path, text):
    path = tmp_path / "journal"
    with Journal.open(path) as journal, journal.running(A, 0):
        journal.found([A], text, text, text)
        assert len(path.read_text().splitlines()) == 2
        assert last_entry(path).found[1] == {"what": text, "expected": text, "got": text}


def test_a_case_with_options_and_infinities_comes_back(tmp_path):
    path = tmp_path / "journal"
    with Journal.open(path) as journal, journal.running(ODD, 0):
        assert last_entry(path).trial == (ODD,)


def test_the_file_is_gone_after_the_work_is_done(tmp_path):
    path = tmp_path / "journal"
    with Journal.open(path) as journal, journal.running(A, 0):
        assert path.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_new_journal_begins_anew(tmp_path):
    path = tmp_path / "journal"
    path.write_text(line_of(C))
    with Journal.open(path):
        assert last_entry(path) is None


def test_where_no_journal_can_be_written_the_work_goes_on_without(tmp_path):
    path, ran = tmp_path / "no folder" / "journal", []
    with Journal.open(path) as journal:
        with journal.running(A, 0):
            ran.append(A)
        journal.found([A], "it", "this", "that")
    assert ran == [A]
    assert last_entry(path) is None


# --- what ends a process -------------------------------------------------------------------------


def test_a_process_that_ends_leaves_its_last_case(tmp_path):
    path = tmp_path / "journal"
    code, output = in_a_process(
        path,
        "with journal.running(Case(channels=4, length=1), 0):",
        "    pass",
        "with journal.running(Case(channels=4, length=2), 0):",
        "    os._exit(7)",
    )
    assert code == 7, output
    assert last_entry(path) == Entry((B,), None, timed_out=False)


@pytest.mark.parametrize(
    "hang",
    [
        pytest.param("time.sleep(60)", id="asleep"),
        pytest.param("ctypes.PyDLL(None).sleep(60)", id="holding the interpreter's lock"),
    ],
)
def test_a_case_that_takes_too_long_ends_its_process_and_the_journal_says_so(tmp_path, hang):
    path = tmp_path / "journal"
    code, output = in_a_process(
        path,
        "journal.found([Case(channels=4, length=3)], 'it', 'this', 'that')",
        "with journal.running(Case(channels=4, length=1), 0):",
        "    pass",
        "with journal.running(Case(channels=4, length=2), 1):",
        f"    {hang}",
        case_timeout=0.5,
    )
    assert code != 0, output
    found = (C,), {"what": "it", "expected": "this", "got": "that"}
    assert last_entry(path) == Entry((A, B), found, timed_out=True)


def test_the_time_between_cases_is_not_limited(tmp_path):
    path = tmp_path / "journal"
    code, output = in_a_process(
        path,
        "with journal.running(Case(), 0):",
        "    pass",
        "try:",
        "    with journal.running(Case(), 0):",
        "        raise ArithmeticError",
        "except ArithmeticError:",
        "    pass",
        "time.sleep(1.5)",
        case_timeout=1.0,
    )
    assert code == 0, output
    assert not path.exists()


def test_a_journal_is_kept_without_torch(tmp_path):
    code, output = in_a_process(
        tmp_path / "journal", "import sys", "raise SystemExit('torch' in sys.modules)"
    )
    assert code == 0, output


# --- reading -------------------------------------------------------------------------------------


def test_the_last_whole_line_counts_wherever_the_last_one_is_cut(tmp_path):
    path = tmp_path / "journal"
    line = line_of(B, 1)
    for length in range(len(line) - 1):
        path.write_text(line_of(A) + line[:length])
        assert last_entry(path) == Entry((A,), None, timed_out=False), length
    path.write_text(line_of(A) + line)
    assert last_entry(path).trial == (A, B)


def test_a_line_that_was_cut_does_not_hide_those_after_it(tmp_path):
    path = tmp_path / "journal"
    path.write_text(f"{line_of(A)[:20]}\n{line_of(B)}")
    assert last_entry(path).trial == (B,)


def test_a_cut_character_does_not_hide_the_lines_before(tmp_path):
    path = tmp_path / "journal"
    path.write_bytes(line_of(A).encode() + b'{"case":"\xc3')
    assert last_entry(path).trial == (A,)


def test_last_words_after_the_last_case_are_no_case(tmp_path):
    path = tmp_path / "journal"
    words = 'Timeout (0:00:01)!\nThread 0x00 (most recent call first):\n  File "x.py", line 1 in f'
    path.write_text(f"{line_of(A)}{words}\n")
    assert last_entry(path) == Entry((A,), None, timed_out=True)


@pytest.mark.parametrize(
    "content",
    [b"", b"\n\n", b"no journal at all", b'{"case":{"chan', b"\x00\xff\xfe" * 99, b"Timeout!"],
    ids=["empty", "blank", "text", "cut", "bytes", "last words only"],
)
def test_a_file_that_holds_no_case_says_nothing(tmp_path, content):
    path = tmp_path / "journal"
    path.write_bytes(content)
    assert last_entry(path) is None


def test_a_file_that_is_not_there_says_nothing(tmp_path):
    assert last_entry(tmp_path / "journal") is None
    assert last_entry(tmp_path) is None


@pytest.mark.parametrize("text", ["5", "[]", "{}", "null", '{"case":{},"index":0}'])
def test_json_that_is_no_entry_says_nothing(tmp_path, text):
    (tmp_path / "journal").write_text(text)
    assert last_entry(tmp_path / "journal") is None
