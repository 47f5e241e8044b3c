"""The swarm of the pipeline benchmark: who is where, behind which line, how fast, and with which stage.

Lines of three speeds, the same in both directions, in three regions; processors of three speeds. All three are dealt out by a lot
with a fixed seed, each class to a third of the peers, and nobody is moved to a stage where it would do better: volunteers come as
they come.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from node.pipeline.case import Case
from node.pipeline.live_case import SPREAD, closing_s
from node.pipeline.plan import Microbatch, Plan
from node.pipeline.rules import orders

__all__ = ["World", "draw_world", "random_plan"]

T = TypeVar("T")

RATES_BITS_PER_S = (10_000_000, 25_000_000, 50_000_000)
FORWARD_S = (0.04, 0.06, 0.09)
BACKWARD_MULTIPLIER, LOSS_MULTIPLIER = 2.0, 0.5
REGIONS_S = ((0.002, 0.020, 0.045), (0.020, 0.002, 0.060), (0.045, 0.060, 0.002))
"""One-way latency between two peers of these regions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The swarm.

    Args:
        stages: of each peer, in ascending order.
        rates_bits_per_s, regions, forward_s: of each peer.
        slots: of every peer.
        microbatches: that a peer of stage 0 starts per iteration.
    """

    stages: tuple[int, ...]
    rates_bits_per_s: tuple[int, ...]
    regions: tuple[int, ...]
    forward_s: tuple[float, ...]
    slots: int
    microbatches: int

    @property
    def num_stages(self) -> int:
        """Stages of the model."""
        return self.stages[-1] + 1

    @property
    def latency_s(self) -> list[list[float]]:
        """One-way, between all peers."""
        return [
            [0.0 if a == b else REGIONS_S[x][y] for b, y in enumerate(self.regions)] for a, x in enumerate(self.regions)
        ]

    def case(self, path_length: int, payload_bytes: float, link_s: Sequence[Sequence[float]]) -> Case:
        """What a planner is told: the numbers by which the swarm was built.

        Args:
            payload_bytes: of a microbatch's activations, packets' headers included.
            link_s: what they take from row to column while nothing else is sent: latency, line, and TCP's slow start.
        """
        bits, rates, peers = 8 * payload_bytes, self.rates_bits_per_s, range(len(self.stages))
        latency_s = self.latency_s
        total = self.microbatches * self.stages.count(0)
        return Case(
            name=f"{path_length} of {self.num_stages} stages",
            num_nodes=len(self.stages),
            stage_sizes=tuple(self.stages.count(stage) for stage in range(self.num_stages)),
            path_length=path_length,
            slots_per_node=(self.slots,) * len(self.stages),
            rounds=self.microbatches // self.slots,
            max_visits=(total,) * len(self.stages),
            forward_s=self.forward_s,
            backward_multiplier=BACKWARD_MULTIPLIER,
            loss_multiplier=LOSS_MULTIPLIER,
            link_s=tuple(map(tuple, link_s)),
            uplink_s=tuple(bits / rate for rate in rates),
            downlink_s=tuple(bits / rate for rate in rates),
            closing_s=closing_s(latency_s),
            spread=SPREAD,
            partition=tuple(
                tuple(peer for peer in peers if self.stages[peer] == stage) for stage in range(self.num_stages)
            ),
        )


def draw_world(stage_sizes: tuple[int, ...], *, slots: int, microbatches: int, seed: int = 0) -> World:
    """Peers for these stages."""
    rng = random.Random(seed)
    count = sum(stage_sizes)

    def deal(classes: Sequence[T]) -> tuple[T, ...]:
        return tuple(rng.sample([classes[index % len(classes)] for index in range(count)], count))

    return World(
        stages=tuple(stage for stage, size in enumerate(stage_sizes) for _ in range(size)),
        rates_bits_per_s=deal(RATES_BITS_PER_S),
        regions=deal(tuple(range(len(REGIONS_S)))),
        forward_s=deal(FORWARD_S),
        slots=slots,
        microbatches=microbatches,
    )


def random_plan(case: Case, *, seed: int) -> Plan:
    """Every microbatch takes a random order of stages that the rules allow, and of each stage a random peer."""
    assert case.partition is not None
    rng = random.Random(seed)
    choices = orders(case.num_stages, case.path_length)
    microbatches = []
    for start in case.partition[0]:
        for number in range(case.starts(start)):
            _, *others = rng.choice(choices)
            path = (start, *(rng.choice(case.partition[stage]) for stage in others))
            microbatches.append(Microbatch(path=path, priority=float(number)))
    return Plan(partition=case.partition, microbatches=tuple(microbatches), dispatch="backward_first")
