"""`llm-node status` beside a live swarm: from any node, quickly, and without the heavy libraries."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Literal

import pytest

from tests.net.swarm import Swarm, peer_in, status_until

pytestmark = [pytest.mark.net, pytest.mark.timeout(240)]

FORBIDDEN = {"torch", "hivemind", "numpy", "tokenizers", "safetensors", "averaging", "kernels"}
"""Top-level packages that would make the command slow, or that cannot share a process with py-libp2p."""


def imported(trace: str) -> set[str]:
    """Top-level names in what `-X importtime` wrote."""
    lines = [line for line in trace.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize("role", ["bootstrap", "trainer"])
def test_status_asks_any_node(
    swarm: Swarm,
    role: Literal["bootstrap", "trainer"],
    measured: Callable[[str, float], None],
) -> None:
    bootstrap = swarm.bootstrap()
    trainers = swarm.trainers(2)
    asked = bootstrap if role == "bootstrap" else trainers[0]

    # The records of the first exchange need a few seconds to get around.
    status_until(asked, lambda d: d["swarm"]["training"] >= 2 and d["swarm"]["exchanges_ok"] >= 2, timeout_s=30)
    started_s = time.monotonic()
    done = swarm.command("status", "--peer", asked.address, "--json")
    seconds = time.monotonic() - started_s
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["run"]["name"] == "my-run"
    assert document["swarm"]["training"] >= 2
    assert document["swarm"]["exchanges_ok"] >= 2
    for node in trainers:
        shown = peer_in(document, node.peer_id)
        assert shown is not None
        assert (shown["name"], shown["state"]) == (node.name, "training")
    measured(f"status of a {role}", seconds)


def test_status_imports_neither_torch_nor_hivemind(swarm: Swarm) -> None:
    node = swarm.trainers(1)[0]
    done = swarm.command("status", "--peer", node.address, "--json", python=["-X", "importtime"])
    assert done.returncode == 0, done.stderr[-1000:]
    names = imported(done.stderr)
    assert "libp2p" in names
    assert not names & FORBIDDEN


def test_status_for_people_names_the_peers(swarm: Swarm) -> None:
    asked, other = swarm.trainers(2)[:2]
    status_until(asked, lambda d: peer_in(d, other.peer_id) is not None, timeout_s=30)
    done = swarm.command("status", "--peer", asked.address)
    assert (done.returncode, done.stderr) == (0, "")
    for trainer in (asked, other):
        assert trainer.name in done.stdout
