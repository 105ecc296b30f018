"""Known failures and baselines: what they let through, and that they cannot go stale."""

import json
from datetime import date, timedelta

import pytest

from rescnn_verify.case import Case
from rescnn_verify.fuzz import Campaign, FuzzPlan
from rescnn_verify.known import KnownError, read_baseline, read_known, signatures
from rescnn_verify.outcome import FALSIFIED, KNOWN, PROCESS, Outcome, signature
from rescnn_verify.witness import Witness
from rescnn_verify.workers import Here
from tests.test_fuzz import FIELD, SHAPE, STACK, WIDTHS, in_process, properties_of, target_in

LENGTH = "output shape for an input of shape (1, 4, 4)"
AGAINST = "against.outputs_agree_within_both_bounds"

#: An even length comes back one shorter.
SHORTER = """
from rescnn import ResCNNStack


class Wrong(ResCNNStack):
    def forward(self, x):
        out = super().forward(x)
        return out if x.shape[-1] % 2 else out[..., 1:]
"""

#: So it does here, and an odd one comes back in another dtype.
SHORTER_OR_DOUBLE = SHORTER.replace("out if", "out.double() if").replace(
    "% 2 else", "% 2 and len(x) else"
)

#: Up to 8 positions come back one shorter, more of them in another dtype.
SHORT_ARE_SHORTER_AND_LONG_DOUBLE = SHORTER.replace("% 2", "> 8").replace(
    "out if", "out.double() if"
)


def witness_of(name, target, case, what, expected="", got=""):
    return Witness(name, target, (case,), what, expected, got)


def shorter(target, length=4):
    """The witness of an even length that comes back one shorter."""
    case = Case(length=length)
    return witness_of(SHAPE, target, case, LENGTH, f"(1, 4, {length})", f"(1, 4, {length - 1})")


def listed(folder, *witnesses, **more):
    """A file of known failures that lists each of the witnesses."""
    entries = []
    for witness in witnesses:
        path = witness.write(folder / "known")
        lines = [f'property = "{witness.name}"', f'witness = "known/{path.name}"']
        lines += [f"{key} = {value}" for key, value in ({"reason": '"a bug"'} | more).items()]
        entries.append("\n".join(["[[known]]", *lines]))
    (folder / "known.toml").write_text("\n\n".join(entries))
    return folder / "known.toml"


def fuzzed(folder, target, *arguments, expression="shape_dtype", seconds="30s"):
    """The result of a run, and its properties by name; a run that holds takes all its time."""
    files = ("--json", folder / "o.json", "--witnesses", folder / "w")
    result = in_process("fuzz", target, "-k", expression, "--max-time", seconds, *files, *arguments)
    return result, properties_of(folder / "o.json")


# --- mistakes in the file ------------------------------------------------------------------------

GOOD = f'property = "{WIDTHS}"\nwitness = "good.json"\nreason = "a bug"\n'

MISTAKES = {
    "no property": ('witness = "good.json"\nreason = "x"', ["property is missing"]),
    "no witness": (f'property = "{WIDTHS}"\nreason = "x"', ["witness is missing"]),
    "no reason": (f'property = "{WIDTHS}"\nwitness = "good.json"', ["reason is missing"]),
    "an empty reason": (GOOD.replace("a bug", " "), ["reason = ' '"]),
    "a reason of another type": (GOOD.replace('"a bug"', "5"), ["reason = 5"]),
    "a property of another type": (GOOD.replace(f'"{WIDTHS}"', "[1]"), ["property = [1]"]),
    "a witness of another type": (GOOD.replace('"good.json"', "true"), ["witness = True"]),
    "a link of another type": (GOOD + "link = 5", ["link = 5"]),
    "an unknown key": (GOOD + 'resaon = "x"', ["'resaon'", "property, witness, reason, link"]),
    "an unknown property": (GOOD.replace("widths", "width"), ["property", "split.width_sum"]),
    "a missing witness": (GOOD.replace("good", "gone"), ["witness", "gone.json", "No such file"]),
    "a damaged witness": (GOOD.replace("good", "damaged"), ["witness", "damaged.json", "not JSON"]),
    "a binary witness": (GOOD.replace("good", "binary"), ["witness", "binary.json"]),
    "a witness of another property": (
        GOOD.replace(WIDTHS, SHAPE),
        [f"property = '{SHAPE}'", "witness", f"'{WIDTHS}'"],
    ),
    "a date that is none": (
        GOOD + 'look_again = "soon"',
        ["look_again = 'soon'", "must be a date such as 2030-01-31"],
    ),
    "a date with a time": (
        GOOD + "look_again = 2030-01-31T00:00:00",
        ["look_again = ", "2030", "must be a date such as 2030-01-31"],
    ),
}


