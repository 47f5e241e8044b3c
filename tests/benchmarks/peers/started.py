"""A peer of another kind as a benchmark sees it: started in its place, followed through its JSON lines, killed at the end."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.net.process import ROOT, environment

__all__ = ["JsonProcess", "start_hivemind"]

START_TIMEOUT_S = 120.0


class JsonProcess:
    """A process that tells one JSON object with an `event` per line.

    Args:
        command: what to run.
        folder: takes its standard error and its temporary files.
    """

    def __init__(self, command: Sequence[str], *, folder: Path, name: str) -> None:
        self._errors = folder / f"{name}.err"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(folder),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.events: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print there too
                self.events.append(json.loads(line))

    def wait_for(self, name: str) -> dict[str, Any]:
        """The first event of that name."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s and self._process.poll() is None:
            for event in list(self.events):
                if event["event"] == name:
                    return event
            time.sleep(0.1)
        raise SystemExit(f"a peer did not say {name!r}: {self._errors.read_text()[-1000:]}")

    def begin(self) -> None:
        """Let it start to train."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        """End it and its children."""
        for child in psutil.Process(self._process.pid).children(recursive=True):
            child.kill()
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def start_hivemind(mode: str, *options: str, prefix: Sequence[str], folder: Path, name: str) -> JsonProcess:
    """A hivemind peer; `prefix` is what runs a command in its place."""
    command = [*prefix, sys.executable, "-m", "tests.benchmarks.peers.hivemind_peer", mode, *options]
    return JsonProcess(command, folder=folder, name=name)
