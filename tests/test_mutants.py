"""The mutants run in a pytest of their own: what a broken rule leaves open must not trouble other tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MUTANTS = sorted(Path(__file__).parent.glob("*/mutants_*.py"))


@pytest.mark.parametrize("module", MUTANTS, ids=lambda path: path.stem)
def test_every_bug_planted_in_the_rules_is_caught_by_the_test_named_beside_it(module: Path) -> None:
    """One failure here names a bug that the tests would let pass."""
    quiet = ["-W", "ignore::ResourceWarning", "-W", "ignore::pytest.PytestUnraisableExceptionWarning"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *quiet, str(module)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