@pytest.fixture
def folder(tmp_path):
    """A folder with a witness that is one, and two that are not."""
    witness = witness_of(WIDTHS, STACK, Case(), "branch widths of block 0", "(4,)", "(3,)")
    witness.write(tmp_path).rename(tmp_path / "good.json")
    (tmp_path / "damaged.json").write_text("{")
    (tmp_path / "binary.json").write_bytes(bytes(range(256)))
    return tmp_path


@pytest.mark.parametrize(("entry", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_answered_with_the_entry_the_key_and_the_value(entry, said, folder):
    file = folder / "list.toml"
    file.write_text(f"[[known]]\n{GOOD}\n[[known]]\n{entry}\n")
    with pytest.raises(KnownError) as refused:
        read_known(file)
    text = str(refused.value)
    assert text.startswith(f"{file}, entry 2: ")
    rest = text.removeprefix(f"{file}, entry 2: ").replace(str(folder), "")
    assert [part for part in said if part not in rest] == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[[known]", "is not TOML"),
        (b"\x80\xff", "is not TOML"),
        (b'known = "all"', r"write one table \[\[known\]\] for each"),
        (b"[known]\n", r"write one table \[\[known\]\] for each"),
        (b"known = [3]", r"entry 1: write a table \[\[known\]\]"),
        (b'[[knwon]]\nproperty = "x"', r"write one table \[\[known\]\] for each"),
    ],
)
def test_a_file_that_is_no_list_is_refused_by_its_name(content, said, tmp_path):
    file = tmp_path / "list.toml"
    file.write_bytes(content)
    with pytest.raises(KnownError, match=said) as refused:
        read_known(file)
    assert str(file) in str(refused.value)


def test_a_file_that_is_not_there_is_refused_by_its_name(tmp_path):
    with pytest.raises(KnownError, match=r"cannot read .*gone\.toml: No such file"):
        read_known(tmp_path / "gone.toml")


def test_a_mistake_in_the_file_ends_a_run_with_one_line_before_anything_runs(tmp_path):
    (tmp_path / "known.toml").write_text("[[known]]\n")
    result = in_process("fuzz", "-k", "shape_dtype", "--known", tmp_path / "known.toml")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line == f"error: {tmp_path / 'known.toml'}, entry 1: property is missing"


def test_what_is_written_is_read(folder):
    file = folder / "list.toml"
    file.write_text(f'[[known]]\n{GOOD}link = "https://x.org/1"\nlook_again = 2030-01-31\n')
    (failure,) = read_known(file)
    assert (failure.reason, failure.link) == ("a bug", "https://x.org/1")
    assert failure.look_again == date(2030, 1, 31)
    assert failure.where == f"{file}, entry 1"
    assert signatures([failure]) == {WIDTHS: ("branch widths of block #",)}


def test_several_failures_of_one_property_are_all_known(tmp_path):
    one = witness_of(SHAPE, STACK, Case(), "output dtype", "a", "b")
    another = witness_of(SHAPE, STACK, Case(seed=1), "output device", "cpu", "cuda")
    known = read_known(listed(tmp_path, one, another))
    assert signatures(known) == {SHAPE: ("output dtype", "output device")}


def test_an_empty_file_lists_nothing(tmp_path):
    (tmp_path / "known.toml").write_text("# nothing yet\n")
    assert read_known(tmp_path / "known.toml") == ()


# --- what two failures share ---------------------------------------------------------------------


def test_failures_are_alike_when_only_numbers_differ():
    one = signature("output shape for an input of shape (1, 4, 4)", "(1, 4, 3)")
    assert one == signature("output shape for an input of shape (128, 31, -1.5e-06)", "()")
    assert one != signature("output dtype", "torch.float64")
    two = signature("forward on float32 of shape (1, 2, 3)", "3")
    assert two == signature("forward on bfloat16 of shape (1, 2)", "4")


def test_exceptions_are_alike_when_they_are_of_one_type():
    one = signature("the target's code", "ValueError: 3 is too small")
    assert one == signature("the target's code", "ValueError: something else")
    assert one != signature("the target's code", "IndexError: 3 is too small")
    assert one != signature("the target's code", "3")


# --- runs with a list ----------------------------------------------------------------------------


def test_a_known_failure_does_not_fail_the_run_and_is_reported(tmp_path):
    target = target_in(tmp_path, SHORTER)
    known = listed(tmp_path, shorter(target))
    result, entries = fuzzed(tmp_path, target, "--known", known, seconds="1s")
    assert result.exit_code == 0, result.output
    assert entries[SHAPE]["verdict"] == "known failure"
    assert entries[SHAPE]["known"] > 0
    assert entries[SHAPE]["counterexample"] is None
    assert entries[SHAPE]["failure_rate_below"] is None
    assert f"{entries[SHAPE]['known']} cases failed as a known failure does" in result.stdout
    assert not (tmp_path / "w").exists()


def test_without_the_list_the_same_failure_fails_the_run(tmp_path):
    result, entries = fuzzed(tmp_path, target_in(tmp_path, SHORTER))
    assert result.exit_code == 1
    assert entries[SHAPE]["verdict"] == "falsified"


def test_a_fixed_one_fails_the_run_until_it_is_removed(tmp_path):
    known = listed(tmp_path, shorter(STACK))
    result, entries = fuzzed(tmp_path, STACK, "--known", known, seconds="1s")
    assert result.exit_code == 1
    assert entries[SHAPE]["verdict"] == "held"
    line = f"{known}, entry 1: fixed, remove it: {SHAPE} holds for its witness"
    assert line in result.stdout.splitlines()
    assert json.loads((tmp_path / "o.json").read_text())["complaints"] == [line]


def test_each_of_several_entries_is_examined_on_its_own(tmp_path):
    target = target_in(tmp_path, SHORTER)
    known = listed(tmp_path, shorter(target), shorter(target, length=5))
    result, _ = fuzzed(tmp_path, target, "--known", known, seconds="1s")
    assert result.exit_code == 1
    complaints = json.loads((tmp_path / "o.json").read_text())["complaints"]
    assert complaints == [f"{known}, entry 2: fixed, remove it: {SHAPE} holds for its witness"]


def test_a_known_end_of_the_process_does_not_fail_the_run():
    class Ending(Here):
        def submit(self, run, unit):
            found = {"what": PROCESS, "expected": "it returns", "got": "exit code 3"}
            outcome = Outcome(FIELD, FALSIFIED, "exact", trial=(Case(),), ended=True, **found)
            return super().submit(lambda _: json.dumps(outcome.to_json()), unit)

    for known, verdict in (((signature(PROCESS, "exit code 3"),), KNOWN), ((), FALSIFIED)):
        campaign = Campaign(FuzzPlan(STACK, (FIELD,), 30.0, 0, known={FIELD: known}))
        assert [event.outcome.verdict for event in campaign.run(Ending())] == [verdict]
        assert [outcome.verdict for outcome in campaign.outcomes] == [verdict]


def test_another_failure_of_the_same_property_is_still_found(tmp_path):
    target = target_in(tmp_path, SHORTER_OR_DOUBLE)
    known = listed(tmp_path, shorter(target))
    result, entries = fuzzed(tmp_path, target, "--known", known)
    assert result.exit_code == 1, result.output
    assert entries[SHAPE]["counterexample"]["what"] == "output dtype"
    assert entries[SHAPE]["counterexample"]["case"]["length"] % 2 == 1


def test_a_new_failure_does_not_shrink_to_the_known_one(tmp_path):
    target = target_in(tmp_path, SHORT_ARE_SHORTER_AND_LONG_DOUBLE)
    known = listed(tmp_path, shorter(target))
    result, entries = fuzzed(tmp_path, target, "--known", known)
    assert result.exit_code == 1, result.output
    assert entries[SHAPE]["counterexample"]["what"] == "output dtype"
    assert entries[SHAPE]["counterexample"]["case"]["length"] == 9


def test_a_failure_of_another_property_is_still_found(tmp_path):
    target = target_in(tmp_path, SHORTER + "\n    get_receptive_field = lambda self: 0\n")
    known = listed(tmp_path, shorter(target))
    expression = "shape_dtype or claimed_field"
    result, entries = fuzzed(tmp_path, target, "--known", known, expression=expression)
    assert result.exit_code == 1
    assert entries[FIELD]["verdict"] == "falsified"


def test_one_that_fails_in_another_way_fails_the_run(tmp_path):
    target = target_in(tmp_path, SHORTER)
    case = Case(length=4)
    known = listed(tmp_path, witness_of(SHAPE, target, case, "output dtype", "float32", "float64"))
    result, _ = fuzzed(tmp_path, target, "--known", known)
    assert result.exit_code == 1
    assert "entry 1: it fails in another way now: output shape for an input" in result.stdout


def test_one_whose_property_does_not_apply_to_the_target_fails_the_run(tmp_path):
    (tmp_path / "target.py").write_text(
        "from rescnn import ResCNNStack\n"
        "from rescnn_verify import Target\n"
        "bare = Target(build=lambda config: ResCNNStack(config.channels, 1, (3,), 0.0))\n"
    )
    target = f"{tmp_path / 'target.py'}:bare"
    witness = witness_of(WIDTHS, target, Case(), "branch widths of block 0", "(4,)", "(3,)")
    result, _ = fuzzed(
        tmp_path,
        target,
        "--known",
        listed(tmp_path, witness),
        expression="shape_dtype or widths_sum",
        seconds="1s",
    )
    assert result.exit_code == 1
    assert f"entry 1: matches nothing, remove it: {WIDTHS} is not applicable" in result.stdout


def test_one_that_compares_two_implementations_fails_the_run_of_a_single_one(tmp_path):
    witness = witness_of(AGAINST, STACK, Case(), "output")
    known = listed(tmp_path, witness)
    expression = "shape_dtype or outputs_agree"
    result, _ = fuzzed(tmp_path, STACK, "--known", known, expression=expression, seconds="1s")
    assert result.exit_code == 1
    assert "entry 1: matches nothing, remove it" in result.stdout


def test_one_whose_property_is_not_selected_is_not_examined(tmp_path):
    target = target_in(tmp_path, SHORTER)
    known = listed(tmp_path, shorter(target, length=5))
    result, _ = fuzzed(tmp_path, target, "--known", known, expression="widths_sum", seconds="1s")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("days", "warned"), [(-1, True), (0, True), (1, False)])
