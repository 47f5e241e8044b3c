"""Two machines with a slow line between them: network namespaces joined by a veth pair whose ends pass 2 Mbit/s.

Made and removed by the tests themselves, which needs root and iproute2.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from tests.net.process import NodeProcess
from tests.net.swarm import RUN_SETTINGS, SEQUENCES, Swarm

RATE_BITS_PER_S = 2_000_000
HOSTS = ("10.177.0.1", "10.177.0.2")


def obstacle() -> str | None:
    """Why namespaces cannot be made here, or None."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"iproute2 is not installed ({' and '.join(missing)} missing)"
    probe = f"llm-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


pytestmark = [pytest.mark.net, pytest.mark.timeout(240)]


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class SlowLine:
    """Two namespaces and the line between them; leaving the block removes all of it."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        stem = f"llm-{os.getpid()}-{next(self._numbers)}"
        self.places = (f"{stem}-a", f"{stem}-b")
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for place in self.places:
                run("ip", "netns", "add", place)
                stack.callback(run, "ip", "netns", "delete", place)  # takes its end of the line with it
                run("ip", "-n", place, "link", "set", "lo", "up")
            first, second = self.places
            run("ip", "-n", first, "link", "add", "line", "type", "veth", "peer", "name", "line", "netns", second)
            for place, host in zip(self.places, HOSTS, strict=True):
                run("ip", "-n", place, "address", "add", f"{host}/24", "dev", "line")
                run("ip", "-n", place, "link", "set", "line", "up")
                limit = ("rate", f"{RATE_BITS_PER_S}bit", "burst", "16kb", "latency", "400ms")
                run("tc", "-n", place, "qdisc", "add", "dev", "line", "root", "tbf", *limit)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def inside(self, index: int) -> tuple[str, ...]:
        """What runs a command in one of the two places."""
        return ("ip", "netns", "exec", self.places[index])

    def sent_bytes(self, index: int) -> int:
        """Bytes that have passed the limit from that place on."""
        shown: list[dict[str, Any]] = json.loads(run("tc", "-n", self.places[index], "-s", "-j", "qdisc", "show"))
        return sum(int(entry["bytes"]) for entry in shown if entry["kind"] == "tbf")

    def set_up(self, up: bool) -> None:
        """Mend or cut the line."""
        run("ip", "-n", self.places[0], "link", "set", "line", "up" if up else "down")


@pytest.fixture
def line() -> Iterator[SlowLine]:
    if reason := obstacle():
        pytest.skip(reason)
    with SlowLine() as line:
        yield line


@pytest.fixture
def pair(line: SlowLine, tmp_path: Path) -> Iterator[tuple[NodeProcess, NodeProcess]]:
    """A trainer at each end, the bootstrap node beside the first."""
    settings = RUN_SETTINGS | {"sync.inner_steps": 90}
    with Swarm(tmp_path, settings) as swarm:
        listen = [f"--listen=/ip4/{host}/tcp/0" for host in HOSTS]
        bootstrap = swarm.start("bootstrap", "bootstrap", str(tmp_path / "run.toml"), listen[0], prefix=line.inside(0))
        via = f"--peer={bootstrap.address}"
        near, far = (
            swarm.start(name, "join", via, listen[index], SEQUENCES, "--threads=1", prefix=line.inside(index))
            for index, name in enumerate(("near", "far"))
        )
        yield near, far


def test_two_machines_train_and_average_over_a_slow_line(line: SlowLine, pair: tuple[NodeProcess, NodeProcess]) -> None:
    num_averages = 2
    for node in pair:
        node.wait_for_averaging(num_averages)
    near, far = pair
    partners = [event["partner"] for event in near.events if event["event"] == "exchange" and event["partner"]]
    assert set(partners) == {far.peer_id}
    assert far.address.startswith(f"/ip4/{HOSTS[1]}/tcp/")
    losses = [event["loss"] for event in far.events if event["event"] == "validation"]
    assert losses[-1] < losses[0] - 0.3
    parameters = 18_912
    for index in range(2):  # Δ in 8 bits and φ in 16
        assert line.sent_bytes(index) > num_averages * 3 * parameters


@pytest.mark.slow
def test_both_sides_of_a_cut_line_train_on_and_meet_again(
    line: SlowLine, pair: tuple[NodeProcess, NodeProcess]
) -> None:
    for node in pair:
        node.wait_for_averaging()
    line.set_up(False)
    marks = [(node, node.mark()) for node in pair]
    for node, mark in marks:
        node.wait_for("exchange", lambda event: event["outcome"] in ("alone", "timeout", "lost"), since=mark, count=3)
    line.set_up(True)
    marks = [(node, node.mark()) for node in pair]
    for node, mark in marks:
        node.wait_for_averaging(since=mark)
