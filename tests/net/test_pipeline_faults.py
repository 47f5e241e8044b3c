"""What a pipeline outlives: a stage peer killed or frozen in the middle of a pass, a link cut; and who comes late helps most.

Three stages with two replicas each, real processes over libp2p, behind a switch of their own where the machine allows that.
Whatever happens, the others' iterations go on and end by their deadline, and no stage counts more tokens than were sent out.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from protocol.manifest import Manifest
from tests.net.faulty import give_order
from tests.net.namespaces import Namespaces, obstacle
from tests.net.process import Event, NodeProcess
from tests.net.swarm import LISTEN, RUN_SETTINGS, Swarm

pytestmark = [pytest.mark.net, pytest.mark.timeout(300)]

FRESH_LOSS = math.log(RUN_SETTINGS["model.vocab_size"])
NUM_STAGES, NUM_HOSTS = 3, 10
MICROBATCHES, SEQUENCES, SEQUENCE_TOKENS = 4, 2, 64
PER_MICROBATCH = SEQUENCES * SEQUENCE_TOKENS
HOP_TIMEOUT_S, ITERATION_TIMEOUT_S = 3.0, 15.0
RECORD_S = 4.0
"""A record is seen so long after it was read at the latest."""
LEEWAY_S = 2.0
"""For the inner step, which comes after the deadline, on a machine that has much else to do."""
SETTINGS: dict[str, Any] = RUN_SETTINGS | {
    "model.num_layers": 6,
    "inner.sequence_tokens": SEQUENCE_TOKENS,
    "pipeline.stages": NUM_STAGES,
    "pipeline.skip_ratio": 0.0,
    "pipeline.microbatches": MICROBATCHES,
    "pipeline.microbatch_sequences": SEQUENCES,
    "pipeline.slots": 2 * MICROBATCHES,
    "pipeline.hop_timeout_s": HOP_TIMEOUT_S,
    "pipeline.iteration_timeout_s": ITERATION_TIMEOUT_S,
    "sync.inner_steps": 10,
    "sync.snapshot_rounds": 1,
}
RATE_BITS_PER_S = 1_000_000_000


class Pipeline:
    """The swarm, and who holds which stage.

    Args:
        lines: a host for each peer; None puts all of them on this machine's loopback.
    """

    def __init__(self, swarm: Swarm, lines: Namespaces | None) -> None:
        self._swarm, self.lines = swarm, lines
        self._free_hosts = list(range(NUM_HOSTS))
        self._hosts: dict[str, int] = {}
        self._names = (f"peer-{number}" for number in itertools.count(1))
        self._bootstrap = self._start("bootstrap", "bootstrap", str(swarm.folder / "run.toml"))
        self.nodes: list[NodeProcess] = []
        """All that ever ran; one that was killed and came back is there twice."""

    # ---- processes

    def join(self, name: str = "", *, stage: int | None = None) -> NodeProcess:
        """Start a peer and wait for nothing.

        Args:
            name: of a peer that comes back; left out, it is a new one.
            stage: which it holds, since it has been there before; left out, it chooses.
        """
        name = name or next(self._names)
        if stage is not None:
            run = Manifest.from_toml((self._swarm.folder / "run.toml").read_text()).run_id
            (self._swarm.folder / name / "runs" / run / "checkpoints" / f"stage-{stage}").mkdir(parents=True)
        via = f"--peer={self._bootstrap.address}"
        node = self._start(name, "join", via, "--threads=1", orders=self._swarm.folder / f"{name}.orders")
        self.nodes.append(node)
        return node

    def _start(self, name: str, *arguments: str, orders: Path | None = None) -> NodeProcess:
        host = self._hosts[name] = self._hosts.get(name) or self._free_hosts.pop(0)
        faulty = () if orders is None else (sys.executable, "-m", "tests.net.faulty", str(orders))
        if self.lines is None:
            return self._swarm.start(name, *arguments, LISTEN, prefix=faulty)
        listen = f"--listen=/ip4/{self.lines.hosts[host]}/tcp/0"
        return self._swarm.start(name, *arguments, listen, prefix=(*self.lines.inside(host), *faulty))

    def order(self, node: NodeProcess, what: str, how: signal.Signals) -> None:
        """Tell a peer to fail in its next pass; see tests/net/faulty.py."""
        give_order(self._swarm.folder / f"{node.name}.orders", what, how)

    def cut(self, one: NodeProcess, other: NodeProcess) -> None:
        """Cut the link between two."""
        assert self.lines is not None
        self.lines.cut(self._hosts[one.name], self._hosts[other.name])

    def mend(self, one: NodeProcess, other: NodeProcess) -> None:
        """Undo `cut`."""
        assert self.lines is not None
        self.lines.mend(self._hosts[one.name], self._hosts[other.name])

    # ---- who is there

    @property
    def live(self) -> list[NodeProcess]:
        """Those that run."""
        return [node for node in self.nodes if node.is_alive]

    def replicas(self, stage: int) -> list[NodeProcess]:
        """The live peers of a stage."""
        return [node for node in self.live if stage_of(node) == stage]

    def all_but_one(self) -> list[NodeProcess]:
        """Those that train now: two of each stage, and one of the second."""
        for stage in () if self.nodes else (0, 0, 1, 2, 2):
            self.join(stage=stage)
        go_on(self.live)
        return self.live

    def both(self, stage: int) -> list[NodeProcess]:
        """The replicas of a stage, two at least; all that live train."""
        self.all_but_one()
        if len(self.replicas(stage)) < 2:
            self._bring_back()
        go_on(self.live)
        while len(self.replicas(stage)) < 2:
            self.join(stage=stage).wait_for("stage")
        go_on(self.live)
        return self.replicas(stage)

    def _bring_back(self) -> None:
        """Who was killed comes back to its stage."""
        alive = {node.name for node in self.live}
        for name in sorted({node.name for node in self.nodes} - alive):
            self.join(name)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with ExitStack() as stack:
        lines = None if obstacle() else stack.enter_context(Namespaces([RATE_BITS_PER_S] * NUM_HOSTS))
        swarm = stack.enter_context(Swarm(tmp_path_factory.mktemp("faults"), SETTINGS))
        yield Pipeline(swarm, lines)


# ---- what the events tell


def stage_of(node: NodeProcess) -> int:
    """Its stage, or the last one, if it has moved."""
    node.wait_for("stage")
    return int([event["stage"] for event in node.events if event["event"] == "stage"][-1])


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


def iterations(node: NodeProcess, since: int = 0) -> list[Event]:
    return [event for event in node.events[since:] if event["event"] == "iteration"]


def numbers_by_stay(node: NodeProcess) -> list[list[int]]:
    """The iterations of `node` in order, apart for every stage that it moved to."""
    stays: list[list[int]] = []
    for event in list(node.events):
        if event["event"] == "stage":
            stays.append([])
        elif event["event"] == "iteration":
            stays[-1].append(event["number"])
    return stays


def failures(node: NodeProcess, victim: str, kind: str, *, since: int) -> list[Event]:
    """The hops of this kind to `victim` that failed."""
    told = [event for event in node.events[since:] if event["event"] == "hop_failed"]
    return [event for event in told if event["peer"] == victim and event["kind"] == kind]


def go_on(nodes: list[NodeProcess], *, num_iterations: int = 3) -> None:
    """Each of these ends so many more iterations when all origins say so, and those of stage 0 with microbatches that came back."""
    for node, event in itertools.product(nodes, ("listening", "stage", "training")):
        node.wait_for(event)
    marks = [(node, node.mark()) for node in nodes]
    for node, mark in marks:
        least = int(stage_of(node) == 0)
        node.wait_for("iteration", functools.partial(_is_good, least), since=mark, count=num_iterations)


def _is_good(least: int, iteration: Event) -> bool:
    return bool(iteration["complete"] and iteration["returned"] >= least)


def busiest(nodes: list[NodeProcess]) -> NodeProcess:
    """The one with the most tokens in its last iterations: it will be asked again soon."""
    return max(nodes, key=lambda node: sum(event["tokens"] for event in iterations(node)[-5:]))


def check_counts(pipeline: Pipeline) -> None:
    """No stage has counted more tokens in an iteration than the origins sent out; and just as many where nothing failed."""
    told_by_all = min(iterations(node)[-1]["number"] for node in pipeline.live)
    counted: list[Counter[int]] = [Counter() for _ in range(NUM_STAGES)]
    sent: Counter[int] = Counter()
    disturbed = set()
    for node in pipeline.nodes:
        stage = 0
        for event in list(node.events):
            match event["event"]:
                case "stage":
                    stage = event["stage"]
                case "hop_failed":
                    disturbed.add(event["iteration"])
                case "iteration":
                    number = event["number"]
                    counted[stage][number] += event["tokens"]
                    sent[number] += (event["returned"] + event["lost"]) * PER_MICROBATCH
                    if event["lost"] or not event["complete"]:
                        disturbed.add(number)
        if not node.is_alive:  # nobody knows what it counted in its last iteration
            disturbed.add(iterations(node)[-1]["number"] + 1)
    numbers = [number for number in sent if number <= told_by_all]
    clean = [number for number in numbers if number not in disturbed]
    assert clean
    for tokens in counted:
        assert [(n, tokens[n], sent[n]) for n in numbers if tokens[n] > sent[n]] == []
        assert [(n, tokens[n], sent[n]) for n in clean if tokens[n] < sent[n]] == []


def check_losses(pipeline: Pipeline) -> None:
    """The origins' training losses are better than those of a model that knows nothing."""
    for node in pipeline.replicas(0):
        losses = [e["loss"] for e in node.events if e["event"] == "step" and e["loss"] is not None]
        assert max(losses[-3:]) < FRESH_LOSS - 0.3


