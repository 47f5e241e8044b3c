"""Two machines with a slow line between them: each in a network namespace whose line passes 2 Mbit/s."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.net.namespaces import Namespaces, obstacle
from tests.net.process import NodeProcess
from tests.net.swarm import RUN_SETTINGS, SEQUENCES, Swarm

RATE_BITS_PER_S = 2_000_000

pytestmark = [pytest.mark.net, pytest.mark.timeout(240)]


SERVER = """
import socket
connection, _ = socket.create_server(("0.0.0.0", 5000)).accept()
print(connection.recv(100_000, socket.MSG_WAITALL) == bytes(i % 251 for i in range(100_000)))
"""
CLIENT = """
import socket, sys, time
for _ in range(100):
    started_s = time.monotonic()
    try:
        connection = socket.create_connection((sys.argv[1], 5000))
        break
    except ConnectionRefusedError:
        time.sleep(0.1)
print(time.monotonic() - started_s)
connection.sendall(bytes(i % 251 for i in range(100_000)))
"""


def test_a_long_line_takes_its_time_and_keeps_the_order() -> None:
    if reason := obstacle():
        pytest.skip(reason)
    with Namespaces((RATE_BITS_PER_S,) * 2, latency_s=((0.0, 0.15), (0.15, 0.0))) as line:
        server = subprocess.Popen([*line.inside(0), sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
        client = [*line.inside(1), sys.executable, "-c", CLIENT, line.hosts[0]]
        round_trip_s = float(subprocess.run(client, capture_output=True, text=True, check=True, timeout=60).stdout)
        received, _ = server.communicate(timeout=60)
    assert received == "True\n"
    assert round_trip_s >= 0.3


@pytest.fixture
def line() -> Iterator[Namespaces]:
    if reason := obstacle():
        pytest.skip(reason)
    with Namespaces((RATE_BITS_PER_S, RATE_BITS_PER_S)) as line:
        yield line


@pytest.fixture
def pair(line: Namespaces, tmp_path: Path) -> Iterator[tuple[NodeProcess, NodeProcess]]:
    """A trainer at each end, the bootstrap node beside the first."""
    settings = RUN_SETTINGS | {
        "sync.inner_steps": 90,
        "sync.theta_only": False,
        "sync.delta_codec": "q8",
        "sync.slow_codec": "bf16",
    }
    with Swarm(tmp_path, settings) as swarm:
        listen = [f"--listen=/ip4/{host}/tcp/0" for host in line.hosts]
        bootstrap = swarm.start("bootstrap", "bootstrap", str(tmp_path / "run.toml"), listen[0], prefix=line.inside(0))
        via = f"--peer={bootstrap.address}"
        near, far = (
            swarm.start(name, "join", via, listen[index], SEQUENCES, "--threads=1", prefix=line.inside(index))
            for index, name in enumerate(("near", "far"))
        )
        yield near, far


def test_two_machines_train_and_average_over_a_slow_line(
    line: Namespaces, pair: tuple[NodeProcess, NodeProcess]
) -> None:
    num_averages = 2
    for node in pair:
        node.wait_for_averaging(num_averages)
    near, far = pair
    partners = [event["partner"] for event in near.events if event["event"] == "exchange" and event["partner"]]
    assert set(partners) == {far.peer_id}
    assert far.address.startswith(f"/ip4/{line.hosts[1]}/tcp/")
    losses = [event["loss"] for event in far.events if event["event"] == "validation"]
    assert losses[-1] < losses[0] - 0.3
    parameters = 18_912
    for index in range(2):  # Δ in 8 bits and φ in 16
        assert line.sent_bytes(index) > num_averages * 3 * parameters


@pytest.mark.slow
def test_both_sides_of_a_cut_line_train_on_and_meet_again(
    line: Namespaces, pair: tuple[NodeProcess, NodeProcess]
) -> None:
    for node in pair:
        node.wait_for_averaging()
    line.set_up(1, False)
    marks = [(node, node.mark()) for node in pair]
    for node, mark in marks:
        node.wait_for("exchange", lambda event: event["outcome"] in ("alone", "timeout", "lost"), since=mark, count=3)
    line.set_up(1, True)
    marks = [(node, node.mark()) for node in pair]
    for node, mark in marks:
        node.wait_for_averaging(since=mark)
