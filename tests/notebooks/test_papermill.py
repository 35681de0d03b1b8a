"""The command users type: papermill with good and with bad parameters."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def papermill(tmp_path, *arguments, notebook="03_quant"):
    command = [sys.executable, "-m", "papermill", f"notebooks/{notebook}.ipynb", str(tmp_path / "out.ipynb")]
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def tracked_changes():
    command = ["git", "status", "--porcelain", "--untracked-files=no"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


def test_a_run_succeeds_and_changes_no_tracked_file(tmp_path):
    before = tracked_changes()
    done = papermill(tmp_path, "-p", "scale", "tiny", "-p", "steps", "1e1")
    assert done.returncode == 0, done.stderr
    assert "not testable at this scale: 1 of 3 seeds" in (tmp_path / "out.ipynb").read_text()
    assert tracked_changes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("-p", "stpes", "5"),
            "UserError: unknown parameter 'stpes' (did you mean 'steps'?); known: scale, steps, seeds",
        ),
        (("-p", "steps", "hello"), "UserError: parameter steps: expected int, got 'hello'"),
        (("-p", "scale", "smal"), "UserError: unknown scale (asked for) 'smal' (did you mean 'small'?)"),
        (("-p", "corpus", "nowhere.txt"), "UserError: corpus 'nowhere.txt': no such file or folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_parameter_fails_with_one_clear_line(tmp_path, arguments, message):
    done = papermill(tmp_path, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
