"""What a pipeline outlives: a stage peer killed or frozen in the middle of a pass, a link cut; and who comes late helps most.

Three stages with two replicas each, real processes over libp2p, behind a switch of their own where the machine allows that.
Whatever happens, the others' iterations go on and end by their deadline, and no stage counts more tokens than were sent out.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import psutil
import pytest

from tests.net.namespaces import Namespaces, obstacle
from tests.net.process import Event, NodeProcess
from tests.net.staged_swarm import (
    HOP_TIMEOUT_S,
    NUM_HOSTS,
    NUM_STAGES,
    SETTINGS,
    StagedSwarm,
    check,
    go_on,
    iterations,
    stage_of,
)
from tests.net.swarm import Swarm

pytestmark = [pytest.mark.net, pytest.mark.timeout(300)]

RECORD_S = 4.0
"""A record is seen so long after it was read at the latest."""
RATE_BITS_PER_S = 1_000_000_000


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StagedSwarm]:
    with ExitStack() as stack:
        lines = None if obstacle() else stack.enter_context(Namespaces([RATE_BITS_PER_S] * NUM_HOSTS))
        swarm = stack.enter_context(Swarm(tmp_path_factory.mktemp("faults"), SETTINGS))
        yield StagedSwarm(swarm, lines)


# ---- what the events tell


def lacked_most(node: NodeProcess) -> set[int]:
    """The stages that at some time until `node` chose were the slowest, all their peers together, by the records it had seen."""
    until_s = node.wait_for("stage")["t"] + RECORD_S
    (history,) = node.home.glob("runs/*/status.db")
    with contextlib.closing(sqlite3.connect(f"file:{history}?mode=ro", uri=True)) as database:
        rows = database.execute(
            "SELECT record FROM records WHERE seen_at_s < ? ORDER BY seen_at_s", (until_s,)
        ).fetchall()
    latest: dict[str, dict[str, Any]] = {}
    found = set()
    for (row,) in rows:
        record = json.loads(row)
        if record["peer"] != node.peer_id and record["stage"] is not None:
            latest[record["peer"]] = record
        speeds = [
            sum(1 / r["forward_s"] for r in latest.values() if r["stage"] == stage) for stage in range(NUM_STAGES)
        ]
        found.add(speeds.index(min(speeds)))
    return found


def failures(node: NodeProcess, victim: str, kind: str, *, since: int) -> list[Event]:
    """The hops of this kind to `victim` that failed."""
    told = [event for event in node.events[since:] if event["event"] == "hop_failed"]
    return [event for event in told if event["peer"] == victim and event["kind"] == kind]


def busiest(nodes: list[NodeProcess]) -> NodeProcess:
    """The one with the most tokens in its last iterations: it will be asked again soon."""
    return max(nodes, key=lambda node: sum(event["tokens"] for event in iterations(node)[-5:]))


# ---- the stories


@pytest.mark.slow
def test_a_late_joiner_takes_the_stage_that_lacks_most(pipeline: StagedSwarm) -> None:
    others = pipeline.all_but_one()
    number = max(iterations(node)[-1]["number"] for node in others)
    late = pipeline.join()
    late.wait_for("training")
    assert stage_of(late) in lacked_most(late)
    first = late.wait_for("iteration", lambda event: event["tokens"] > 0)
    assert first["number"] > number
    go_on(pipeline.live)
    check(pipeline, others, dict.fromkeys((node.name for node in others), 0))


@pytest.mark.parametrize(
    ("what", "stage", "seconds"),
    [
        pytest.param("forward", 1, 2 * HOP_TIMEOUT_S, marks=pytest.mark.slow),
        pytest.param("backward", 2, 2 * HOP_TIMEOUT_S, marks=pytest.mark.slow),
        pytest.param("forward", 2, 60.0, marks=pytest.mark.slow),
        pytest.param("backward", 1, 60.0, marks=pytest.mark.slow),
    ],
)
def test_a_frozen_peer_is_replaced_and_counts_nothing_twice(
    pipeline: StagedSwarm, what: str, stage: int, seconds: float
) -> None:
    victim = busiest(pipeline.both(stage))
    others = [node for node in pipeline.live if node is not victim]
    marks = {node.name: node.mark() for node in others}
    pipeline.order(victim, what, signal.SIGSTOP)
    os.waitid(os.P_PID, victim.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert victim.is_alive
    frozen = [psutil.Process(victim.process.pid), *victim.children()]
    for process in frozen[1:]:  # the whole machine
        process.suspend()
    frozen_s = time.monotonic()
    go_on(others)
    for node in others:
        until_s = frozen_s + seconds - node.started_s
        node.wait_for("iteration", functools.partial(_comes_after, until_s))
    assert [told for node in others for told in failures(node, victim.peer_id, what, since=marks[node.name])]
    number = max(iterations(node)[-1]["number"] for node in others)
    for process in reversed(frozen):
        process.resume()
    victim.wait_for("iteration", lambda event: event["number"] > number and event["tokens"] > 0)
    go_on(pipeline.live)
    check(pipeline, others, marks)


@pytest.mark.slow
def test_a_cut_link_is_gone_around(pipeline: StagedSwarm) -> None:
    if pipeline.lines is None:
        pytest.skip(str(obstacle()))
    other = busiest(pipeline.both(1))
    one = pipeline.replicas(0)[0]
    marks = {node.name: node.mark() for node in pipeline.live}
    pipeline.cut(one, other)
    one.wait_for("hop_failed", lambda event: event["peer"] == other.peer_id, since=marks[one.name])
    go_on(pipeline.live)
    pipeline.mend(one, other)
    go_on(pipeline.live)
    check(pipeline, pipeline.live, marks)


@pytest.mark.parametrize(("what", "stage"), [("forward", 1), ("backward", 2)])
def test_a_peer_killed_in_the_middle_of_a_pass_is_replaced(pipeline: StagedSwarm, what: str, stage: int) -> None:
    victim = busiest(pipeline.both(stage))
    others = [node for node in pipeline.live if node is not victim]
    marks = {node.name: node.mark() for node in others}
    pipeline.order(victim, what, signal.SIGKILL)
    assert victim.process.wait(60) == -signal.SIGKILL
    go_on(others)
    assert [told for node in others for told in failures(node, victim.peer_id, what, since=marks[node.name])]
    check(pipeline, others, marks)


def _comes_after(seconds: float, event: Event) -> bool:
    return bool(event["after_s"] > seconds)
