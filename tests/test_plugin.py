"""The pytest plugin, in processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_run(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_the_properties_are_collected_under_their_names():
    result = pytest_run("properties", "--collect-only", "-q")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "properties/split.py::widths_sum_to_channels" in result.stdout


def test_the_bundled_model_passes_and_the_header_names_it():
    result = pytest_run("properties/split.py", "--verify-profile", "quick")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "target: rescnn:ResCNNStack" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "gone.py:Half"], "ERROR: --target: there is no file gone.py"),
        (["--verify-require-cuda"], "ERROR: --verify-require-cuda: no CUDA device"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_mistake_is_said_once(arguments, said):
    result = pytest_run("properties", *arguments)
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert (result.stdout + result.stderr).count("ERROR") == 1
    assert said in result.stderr


def test_a_wrong_implementation_fails_with_its_counterexample():
    target = "tests/zoo/split.py:RemainderToFirst"
    arguments = ("-k", "widths_sum", "--verify-profile", "quick", "--target", target)
    result = pytest_run("properties/split.py", *arguments)
    assert result.returncode == 1
    assert "expected  (1, 2)" in result.stdout
    assert "reproduce('split.widths_sum_to_channels'" in result.stdout


def test_a_bad_target_is_one_clear_error():
    result = pytest_run("properties/split.py", "--target", "rescnn")
    assert result.returncode not in (0, 1)
    assert "names no attribute" in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def test_an_unrelated_run_imports_neither_torch_nor_the_suite(tmp_path):
    (tmp_path / "test_unrelated.py").write_text(
        "import sys\n"
        "def test_nothing_was_imported():\n"
        "    assert not {'torch', 'rescnn_verify.engine'} & set(sys.modules)\n"
    )
    assert pytest_run("-q", cwd=tmp_path).returncode == 0
