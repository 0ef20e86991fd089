"""Every notebook under both of the tools that users run it with: each finds what the other lets pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[2]
NBVAL = ["-o", "addopts=", "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout", "60"]


def test_nbval_finds_the_checked_lines_unchanged(notebook: Path, jupyter: dict[str, str]) -> None:
    """The words of the last check are the same on every machine; no cell raises."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *NBVAL, "-q", notebook],
        capture_output=True, text=True, env=jupyter, cwd=ROOT, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_papermill_runs_it_with_other_parameters(notebook: Path, jupyter: dict[str, str], tmp_path: Path) -> None:
    """Another seed, the quick profile, a bound on each cell; and no error hides in an output."""
    out = tmp_path / "out.ipynb"
    parameters = ["-p", "PROFILE", "quick", "-p", "SEED", "11", "--execution-timeout", "120", "--cwd", notebook.parent]
    done = subprocess.run(
        [sys.executable, "-m", "papermill", "--no-progress-bar", notebook, out, *parameters],
        capture_output=True, text=True, env=jupyter, cwd=ROOT, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outputs = [output for cell in nbformat.read(out, as_version=4).cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
