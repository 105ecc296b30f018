"""What the commands share: durations, shards, spaces, devices, and how a command ends."""

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest
from click.testing import CliRunner

from rescnn_verify import options
from rescnn_verify.case import Case
from rescnn_verify.cli import main
from rescnn_verify.options import DURATION, SHARD
from rescnn_verify.outcome import FALSIFIED, HELD, INTERNAL_ERROR, NOT_APPLICABLE, Outcome
from rescnn_verify.report import Run

STACK = "rescnn:ResCNNStack"


def ending(capsys, function, *arguments):
    """The one line with which a function ends its command."""
    with pytest.raises(SystemExit) as ended:
        function(*arguments)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line


# --- durations and shards ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("90", 90),
        ("10m", 600),
        ("1h30m", 5400),
        ("1h30m5s", 5405),
        ("1.5h", 5400),
        ("0.5s", 0.5),
        (" 5s ", 5),
    ],
)
def test_a_duration_is_read_in_seconds(text, seconds):
    assert DURATION.convert(text, None, None) == seconds


@pytest.mark.parametrize(
    "text",
    ["", " ", "0", "0s", "0h0m", "-5s", "5x", "s", "1h 30m", "30s1m", "nan", "inf", "1e3s", "ten"],
)
def test_what_is_no_duration_is_refused_with_its_text_and_how_to_write_one(text):
    with pytest.raises(click.BadParameter, match="write 90s, 10m or 1h30m") as refused:
        DURATION.convert(text, None, None)
    assert repr(text) in str(refused.value)


@pytest.mark.parametrize(
    ("text", "shard"), [("1/1", (0, 1)), ("2/4", (1, 4)), ("4/4", (3, 4)), (" 10/12 ", (9, 12))]
)
def test_a_shard_is_counted_from_one_by_people_and_from_zero_inside(text, shard):
    assert SHARD.convert(text, None, None) == shard