def test_from_its_day_on_there_is_a_warning_with_the_reason_and_the_link(days, warned, tmp_path):
    target = target_in(tmp_path, SHORTER_OR_DOUBLE)  # which ends the run at once
    day = date.today() + timedelta(days)
    known = listed(tmp_path, shorter(target), link='"https://x.org/1"', look_again=day)
    result, _ = fuzzed(tmp_path, target, "--known", known)
    line = f"warning: {known}, entry 1: to be looked at again on {day}: a bug https://x.org/1"
    assert (line in result.stderr.splitlines()) == warned
    assert ("warning" in result.stderr) == warned


# --- baselines -----------------------------------------------------------------------------------


def test_what_an_earlier_run_found_does_not_fail_and_what_is_new_does(tmp_path):
    target = target_in(tmp_path, SHORTER)
    first, _ = fuzzed(tmp_path, target)
    assert first.exit_code == 1
    (tmp_path / "o.json").rename(tmp_path / "before.json")
    baseline = ("--baseline", tmp_path / "before.json")
    for _ in range(2):
        again, entries = fuzzed(tmp_path, target, *baseline, seconds="1s")
        assert again.exit_code == 0, again.output
        assert entries[SHAPE]["verdict"] == "known failure"
        baseline = ("--baseline", (tmp_path / "o.json").rename(tmp_path / "after.json"))
    (tmp_path / "new").mkdir()
    other = target_in(tmp_path / "new", SHORTER_OR_DOUBLE)
    new, entries = fuzzed(tmp_path, other, *baseline)
    assert new.exit_code == 1
    assert entries[SHAPE]["counterexample"]["what"] == "output dtype"


