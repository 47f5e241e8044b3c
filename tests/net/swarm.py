"""A swarm of real processes on this machine: a tiny run on real text, a bootstrap node, and trainers as they are asked for.

Tests share one swarm, since starting it takes a while, but not an order: each asks for what it needs (`bootstrap`, `trainers`),
and what an earlier test has killed is started again.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.request import urlopen

from tests.net.process import ROOT, NodeProcess, command_line, environment
from tests.node.runs import TINY, write_corpus

__all__ = ["LISTEN", "RUN_SETTINGS", "SEQUENCES", "Swarm", "peer_in", "status_until"]

RUN_SETTINGS = TINY | {
    "inner.sequence_tokens": 64,
    "inner.max_sequences": 32,
    "inner.lr": 0.003,
    "sync.inner_steps": 60,
    "sync.total_rounds": 0,
    "sync.exchange_timeout_s": 5.0,
    "sync.max_lag_rounds": 8,
    "sync.snapshot_rounds": 10,
}
"""Rounds of about a second, most of it spent in the model: shorter ones would be over before a record has told of them. A
snapshot lasts for many, since its copies and their votes spread with the records, which takes some seconds each."""
LISTEN = "--listen=/ip4/127.0.0.1/tcp/0"
SEQUENCES = "--sequences=32"
"""Spares the benchmark before the first step."""


def init_arguments(folder: Path, settings: dict[str, Any]) -> list[str]:
    """The command that makes the run."""
    options = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    data = write_corpus(folder / "corpus")
    return ["init", str(folder / "run.toml"), "--model=1m", f"--data={data}", "--heldout-tokens=512", *options]


class Swarm:
    """A context manager; leaving it ends every process."""

    def __init__(self, folder: Path, settings: dict[str, Any] = RUN_SETTINGS) -> None:
        self.folder = folder
        self._settings = settings
        self._numbers = itertools.count(1)
        self._bootstrap: NodeProcess | None = None
        self._trainers: list[NodeProcess] = []
        self._all: list[NodeProcess] = []
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        # Below the system's own folder: pytest's is too long a path for sockets on some systems.
        self.temporary = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="net-")))
        self._cleanup.callback(self._end)
        try:
            done = self.command(*init_arguments(self.folder, self._settings), f"--home={self.folder / 'bootstrap'}")
            assert done.returncode == 0, done.stderr
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def _end(self) -> None:
        for node in self._all:
            node.kill()

    # ---- processes

    def command(self, *arguments: str, python: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Run one command to its end; `python` are options of the interpreter."""
        line = command_line(*arguments)
        return subprocess.run(
            [line[0], *python, *line[1:]],
            cwd=ROOT,
            env=environment(self.temporary),
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )

    def start(self, name: str, *arguments: str, prefix: Sequence[str] = ()) -> NodeProcess:
        """Start any node; it is ended with the swarm."""
        node = NodeProcess(name, arguments, folder=self.folder, temporary=self.temporary, prefix=prefix)
        self._all.append(node)
        return node

    def join(self, name: str, *arguments: str) -> NodeProcess:
        """Start a trainer, new or known by `name`; `trainers` counts it until it ends."""
        node = self.start(name, "join", LISTEN, "--threads=1", "--http=127.0.0.1:0", *arguments)
        self._trainers.append(node)
        return node

    @property
    def live_trainers(self) -> list[NodeProcess]:
        """Those that run, oldest first."""
        return [node for node in self._trainers if node.is_alive]

    def bootstrap(self) -> NodeProcess:
        """The live bootstrap node."""
        if self._bootstrap is None or not self._bootstrap.is_alive:
            others = [f"--peer={node.address}" for node in self.live_trainers]
            manifest = str(self.folder / "run.toml")
            self._bootstrap = self.start("bootstrap", "bootstrap", manifest, LISTEN, "--http=127.0.0.1:0", *others)
        assert self._bootstrap.address
        return self._bootstrap

    def kill_bootstrap(self) -> None:
        """No bootstrap node from now on, until somebody asks for one."""
        if self._bootstrap is not None:
            self._bootstrap.kill()

    def trainers(self, num_trainers: int) -> list[NodeProcess]:
        """So many live trainers at least, oldest first, each of which finishes a round meanwhile.

        With three, chance may leave the same one without a partner for several rounds; so no test waits for one of three to
        average, but only for one of two.
        """
        missing = num_trainers - len(self.live_trainers)
        if missing > 0:
            via = self.live_trainers[0] if self.live_trainers else self.bootstrap()
            for _ in range(missing):
                self.join(f"peer-{next(self._numbers)}", f"--peer={via.address}", SEQUENCES)
        marks = [(node, node.mark()) for node in self.live_trainers]
        for node, mark in marks:
            node.wait_for("exchange", since=mark)
        return self.live_trainers

    def only(self, num_trainers: int) -> list[NodeProcess]:
        """Exactly so many live trainers; the youngest ones leave, or new ones come."""
        for node in self.live_trainers[num_trainers:]:
            node.interrupt()
        return self.trainers(num_trainers)


def status_until(node: NodeProcess, condition: Callable[[dict[str, Any]], bool], *, timeout_s: float) -> dict[str, Any]:
    """The first status document that satisfies `condition`, from the event stream of the node's page.

    Raises:
        AssertionError: none came within `timeout_s`.
        OSError: the node went away or fell silent.
    """
    deadline_s = time.monotonic() + timeout_s
    document: dict[str, Any] = {}
    with urlopen(f"{node.page.rstrip('/')}/api/v1/events", timeout=timeout_s) as stream:
        for line in stream:
            if line.startswith(b"data: "):
                document = json.loads(line.removeprefix(b"data: "))
                if condition(document):
                    return document
            assert time.monotonic() < deadline_s, f"the status of {node.name} stays {document}"
    raise AssertionError(f"the page of {node.name} ended; last status {document}")


def peer_in(document: dict[str, Any], peer_id: str) -> dict[str, Any] | None:
    """What a status document says about one peer."""
    return next((peer for peer in document["peers"] if peer["peer"] == peer_id), None)
