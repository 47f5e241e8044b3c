"""Real SIGKILLs at random moments of a save."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def kill(folder: Path, num_kills: int, seed: int) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.model.crashing_saver", str(folder), str(num_kills), str(seed)],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert run.returncode == 0, run.stderr
    lines = [tuple(map(int, line.split())) for line in run.stdout.splitlines()]
    assert len(lines) == num_kills
    # A save that has returned is never lost; one that was under way may be whole already.
    assert all(generation in (last, last + 1) for last, generation in lines)


def test_three_kills(tmp_path: Path) -> None:
    kill(tmp_path, 3, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_twenty_kills(tmp_path: Path, seed: int) -> None:
    kill(tmp_path, 20, seed=seed)
