"""What a swarm outlives: the death of its bootstrap node, of any peer, and a peer's leaving and coming back.

Every story is told by real processes over libp2p; each waits for events, so that its length is the machine's.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable

import psutil
import pytest

from tests.net.process import NodeProcess, has_averaged
from tests.net.swarm import RUN_SETTINGS, SEQUENCES, Swarm, peer_in, status_until

pytestmark = [pytest.mark.net, pytest.mark.timeout(240)]

DEADLINE_S = float(RUN_SETTINGS["sync.exchange_timeout_s"])
FRESH_LOSS = math.log(RUN_SETTINGS["model.vocab_size"])
"""Held-out loss of a model that knows nothing, nats per token."""
LEAVING_LIMIT_S = 5.0


def last_round(node: NodeProcess) -> int:
    """The round of its latest step."""
    return int(next(event["round"] for event in reversed(node.events) if event["event"] == "step"))


def losses(node: NodeProcess) -> list[float]:
    return [event["loss"] for event in node.events if event["event"] == "validation"]


def test_peers_train_and_average(swarm: Swarm) -> None:
    swarm.bootstrap()
    trainers = swarm.trainers(3)
    for node in trainers:
        node.wait_for("exchange", count=3)
        assert losses(node)[-1] < FRESH_LOSS - 0.3
        assert node.errors == ""
    pairs = [
        event for node in trainers for event in node.events if event["event"] == "exchange" and has_averaged(event)
    ]
    assert {event["partner"] for event in pairs} <= {node.peer_id for node in swarm.live_trainers}
    assert len(pairs) >= 2


def test_a_late_peer_joins_after_the_bootstrap_was_killed(swarm: Swarm, measured: Callable[[str, float], None]) -> None:
    swarm.bootstrap()
    trainers = swarm.only(2)
    swarm.kill_bootstrap()
    marks = [(node, node.mark()) for node in trainers]
    for node, mark in marks:
        node.wait_for_averaging(2, since=mark)
        # Only a state that both vouch for is taken, and the very first one is worse than what they have by now.
        node.wait_for(("snapshot_published", "snapshot_kept"), lambda event: event["round"] > 0)

    late = swarm.join("late", f"--peer={trainers[0].address}")
    adopted = late.wait_for("state_adopted")
    first_step_s = late.wait_for("step")["after_s"]
    assert adopted["loss"] < FRESH_LOSS - 0.5
    assert losses(late)[0] < FRESH_LOSS - 0.5
    late.wait_for("exchange", count=2)
    measured("late peer, from its command to its first step", first_step_s)


def test_a_killed_peer_costs_the_others_at_most_their_deadline(swarm: Swarm) -> None:
    *survivors, victim = swarm.trainers(3)[:3]
    daemons = victim.children()
    assert [process.name() for process in daemons] == ["p2pd"]
    victim.wait_for("checkpoint_saved")
    round_before = last_round(victim)
    victim_id = victim.peer_id
    marks = [(node, node.mark()) for node in survivors]

    victim.kill()
    _, left = psutil.wait_procs(daemons, timeout=10)
    assert not left, "p2pd outlived its node"

    for node, mark in marks:
        node.wait_for("exchange", since=mark, count=3)
        node.wait_for_averaging(since=mark)
        exchanges = [event for event in node.events[mark:] if event["event"] == "exchange"]
        with_victim = [event for event in exchanges if event["partner"] == victim_id]
        assert all(event["outcome"] in ("averaged", "clipped", "lost", "timeout") for event in with_victim)
        assert all(event["seconds"] < DEADLINE_S + 1.0 for event in exchanges)

    back = swarm.join(victim.name, f"--peer={survivors[0].address}", SEQUENCES)
    resumed = back.wait_for("resumed")
    assert resumed["round"] >= round_before - 2  # the round it was in, and the one whose exchange was under way
    assert resumed["tokens"] > 0
    back.wait_for("exchange")


def test_ctrl_c_says_goodbye_and_a_second_join_resumes_without_an_address(
    swarm: Swarm, measured: Callable[[str, float], None]
) -> None:
    swarm.bootstrap()
    first, leaver = swarm.only(2)
    swarm.kill_bootstrap()
    leaver.wait_for_averaging()
    leaver_id = leaver.peer_id
    status_until(first, lambda d: (peer_in(d, leaver_id) or {}).get("state") == "training", timeout_s=30)
    round_before = last_round(leaver)

    seconds = leaver.interrupt()
    assert leaver.process.returncode == 0, leaver.errors
    assert leaver.errors == ""
    assert seconds < LEAVING_LIMIT_S
    summary = leaver.wait_for("summary")
    assert summary["tokens"] > 0
    assert summary["exchanges_ok"] > 0
    assert not summary["finished"]
    gone = status_until(first, lambda d: (peer_in(d, leaver_id) or {}).get("state") == "leaving", timeout_s=30)
    assert gone["swarm"]["training"] >= 1

    back = swarm.join(leaver.name, SEQUENCES)
    resumed = back.wait_for("resumed")
    assert resumed["round"] >= round_before
    assert resumed["tokens"] >= summary["tokens"]
    back.wait_for_averaging()
    assert back.peer_id == leaver_id
    measured("from Ctrl-C to the end", seconds)


def test_sigterm_leaves_properly_too_and_before_the_first_step(swarm: Swarm) -> None:
    first = swarm.trainers(1)[0]
    hasty = swarm.join("hasty", f"--peer={first.address}")
    assert hasty.address
    daemons = hasty.children()
    hasty.process.send_signal(signal.SIGTERM)
    assert hasty.process.wait(30) == 130
    assert "Traceback" not in hasty.errors
    psutil.wait_procs(daemons, timeout=10)
    assert not any(process.is_running() for process in daemons)


def test_the_bootstrap_leaves_properly(swarm: Swarm) -> None:
    bootstrap = swarm.bootstrap()
    daemons = bootstrap.children()
    seconds = bootstrap.interrupt()
    assert bootstrap.process.returncode == 0
    assert bootstrap.errors == ""
    assert seconds < LEAVING_LIMIT_S
    assert not any(process.is_running() for process in daemons)
