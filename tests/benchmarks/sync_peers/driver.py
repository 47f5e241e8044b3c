"""Both ends of the conversation between the benchmark and one of its peers: a command a line, a reply a line, all JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Pair", "read_command", "reply", "running", "wait_until"]

_ROOT = Path(__file__).parents[3]
_HEAD_START_S = 0.1
"""From the command to the common start: both peers must have read it by then."""

Json = dict[str, Any]


def read_command() -> Json:
    """The next command; {} at the end. Blocks."""
    line = sys.stdin.readline()
    return json.loads(line) if line else {}


def reply(answer: Json) -> None:
    """Answer the last command."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def wait_until(at_s: float) -> None:
    """Sleep until the machine's monotonic clock, which all processes share, shows `at_s`."""
    time.sleep(max(0.0, at_s - time.monotonic()))


class Pair:
    """Peer processes, two in the end."""

    def __init__(self, processes: list[subprocess.Popen[str]], greetings: list[Json] | None = None) -> None:
        self._processes = processes
        self.greetings = greetings or [self._read(process) for process in processes]
        """What each said at its start: `peer` and `address`."""

    def joined(self, other: Pair) -> Pair:
        """These processes and those of `other`; who started them ends them."""
        return Pair(self._processes + other._processes, self.greetings + other.greetings)

    def ask(self, do: str, **options: Any) -> list[Json]:
        """Give both the same command; their answers."""
        for process in self._processes:
            self._write(process, {"do": do, **options})
        return [self._read(process) for process in self._processes]

    def ask_each(self, do: str, options: list[Json]) -> list[Json]:
        """Give each its own options for the same command, at once; their answers."""
        for process, each in zip(self._processes, options, strict=True):
            self._write(process, {"do": do, **each})
        return [self._read(process) for process in self._processes]

    def ask_together(self, do: str, **options: Any) -> list[Json]:
        """Like `ask`, with a common time of start, `at_s`."""
        return self.ask(do, at_s=time.monotonic() + _HEAD_START_S, **options)

    @staticmethod
    def _write(process: subprocess.Popen[str], command: Json) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(command) + "\n")
        process.stdin.flush()

    @staticmethod
    def _read(process: subprocess.Popen[str]) -> Json:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("a peer of the benchmark ended; see what it wrote above")
        answer: Json = json.loads(line)
        return answer


@contextmanager
def running(
    module: str, arguments: Sequence[Sequence[str]], *, prefixes: Sequence[Sequence[str]] = ()
) -> Iterator[Pair]:
    """A process of `tests.benchmarks.MODULE` for each of the arguments; ended with the block.

    Each has one thread for tensors: on two cores there is one for each. Its warnings are hivemind's, and of no use here.
    `prefixes` run the command elsewhere, such as `ip netns exec NAME`.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    processes = [
        subprocess.Popen(
            [*prefix, sys.executable, "-m", f"tests.benchmarks.{module}", *each],
            cwd=_ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for us: peers end with their standard input
        )
        for prefix, each in zip(prefixes or [()] * len(arguments), arguments, strict=True)
    ]
    try:
        yield Pair(processes)
    finally:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in processes:
            try:
                process.wait(timeout=20.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
