"""The command line end to end, in processes of its own."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from rescnn_verify.case import Case
from rescnn_verify.cli import main
from rescnn_verify.witness import Witness

ROOT = Path(__file__).resolve().parents[1]
WRONG = f"{ROOT / 'tests' / 'zoo' / 'split.py'}:RemainderToFirst"


def run(*arguments, cwd, timeout=120):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, "-m", "rescnn_verify", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def one_line_error(arguments, folder, monkeypatch):
    """The one line that a command which cannot run prints, run in this process."""
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(main, [*arguments], catch_exceptions=False)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if line.lower().startswith("error")]
    assert len(lines) == 1, result.output
    return lines[0]


def test_a_right_implementation_holds_with_exit_code_0(tmp_path):
    result = run("check", "--profile", "quick", "-k", "split", "--json", "o.json", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    data = json.loads((tmp_path / "o.json").read_text())
    assert data["verdict"] == "held"
    assert data["target"] == "rescnn:ResCNNStack"
    assert data["environment"]["torch"]
    assert {p["verdict"] for p in data["properties"]} == {"held"}
    for entry in data["properties"]:
        assert {"name", "evidence", "cases", "assertions", "seconds", "reason"} <= set(entry)
        assert entry["counterexample"] is None
        assert entry["assertions"] > 0


@pytest.fixture(scope="module")
def falsified(tmp_path_factory):
    folder = tmp_path_factory.mktemp("falsified")
    arguments = ("--profile", "quick", "-k", "widths_sum", "--json", "o.json")
    return folder, run("check", WRONG, *arguments, cwd=folder)


def test_a_wrong_implementation_is_falsified_with_exit_code_1(falsified):
    folder, result = falsified
    assert result.returncode == 1, result.stdout + result.stderr
    assert "expected  (1, 2)" in result.stdout
    assert "got       (2, 1)" in result.stdout
    data = json.loads((folder / "o.json").read_text())
    assert data["verdict"] == "falsified"
    case = data["properties"][0]["counterexample"]["case"]
    assert (case["channels"], case["num_blocks"], len(case["kernel_sizes"])) == (3, 1, 2)


def test_the_line_to_copy_replays_the_counterexample(falsified):
    folder, result = falsified
    line = next(s for s in result.stdout.splitlines() if "rescnn-verify replay" in s)
    witness = line.split()[-1]
    again = run("replay", witness, cwd=folder)
    assert again.returncode == 1, again.stdout + again.stderr
    assert "reproduced" in again.stdout
    assert "(2, 1)" in again.stdout
    right = run("replay", witness, "--target", "rescnn:ResCNNStack", cwd=folder)
    assert right.returncode == 0
    assert "not reproduced" in right.stdout


def test_the_python_lines_raise_the_same_falsification(falsified):
    folder, _ = falsified
    data = json.loads((folder / "o.json").read_text())
    lines = data["properties"][0]["counterexample"]["python"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(
        [sys.executable, "-c", lines], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "Falsified: branch widths of block 0: expected (1, 2), got (2, 1)" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "rescnn", "-n", "1"], "names no attribute"),
        (["check", "no_such_module:Model", "-n", "1"], "No module named 'no_such_module'"),
        (["check", "missing.py:Model", "-n", "1"], "there is no file missing.py"),
        (["check", "rescnn:Nothing", "-n", "1"], "it has ResCNNBlock, ResCNNStack"),
        (["check", "torch.nn:Linear", "-n", "1"], "has no channels"),
        (["check", "math:pi", "-n", "1"], "must be a rescnn_verify.Target"),
        (["check", "-n", "1", "-k", "no_such_property"], "selects no property"),
        (["check", "-n", "1", "-k", "split and"], "not an expression"),
        (["check", "--profile", "slow"], "'slow' is not one of"),
        (["check", "-n", "0"], "0 is not in the range"),
        (["check", "--json", "no/such/folder/o.json"], "there is no folder"),
        (["replay", "missing.json"], "cannot read missing.json"),
        (["replay"], "Missing argument"),
    ],
)
def test_bad_input_gets_one_clear_line_and_exit_code_2(arguments, said, tmp_path, monkeypatch):
    assert said in one_line_error(arguments, tmp_path, monkeypatch)


def test_cuda_without_a_device_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    line = one_line_error(["check", "--device", "cuda", "-n", "1"], tmp_path, monkeypatch)
    assert "no CUDA device" in line


def test_a_required_device_that_is_missing_could_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ["check", "--device", "all", "--require-cuda", "-n", "1"]
    assert "--require-cuda: this machine has no" in one_line_error(arguments, tmp_path, monkeypatch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a device")
def test_without_a_device_its_checks_are_not_run_rather_than_held(tmp_path):
    arguments = ("--profile", "quick", "--device", "all", "-k", "output_is_finite or widths_sum")
    result = run("check", *arguments, "-n", "1", "--json", "o.json", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 held, 1 not run" in result.stdout
    assert "not run, no device: shape.output_is_finite" in result.stdout
    data = json.loads((tmp_path / "o.json").read_text())
    verdicts = {(p["name"], p["device"]): p["verdict"] for p in data["properties"]}
    assert verdicts == {
        ("split.widths_sum_to_channels", "cpu"): "held",
        ("shape.output_is_finite", "cpu"): "held",
        ("shape.output_is_finite", "cuda"): "not run",
    }
    assert data["environment"]["devices"]["cuda"] == "no device"


def test_two_implementations_are_compared_and_the_witness_replays(tmp_path):
    fast, plain = f"{ROOT / 'examples' / 'fast.py'}:fold_without_eps", "rescnn:ResCNNStack"
    arguments = ("--against", plain, "--profile", "quick", "-k", "outputs", "-n", "1")
    result = run("check", fast, *arguments, cwd=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    (witness,) = (tmp_path / "witnesses").iterdir()
    assert run("replay", f"witnesses/{witness.name}", cwd=tmp_path).returncode == 1


def test_the_pair_that_a_report_names_is_checked_as_a_pair(tmp_path):
    pair = f"{ROOT / 'examples' / 'fast.py'}:fold_without_eps against rescnn:ResCNNStack"
    result = run("check", pair, "--profile", "quick", "-k", "outputs", "-n", "1", cwd=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "against.outputs_agree_within_both_bounds" in result.stdout


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("shape.output_is_finite", {"device": "cuda"}, "needs a CUDA device"),
        ("against.outputs_agree_within_both_bounds", {}, "does not apply to rescnn:ResCNNStack"),
        ("no.such_property", {}, "there is no property 'no.such_property'"),
    ],
)
def test_a_witness_that_cannot_be_run_is_not_reproduced(name, fields, said, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    case = Case(**fields).to_json()
    witness = {"version": 1, "property": name, "target": "rescnn:ResCNNStack", "case": case}
    witness |= {"before": [], "what": "", "expected": "", "got": ""}
    (tmp_path / "w.json").write_text(json.dumps(witness))
    assert said in one_line_error(["replay", "w.json"], tmp_path, monkeypatch)


def replayed(folder, monkeypatch, *arguments, **fields):
    """Replays a witness of the target that gives its width to the first branch."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    case = Case(channels=3, kernel_sizes=(3, 5), num_blocks=1)
    trial = (replace(case, **fields),)
    what, got = "branch widths of block 0", "(2, 1)"
    witness = Witness("split.widths_sum_to_channels", WRONG, trial, what, "(1, 2)", got)
    witness.write(folder / "witnesses")
    return CliRunner().invoke(main, ["replay", *arguments, "witnesses"], catch_exceptions=False)


