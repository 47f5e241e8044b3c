"""A stage that loses all its peers at once, real processes over libp2p: another peer moves there, and training goes on.

Its state comes from a copy that peers of the stage before keep, with the bootstrap node gone, too; and where the copies are lost as
well, from the layers around it.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.net.process import Event, NodeProcess
from tests.net.staged_swarm import NUM_STAGES, SETTINGS, StagedSwarm, check, go_on, training_losses
from tests.net.swarm import Swarm, status_until

pytestmark = [pytest.mark.net, pytest.mark.slow, pytest.mark.timeout(400)]

LOST = 1
"""The stage whose peers are killed; those of the one before keep copies of its state."""
NOTICED_S = 120.0
"""By then its peers count as gone: 45 s after their last records, and some looks of a machine that has much else to do."""


@pytest.fixture
def pipeline(tmp_path: Path) -> Iterator[StagedSwarm]:
    """Two peers of each stage at work, and copies of the stages' states where they belong."""
    with Swarm(tmp_path, SETTINGS) as swarm:
        pipeline = StagedSwarm(swarm, None)
        for stage in range(NUM_STAGES):
            for _ in range(2):
                pipeline.join(stage=stage)
        go_on(pipeline.live)
        for keeper in pipeline.replicas(LOST - 1):
            keeper.wait_for("stage_archived", lambda event: event["round"] > 0)
        yield pipeline


@pytest.mark.parametrize("source", ["snapshot", "neighbours"])
def test_a_stage_that_lost_all_its_peers_is_rebuilt(pipeline: StagedSwarm, source: str) -> None:
    victims, keepers = pipeline.replicas(LOST), pipeline.replicas(LOST - 1)
    others = [node for node in pipeline.live if node not in victims]
    marks = {node.name: node.mark() for node in others}
    began = {node.name: mean(training_losses(node)[:5]) for node in keepers}
    kill([pipeline.bootstrap, *victims])
    copies = {ref["root"]: ref["round"] for node in keepers for ref in archived(node)}
    if source == "neighbours":
        lose_copies(keepers, copies)

    told = status_until(keepers[0], lambda document: holders(document)[LOST] == 0, timeout_s=NOTICED_S)
    assert [line for line in told["warnings"] if f"Nobody holds stage {LOST}" in line]
    status_until(keepers[0], lambda document: holders(document)[LOST] == 1, timeout_s=NOTICED_S)
    (mover,) = [node for node in others if events(node, "stage_rebuilt")]
    (rebuilt,) = events(mover, "stage_rebuilt")
    assert (rebuilt["stage"], rebuilt["source"]) == (LOST, source)
    assert source == "neighbours" or rebuilt["round"] in copies.values()
    assert [event["to"] for node in others for event in events(node, "moving")] == [LOST]

    mark = mover.mark()
    go_on(others)
    mover.wait_for("iteration", lambda event: event["tokens"] > 0, since=mark)
    check(pipeline, others, marks)
    assert [node.errors for node in victims] == ["", ""], "nothing of them lives on and complains"
    for node in keepers:
        assert mean(training_losses(node)[-5:]) <= began[node.name]
    shown = pipeline.swarm.command("status", f"--peer={keepers[0].address}")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"{LOST}: 1" in shown.stdout
    assert "Nobody holds" not in shown.stdout


def kill(nodes: list[NodeProcess]) -> None:
    """All at the same moment."""
    for node in nodes:
        node.process.send_signal(signal.SIGKILL)
    for node in nodes:
        assert node.process.wait(60) == -signal.SIGKILL


def archived(node: NodeProcess) -> list[dict[str, Any]]:
    """The snapshots that a peer keeps of the lost stage, as its folder lists them: one, or none."""
    (listed,) = node.home.glob("runs/*/copies.json")
    kept: dict[str, dict[str, Any]] = json.loads(listed.read_text())
    return [kept[str(LOST)]] if str(LOST) in kept else []


def lose_copies(keepers: list[NodeProcess], copies: dict[str, int]) -> None:
    """Somebody clears their disks."""
    for node in keepers:
        for root in copies:
            (node.home / "blobs" / root).unlink(missing_ok=True)


def events(node: NodeProcess, name: str) -> list[Event]:
    return [event for event in list(node.events) if event["event"] == name]


def holders(document: dict[str, Any]) -> list[int]:
    """How many peers hold each stage, by a status document."""
    return [stage["peers"] for stage in document["stages"]]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