def test_what_is_in_one_of_two_lists_does_not_fail(tmp_path):
    target = target_in(tmp_path, SHORTER_OR_DOUBLE)
    before = {"properties": [{"name": SHAPE, "signatures": ["output dtype"]}]}
    (tmp_path / "before.json").write_text(json.dumps(before))
    both = ("--baseline", tmp_path / "before.json", "--known", listed(tmp_path, shorter(target)))
    result, entries = fuzzed(tmp_path, target, *both, seconds="1s")
    assert result.exit_code == 0, result.output
    assert entries[SHAPE]["verdict"] == "known failure"
    assert len(entries[SHAPE]["signatures"]) == 2


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{}", b'{"properties": [{}]}', b'{"properties": 3}', b"\x80"]
)
def test_a_baseline_that_is_none_is_refused_by_its_name(content, tmp_path):
    (tmp_path / "o.json").write_bytes(content)
    with pytest.raises(KnownError, match=r"o.json is not the --json file of a run"):
        read_baseline(tmp_path / "o.json")


def test_a_baseline_that_is_not_there_ends_a_run_with_one_line(tmp_path):
    result = in_process("fuzz", "-k", "shape_dtype", "--baseline", tmp_path / "gone.json")
    assert result.exit_code == 2
    file = tmp_path / "gone.json"
    assert result.stderr == f"error: cannot read {file}: No such file or directory\n"