def test_a_case_that_the_target_does_not_promise_is_not_reproduced(tmp_path, monkeypatch):
    block = "rescnn:ResCNNBlock"
    result = replayed(tmp_path / "two", monkeypatch, "--target", block, num_blocks=2)
    assert result.exit_code == 2
    assert f"{block} does not promise channels=3" in result.output
    assert replayed(tmp_path / "one", monkeypatch, "--target", block).exit_code == 0


def test_a_failure_of_another_kind_is_shown_as_one(tmp_path, monkeypatch):
    same = replayed(tmp_path / "same", monkeypatch)
    assert same.exit_code == 1
    assert "in another way" not in same.output
    zoo = f"{ROOT / 'tests' / 'zoo' / 'split.py'}:RoundedUp"
    arguments = ("--target", zoo)
    other = replayed(
        tmp_path / "other", monkeypatch, *arguments, channels=1, kernel_sizes=(3, 5, 7)
    )
    assert other.exit_code == 1
    assert "it failed in another way then: branch widths of block 0, got (2, 1)" in other.output


def test_an_id_names_one_witness(tmp_path, monkeypatch):
    """Two properties that fail for the same smallest case have two."""
    monkeypatch.chdir(tmp_path)
    one = Witness("split.widths_sum_to_channels", "a:A", (Case(),), "w", "e", "g")
    two = replace(one, name="split.widths_are_even")
    ids = {witness.filename.rpartition("-")[2] for witness in (one, two)}
    assert len(ids) == 2
    for witness in (one, two, replace(one, name="split.widths_sum")):
        witness.write(tmp_path / "witnesses")
    assert "is no file, no folder and no ID" in one_line_error(
        ["replay", "0000000000"], tmp_path, monkeypatch
    )
    (tmp_path / "witnesses" / f"copy-{one.filename}").write_text("{}")
    line = one_line_error(
        ["replay", one.filename.rpartition("-")[2].removesuffix(".json")], tmp_path, monkeypatch
    )
    assert "is the ID of several witnesses; name one: witnesses/copy-" in line


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "is not JSON"), ('{"version": 7}', "not a witness"), ('{"version": 1}', "has no")],
)
def test_a_corrupted_witness_gets_one_clear_line(text, said, tmp_path, monkeypatch):
    (tmp_path / "w.json").write_text(text)
    assert said in one_line_error(["replay", "w.json"], tmp_path, monkeypatch)


