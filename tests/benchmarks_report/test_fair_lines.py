"""The simulation with shared lines agrees with the planner's where nothing is shared, and differs where it must."""

from __future__ import annotations

import pytest

from node.pipeline.case import Case
from node.pipeline.plan import Microbatch, Plan
from node.pipeline.replay import replay
from tests.benchmarks.pipeline_peers.fair_lines import replay_fairly

PARTITION = ((0, 1), (2,))
LATENCY_S, LINE_S = 0.1, 1.0
CASE = Case(
    num_nodes=3,
    stage_sizes=(2, 1),
    path_length=2,
    slots_per_node=(2,),
    rounds=1,
    forward_s=(0.01,) * 3,
    backward_multiplier=2.0,
    loss_multiplier=1.0,
    link_s=tuple(tuple(0.0 if a == b else LATENCY_S + LINE_S for b in range(3)) for a in range(3)),
    uplink_s=(LINE_S,) * 3,
    downlink_s=(LINE_S,) * 3,
    partition=PARTITION,
)
AFTERWARDS_S = 2 * LATENCY_S + LATENCY_S
"""The origin's last question and answer, and the news that it was the last."""


def plan(*origins: int) -> Plan:
    """One microbatch of each of these."""
    return Plan(
        partition=PARTITION,
        microbatches=tuple(Microbatch(path=(origin, 2), priority=origin) for origin in origins),
        dispatch="backward_first",
    )


def test_alone_a_microbatch_takes_as_long_in_both() -> None:
    alone = plan(0)
    assert replay_fairly(CASE, alone) == pytest.approx(replay(CASE, alone)[0] + AFTERWARDS_S)


def test_two_on_a_line_are_both_late() -> None:
    """Each of the four ways takes twice as long; one after the other, the first is gone before the second needs the line again."""
    both = plan(0, 1)
    ways_s = 4 * (2 * LINE_S + LATENCY_S)
    assert replay_fairly(CASE, both) == pytest.approx(ways_s + AFTERWARDS_S, abs=0.1)
    assert replay(CASE, both)[0] < 0.7 * ways_s