def check(pipeline: Pipeline, nodes: list[NodeProcess], since: dict[str, int]) -> None:
    """What holds whatever happened to others, for `nodes`, whose events are numbered from `since` on."""
    for node in nodes:
        told = iterations(node, since[node.name])
        for numbers in numbers_by_stay(node):
            assert numbers == sorted(set(numbers)), "never the same iteration twice"
        assert max(event["seconds"] for event in told) <= ITERATION_TIMEOUT_S + LEEWAY_S
        assert [event for event in node.events if event["event"] == "log" and event["level"] == "error"] == []
        assert node.errors == ""
    check_counts(pipeline)
    check_losses(pipeline)


# ---- the stories


@pytest.mark.slow
def test_a_late_joiner_takes_the_stage_that_lacks_most(pipeline: Pipeline) -> None:
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
        ("forward", 1, 2 * HOP_TIMEOUT_S),
        pytest.param("backward", 2, 2 * HOP_TIMEOUT_S, marks=pytest.mark.slow),
        pytest.param("forward", 2, 60.0, marks=pytest.mark.slow),
        pytest.param("backward", 1, 60.0, marks=pytest.mark.slow),
    ],
)
def test_a_frozen_peer_is_replaced_and_counts_nothing_twice(
    pipeline: Pipeline, what: str, stage: int, seconds: float
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
def test_a_cut_link_is_gone_around(pipeline: Pipeline) -> None:
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
def test_a_peer_killed_in_the_middle_of_a_pass_is_replaced(pipeline: Pipeline, what: str, stage: int) -> None:
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