def test_a_module_that_fails_to_import_gets_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("raise RuntimeError('half written')\n")
    line = one_line_error(["check", "broken.py:Model", "-n", "1"], tmp_path, monkeypatch)
    assert "importing broken.py failed: RuntimeError: half written" in line


def test_a_crash_of_the_process_is_falsified_and_the_rest_goes_on(tmp_path):
    (tmp_path / "crash.py").write_text(
        "import os\n"
        "from rescnn import ResCNNStack\n"
        "class Crash(ResCNNStack):\n"
        "    def get_receptive_field(self):\n"
        "        os._exit(3)\n"
    )
    arguments = ("--profile", "quick", "-k", "claimed_field or widths", "-n", "2")
    result = run("check", "crash.py:Crash", *arguments, "--json", "o.json", cwd=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    verdicts = {
        p["name"]: p["verdict"] for p in json.loads((tmp_path / "o.json").read_text())["properties"]
    }
    assert verdicts["receptive_field.claimed_field_is_the_formula"] == "falsified"
    assert verdicts["split.widths_sum_to_channels"] == "held"


def test_stopping_early_leaves_out_the_rest(tmp_path):
    arguments = ("--profile", "quick", "-k", "split", "-x", "-n", "1", "--json", "o.json")
    result = run("check", WRONG, *arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert len(json.loads((tmp_path / "o.json").read_text())["properties"]) == 1


def test_list_shows_each_property_with_its_statement_and_needs(tmp_path):
    result = run("list", "-k", "widths_sum", cwd=tmp_path)
    assert result.returncode == 0
    words = " ".join(result.stdout.split())
    assert "split.widths_sum_to_channels" in words
    assert "channels // n each" in words
    assert "handles of the blocks" in words


def test_one_seed_gives_one_result(tmp_path):
    results = []
    for name in ("a.json", "b.json"):
        run("check", "--profile", "quick", "-k", "split", "--json", name, cwd=tmp_path)
        properties = json.loads((tmp_path / name).read_text())["properties"]
        results.append([(p["name"], p["cases"], p["assertions"]) for p in properties])
    assert results[0] == results[1]
