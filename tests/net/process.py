"""One `llm-node` process as a test sees it: started by its real command line, watched through its JSON events, ended by its pid."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

__all__ = ["ROOT", "Event", "NodeProcess", "command_line", "environment", "has_averaged"]

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 90.0
"""Longest wait for any event; a loaded machine needs several seconds to import torch alone."""

Event = dict[str, Any]


def command_line(*arguments: str) -> list[str]:
    """The command as a user would type it, with this interpreter."""
    return [sys.executable, "-m", "node", *arguments]


def environment(temporary: Path) -> dict[str, str]:
    """One thread per process, and sockets below `temporary`, whose path must be short."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": str(temporary)}


def has_averaged(exchange: Event) -> bool:
    """Whether an `exchange` event tells of an average taken."""
    return exchange["outcome"] in ("averaged", "clipped")


class NodeProcess:
    """A running node.

    Args:
        name: shown by `--name`, and of the file that takes its standard error.
        arguments: command and options, without `--name`, `--home` and `--events`.
        folder: its home is `folder/name`.
        temporary: see `environment`.
        prefix: a program that runs the command, such as `ip netns exec NAME`; it must exec, so that the pid is the node's.
    """

    def __init__(
        self, name: str, arguments: Sequence[str], *, folder: Path, temporary: Path, prefix: Sequence[str] = ()
    ) -> None:
        self.name, self.home = name, folder / name
        self._command = arguments[0]
        self.events: list[Event] = []
        self._changed = threading.Condition()
        self._ended = False
        self._errors = folder / f"{name}.{time.monotonic_ns()}.err"
        options = ("--events", f"--name={name}", f"--home={self.home}")
        self.started_s = time.monotonic()
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [*prefix, *command_line(*arguments, *options)],
                cwd=ROOT,
                env=environment(temporary),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    # ---- what it says

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            event["after_s"] = time.monotonic() - self.started_s
            with self._changed:
                self.events.append(event)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_for(
        self,
        name: str | tuple[str, ...],
        where: Callable[[Event], bool] = lambda event: True,
        *,
        since: int = 0,
        count: int = 1,
        timeout_s: float = START_TIMEOUT_S,
    ) -> Event:
        """The `count`-th event `name` (or any of several) that satisfies `where`, from the event numbered `since` on (see `mark`).

        Raises:
            AssertionError: it did not come in time, or the process ended without it.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ended or len(self._matching(name, where, since)) >= count, timeout_s)
            found = self._matching(name, where, since)
            if len(found) >= count:
                return found[count - 1]
        said = [event for event in self.events[since:] if event["event"] != "step"][-12:]
        raise AssertionError(
            f"{self.name} gave {len(found)} of {count} {name!r}; {'it ended' if self._ended else 'time is up'}; "
            f"last events {said}; stderr {self.errors[-2000:]!r}"
        )

    def _matching(self, name: str | tuple[str, ...], where: Callable[[Event], bool], since: int) -> list[Event]:
        names = (name,) if isinstance(name, str) else name
        return [event for event in self.events[since:] if event["event"] in names and where(event)]

    def mark(self) -> int:
        """The number of the next event, for `since`."""
        with self._changed:
            return len(self.events)

    def wait_for_averaging(self, count: int = 1, *, since: int = 0) -> Event:
        """Wait until that many exchanges have ended with an average."""
        return self.wait_for("exchange", has_averaged, since=since, count=count)

    @property
    def address(self) -> str:
        """A multiaddress under which it can be dialled."""
        return str(self.wait_for("listening" if self._command == "join" else "serving")["addresses"][0])

    @property
    def peer_id(self) -> str:
        """Its peer id."""
        return self.address.rsplit("/", 1)[1]

    @property
    def page(self) -> str:
        """URL of its status page."""
        return str(self.wait_for("web_page")["url"])

    @property
    def errors(self) -> str:
        """What it wrote to standard error."""
        return self._errors.read_text()

    # ---- how it ends

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    @property
    def rss_bytes(self) -> int:
        """Resident memory of the process, its children not counted."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def children(self) -> list[psutil.Process]:
        """Its child processes: p2pd."""
        found: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return found

    def kill(self) -> None:
        """SIGKILL, and wait for the end; does nothing to a process that has ended."""
        self.process.kill()
        self.process.wait()
        self._close()

    def interrupt(self) -> float:
        """Ctrl-C.

        Returns:
            Seconds until the process had ended.
        """
        started_s = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(START_TIMEOUT_S)
        seconds = time.monotonic() - started_s
        self._close()
        return seconds

    def _close(self) -> None:
        """Read to the end of what the ended process wrote."""
        assert self.process.stdout is not None
        self._reader.join()
        self.process.stdout.close()
