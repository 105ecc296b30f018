"""Ends of the process that a target brings about raise, and those of its children do not."""

import os
import subprocess
import sys

import pytest

from rescnn_verify.exits import exits_raise
from rescnn_verify.target import TargetError, load


def test_an_end_of_the_process_raises_within_and_not_after():
    leave = os._exit
    with exits_raise(), pytest.raises(SystemExit, match=r"os\._exit\(3\)"):
        os._exit(3)
    assert os._exit is leave


def test_a_forked_process_still_ends():
    with exits_raise():
        child = os.fork()
        if child == 0:
            os._exit(7)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7


def test_a_target_that_ends_the_process_when_it_is_imported_is_refused(tmp_path):
    (tmp_path / "ends.py").write_text("import os\nos._exit(0)\n")
    with pytest.raises(TargetError, match=r"importing .*ends.py failed: .*os\._exit\(0\)"):
        load(f"{tmp_path / 'ends.py'}:Stack")


def test_a_forward_pass_that_ends_the_process_does_not_pass_for_held(tmp_path):
    (tmp_path / "ends.py").write_text(
        "import os\nimport rescnn\n\n\n"
        "class Stack(rescnn.ResCNNStack):\n"
        "    def forward(self, x):\n"
        "        os._exit(0)\n"
    )
    command = [sys.executable, "-m", "rescnn_verify", "check", "ends.py:Stack", "-n", "1"]
    options = ["-k", "output_is_finite", "--profile", "quick"]
    result = subprocess.run(
        [*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert "os._exit(0)" in result.stdout
