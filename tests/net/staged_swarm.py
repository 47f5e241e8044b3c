"""A staged run of real processes over libp2p: three stages, who holds which, and what holds whatever happens to some of them.

Behind a switch of their own where the machine allows that, else on its loopback.
"""

from __future__ import annotations

import functools
import itertools
import math
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from protocol.manifest import Manifest
from tests.net.faulty import give_order
from tests.net.namespaces import Namespaces
from tests.net.process import Event, NodeProcess
from tests.net.swarm import LISTEN, RUN_SETTINGS, Swarm

__all__ = [
    "HOP_TIMEOUT_S",
    "NUM_HOSTS",
    "NUM_STAGES",
    "SETTINGS",
    "StagedSwarm",
    "check",
    "go_on",
    "iterations",
    "stage_of",
    "training_losses",
]

FRESH_LOSS = math.log(RUN_SETTINGS["model.vocab_size"])
NUM_STAGES, NUM_HOSTS = 3, 10
MICROBATCHES, SEQUENCES, SEQUENCE_TOKENS = 4, 2, 64
PER_MICROBATCH = SEQUENCES * SEQUENCE_TOKENS
HOP_TIMEOUT_S, ITERATION_TIMEOUT_S = 3.0, 15.0
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


class StagedSwarm:
    """The swarm, and who holds which stage.

    Args:
        lines: a host for each peer; None puts all of them on this machine's loopback, with a status page each.
    """

    def __init__(self, swarm: Swarm, lines: Namespaces | None) -> None:
        self.swarm, self.lines = swarm, lines
        self._free_hosts = list(range(NUM_HOSTS))
        self._hosts: dict[str, int] = {}
        self._names = (f"peer-{number}" for number in itertools.count(1))
        self.bootstrap = self._start("bootstrap", "bootstrap", str(swarm.folder / "run.toml"))
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
            run = Manifest.from_toml((self.swarm.folder / "run.toml").read_text()).run_id
            (self.swarm.folder / name / "runs" / run / "checkpoints" / f"stage-{stage}").mkdir(parents=True)
        via = f"--peer={self.bootstrap.address}"
        node = self._start(name, "join", via, "--threads=1", orders=self.swarm.folder / f"{name}.orders")
        self.nodes.append(node)
        return node

    def _start(self, name: str, *arguments: str, orders: Path | None = None) -> NodeProcess:
        host = self._hosts[name] = self._hosts.get(name) or self._free_hosts.pop(0)
        faulty = () if orders is None else (sys.executable, "-m", "tests.net.faulty", str(orders))
        if self.lines is None:
            return self.swarm.start(name, *arguments, LISTEN, "--http=127.0.0.1:0", prefix=faulty)
        listen = f"--listen=/ip4/{self.lines.hosts[host]}/tcp/0"
        return self.swarm.start(name, *arguments, listen, prefix=(*self.lines.inside(host), *faulty))

    def order(self, node: NodeProcess, what: str, how: signal.Signals) -> None:
        """Tell a peer to fail in its next pass; see tests/net/faulty.py."""
        give_order(self.swarm.folder / f"{node.name}.orders", what, how)

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


# ---- what the events tell


def stage_of(node: NodeProcess) -> int:
    """Its stage, or the last one, if it has moved."""
    node.wait_for("stage")
    return int([event["stage"] for event in node.events if event["event"] == "stage"][-1])


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


def check_counts(pipeline: StagedSwarm) -> None:
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


def check_losses(pipeline: StagedSwarm) -> None:
    """The origins' training losses are better than those of a model that knows nothing."""
    for node in pipeline.replicas(0):
        assert max(training_losses(node)[-3:]) < FRESH_LOSS - 0.3


def training_losses(node: NodeProcess) -> list[float]:
    """The losses of an origin's own microbatches, iteration by iteration where any came back."""
    return [event["loss"] for event in node.events if event["event"] == "step" and event["loss"] is not None]


def check(pipeline: StagedSwarm, nodes: list[NodeProcess], since: dict[str, int]) -> None:
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