@pytest.mark.parametrize(
    "text", ["", "0/4", "5/4", "1/0", "0/0", "1", "1/2/3", "-1/2", "1/-2", "1.5/2", "a/b", "1:2"]
)
def test_what_is_no_shard_is_refused_with_its_text_and_how_to_write_one(text):
    with pytest.raises(click.BadParameter, match="1 ≤ I ≤ N, such as 2/4") as refused:
        SHARD.convert(text, None, None)
    assert repr(text) in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fuzz", "--max-time", "soon"], "'soon' is not a duration"),
        (["fuzz", "--case-timeout", "0s"], "'0s' is not a duration"),
        (["fuzz", "--shard", "3/2"], "'3/2' is not a shard"),
        (["fuzz", "--seed", "-1"], "-1 is not in the range"),
        (["fuzz", "--junit", "no/such/folder/j.xml"], "--junit no/such/folder/j.xml: there is no"),
        (["sweep"], "Missing option '--space'"),
        (["sweep", "--space", "s.toml", "--shard", "0/2"], "'0/2' is not a shard"),
        (
            ["sweep", "--space", "s.toml", "--json", "no/such/o.json"],
            "--json no/such/o.json: there",
        ),
    ],
)
def test_a_wrong_option_gets_one_line_and_exit_code_2_before_anything_runs(
    arguments, said, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line.lower().startswith("error")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not list(tmp_path.iterdir())


# --- spaces, targets, devices --------------------------------------------------------------------


def test_a_space_a_configuration_or_neither_is_what_units_take(tmp_path):
    space, config = tmp_path / "space.toml", tmp_path / "config.toml"
    space.write_text("channels = [2, 4]\n")
    config.write_text("channels = 16\n")
    assert options.space_data(None, None) is None
    assert options.space_data(space, None) == {"space": {"channels": [2, 4]}}
    assert options.space_data(None, config) == {"near": {"channels": 16}}


def test_a_space_and_a_configuration_together_are_refused(tmp_path, capsys):
    line = ending(capsys, options.space_data, tmp_path / "s.toml", tmp_path / "c.toml")
    assert "--space cannot be combined with a configuration" in line


@pytest.mark.parametrize(
    ("text", "said"),
    [("channels = 0", "channels = 0"), ("chanels = 3", "did you mean channels?"), ("[", "TOML")],
)
@pytest.mark.parametrize("option", ["--space", "--config"])
def test_a_mistake_in_a_space_or_configuration_ends_with_its_line(
    option, text, said, tmp_path, capsys
):
    file = tmp_path / "mistaken.toml"
    file.write_text(text)
    pair = (file, None) if option == "--space" else (None, file)
    line = ending(capsys, options.space_data, *pair)
    assert said in line
    assert str(file) in line


def test_a_single_implementation_is_not_asked_what_only_pairs_can_answer():
    target, names = options.selected(STACK, None, None, None)
    assert target == STACK
    assert names
    assert not any(name.startswith("against.") for name in names)


def test_a_pair_is_asked_only_what_compares_two():
    target, names = options.selected(STACK, STACK, None, None)
    assert target == f"{STACK} against {STACK}"
    assert names
    assert all(name.startswith("against.") for name in names)


@pytest.mark.parametrize(
    ("target", "expression", "said"),
    [
        ("rescnn:Nothing", None, "it has ResCNNBlock, ResCNNStack"),
        (STACK, "no_such_property", "selects no property"),
        (STACK, "shape and", "not an expression"),
    ],
)
def test_a_target_or_selection_that_is_none_ends_with_its_line(target, expression, said, capsys):
    assert said in ending(capsys, options.selected, target, None, expression, None)


def test_a_target_that_promises_nothing_in_the_space_ends_with_its_line(tmp_path, capsys):
    file = tmp_path / "custom.py"
    file.write_text(
        "from rescnn import ResCNNStack\n"
        "from rescnn_verify import Choice, Space, Target\n"
        "small = Target(build=lambda config: ResCNNStack(), space=Space(channels=Choice(4)))\n"
    )
    space = {"space": {"channels": [8]}}
    line = ending(capsys, options.selected, f"{file}:small", None, None, space)
    assert "promises nothing in this space" in line
    assert "channels" in line


@pytest.mark.parametrize(
    ("device", "required", "present", "devices"),
    [
        ("cpu", False, False, ("cpu",)),
        ("all", False, False, ("cpu", "cuda")),
        ("cuda", False, True, ("cuda",)),
        ("all", True, True, ("cpu", "cuda")),
    ],
)
def test_the_devices_are_those_that_are_named(device, required, present, devices, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: present)
    assert options.usable_devices(device, required) == devices


@pytest.mark.parametrize(
    ("device", "required", "option"),
    [("cuda", False, "--device cuda"), ("cpu", True, "--require-cuda")],
)
def test_a_device_that_must_be_there_and_is_not_ends_with_the_option(
    device, required, option, monkeypatch, capsys
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert f"{option}: this machine has no" in ending(
        capsys, options.usable_devices, device, required
    )


def test_there_is_a_process_for_each_core_and_one_where_there_is_a_device(monkeypatch):
    monkeypatch.setattr(options, "usable_cores", lambda: 7)
    assert options.default_count("cpu") == 7
    assert options.default_count("cuda") == options.default_count("all") == 1


# --- how a command ends --------------------------------------------------------------------------

FOUND = Outcome(
    "split.widths_sum_to_channels",
    FALSIFIED,
    "exact",
    cases=1,
    assertions=1,
    trial=(Case(channels=3, kernel_sizes=(3, 5)),),
    what="branch widths of block 0",
    expected="(1, 2)",
    got="(2, 1) \x1b[31m<&",
)
OTHERS = (
    Outcome("shape.output_is_finite", HELD, "exact", cases=5, assertions=5, sampled=5),
    Outcome("against.outputs_agree_within_both_bounds", NOT_APPLICABLE, "bounded", reason="no"),
    Outcome("residual.of_the_suite", INTERNAL_ERROR, "exact", reason="Traceback …"),
)


def conclude(outcomes, witnesses, json_file=None, junit_file=None, complaints=(), cut_short=""):
    """Ends a command that came to these outcomes."""
    run = Run(
        "title", "t:x", ("cpu",), "seed 1", len(outcomes), outcomes, 1.0, {}, complaints, cut_short
    )
    written = options.Witnesses(run.target, witnesses)
    for outcome in outcomes:
        written.add(outcome)
    options.conclude(run, written, json_file, junit_file)


def test_a_command_ends_with_witnesses_a_report_and_both_files(tmp_path, capsys):
    folder, data, junit = tmp_path / "w", tmp_path / "o.json", tmp_path / "j.xml"
    conclude((FOUND, *OTHERS), folder, data, junit)
    (witness,) = folder.iterdir()
    out, err = capsys.readouterr()
    assert err == ""
    assert f"rescnn-verify replay {witness}" in out
    (first, *_) = json.loads(data.read_text())["properties"]
    assert first["counterexample"]["witness"] == str(witness)
    assert ElementTree.parse(junit).getroot().find(".//failure") is not None


def test_witnesses_that_cannot_be_written_are_warned_of_and_the_falsification_is_shown(
    tmp_path, capsys
):
    (tmp_path / "blocked").write_text("a file where a folder should be")
    again = replace(FOUND, name="shape.output_is_finite")
    conclude((FOUND, again), tmp_path / "blocked" / "w", tmp_path / "o.json")
    out, err = capsys.readouterr()
    assert err.startswith("warning: cannot write witnesses to ")
    assert len(err.splitlines()) == 1
    assert "branch widths of block 0" in out
    entry, _ = json.loads((tmp_path / "o.json").read_text())["properties"]
    assert entry["counterexample"]["witness"] is None
    assert "reproduce(" in entry["counterexample"]["python"]


@pytest.mark.parametrize("option", ["--json", "--junit"])
def test_a_result_file_that_cannot_be_written_ends_with_its_option(option, tmp_path, capsys):
    files = {"--json": None, "--junit": None, option: tmp_path}
    with pytest.raises(SystemExit) as ended:
        conclude(OTHERS[:1], tmp_path / "w", files["--json"], files["--junit"])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert "held" in out
    assert err == f"error: {option} {tmp_path}: Is a directory\n"


@pytest.mark.parametrize(
    "complaints", [(), ("known.toml, entry 1: fixed, remove it", "known.toml, entry 2: fixed")]
)
def test_junit_counts_what_it_holds(complaints, tmp_path):
    file = tmp_path / "j.xml"
    conclude((FOUND, *OTHERS), tmp_path / "w", junit_file=file, complaints=complaints)
    suite = ElementTree.parse(file).getroot()
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    assert counts == {
        "tests": len(suite.findall("testcase")),
        "failures": len(suite.findall("testcase/failure")),
        "errors": len(suite.findall("testcase/error")),
        "skipped": len(suite.findall("testcase/skipped")),
    }
    assert counts["tests"] == 4 + len(complaints)
    assert counts["failures"] == 1 + len(complaints)
    assert counts["errors"] == counts["skipped"] == 1


def test_a_run_that_did_not_come_to_its_end_has_not_held(tmp_path, capsys):
    data, junit = tmp_path / "o.json", tmp_path / "j.xml"
    conclude(OTHERS[:1], tmp_path / "w", data, junit, cut_short="interrupted")
    assert "could not run: 1 held" in capsys.readouterr().out
    entry = json.loads(data.read_text())
    assert (entry["verdict"], entry["cut short"]) == ("could not run", "interrupted")
    suite = ElementTree.parse(junit).getroot()
    assert (suite.get("tests"), suite.get("errors")) == ("2", "1")
    assert suite.find("testcase/error").get("message") == "interrupted"


def test_what_was_falsified_before_the_end_is_falsified(tmp_path):
    conclude((FOUND,), tmp_path / "w", tmp_path / "o.json", cut_short="interrupted")
    assert json.loads((tmp_path / "o.json").read_text())["verdict"] == "falsified"


@pytest.mark.parametrize("name", ["o.json", "folder/o.json"])
def test_a_file_can_be_made_where_there_is_a_folder_and_nowhere_else(
    name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    options.writable(None, "--json")
    options.writable(Path("o.json"), "--json")
    if "/" in name:
        line = ending(capsys, options.writable, Path(name), "--json")
        assert line.startswith(f"error: --json {name}: there is no folder")
    else:
        (tmp_path / "folder").mkdir()
        options.writable(Path("folder/o.json"), "--json")
