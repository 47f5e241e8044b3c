"""Simulated pipelines: repeatable, as long as a calculation by hand says, and nothing counted twice whatever happens."""

from __future__ import annotations

import json
from typing import Any

import pytest

from model.config import PRESETS
from node.simulation.run import simulate
from node.simulation.scenario import Scenario
from node.simulation.staged_tally import StagedTally

LATENCY_S = 0.05
BYTES_PER_S = 2e6
MODEL = {"preset": "100m", "sequence_tokens": 256, "forward_s": 1.0}
PIPELINE = {
    "stages": 2,
    "skip_ratio": 0.0,
    "microbatches": 2,
    "microbatch_sequences": 2,
    "hop_timeout_s": 30.0,
    "iteration_timeout_s": 100.0,
}


def scenario(peers: int = 4, rounds: int = 2, *, seed: int = 0, **sections: dict[str, Any]) -> Scenario:
    defaults: dict[str, dict[str, Any]] = {
        "swarm": {"peers": peers, "rounds": rounds, "parameters": 32, "seed": seed, "heartbeat_s": 10.0},
        "model": MODEL,
        "pipeline": PIPELINE,
        "links": {"latency_s": LATENCY_S, "bytes_per_s": BYTES_PER_S},
        "sync": {"inner_steps": 2, "round_target_s": 30.0},
    }
    names = defaults.keys() | sections.keys()
    return Scenario.model_validate({name: defaults.get(name, {}) | sections.get(name, {}) for name in names})


BUSY: dict[str, Any] = {
    "pipeline": {"stages": 3, "skip_ratio": 0.3},
    "links": {"latency_message_ratio": 1.0, "latency_pair_ratio": 0.5, "bytes_per_s_ratio": 0.5},
    "training": {"peer_ratio": 0.3, "round_ratio": 0.2, "slow_share": 0.2},
    "churn": {"joins_per_hour": 300.0, "leaves_per_hour": 20.0, "crashes_per_hour": 20.0, "join_s": 5.0},
}
"""Everything that is drawn at random."""


def test_the_same_seed_gives_the_same_result_to_the_last_bit() -> None:
    first = simulate(scenario(9, **BUSY))
    assert first == simulate(scenario(9, **BUSY))
    assert first != simulate(scenario(9, seed=1, **BUSY))
    assert first["population"]["joined"] > 0
    json.dumps(first, allow_nan=False)


@pytest.mark.parametrize("codec", ["bf16", "fp32"])
def test_one_microbatch_over_two_peers_takes_what_a_calculation_says(codec: str) -> None:
    result = simulate(scenario(2, 1, pipeline={"microbatches": 1, "codec": codec}))
    values = 2 * MODEL["sequence_tokens"] * PRESETS["100m"].hidden_size  # type: ignore[operator]
    payload_s = values * {"bf16": 2, "fp32": 4}[codec] / BYTES_PER_S
    # A stream is opened in a round trip; the task and its payload follow at once.
    hop_s = 3 * LATENCY_S + payload_s
    passes_s = 2 * 1.0 + 1.0 + 2 * 3.0  # forward twice, head and loss, backward twice
    counting_s = 2 * LATENCY_S  # after the last backward pass: computed, count it; the other's went on meanwhile
    expected_s = passes_s + 4 * hop_s + counting_s  # to the other and back, twice
    telling_s = (
        3 * LATENCY_S
    )  # a stream and a notice that the iteration has ended; for the other one the first takes so much longer
    (first, second) = result["by_iteration"]["median_s"]
    assert first == pytest.approx(expected_s + telling_s / 2, rel=0.001), "headers are small; the median of two"
    assert second == pytest.approx(expected_s, rel=0.001)
    at_work_s = [2 * (1.0 + 1.0 + 3.0), 2 * (1.0 + 3.0)]
    shares = [seconds / (2 * expected_s) for seconds in at_work_s]
    assert result["by_stage"]["utilisation"] == pytest.approx(shares, rel=0.1), "there is a farewell, too"


def test_a_swarm_without_mishaps_loses_nothing() -> None:
    result = simulate(scenario(9, pipeline={"stages": 3, "skip_ratio": 0.3}))
    assert result["finished"]
    assert result["path_length"] == 2
    assert result["microbatches"] == {"sent": 3 * 2 * 4, "returned": 24, "lost": 0, "rerouted": 0}
    assert result["visits_per_microbatch"] == 2.0
    assert result["by_stage"]["visits"][0] == 24 == sum(result["by_stage"]["visits"][1:])
    assert result["tokens"] == 24 * 2 * 256
    assert result["tokens_per_s"] == pytest.approx(
        result["tokens"] / (result["by_iteration"]["ended_s"][-1] - result["start_s"])
    )
    assert result["failures"] == {}
    assert result["peer_iterations"] == 9 * 4
    assert result["overdue"] == 0
    assert result["exchanges"].get("averaged", 0) > 0, "each stage's replicas average among themselves"
    assert result["by_iteration"]["peers"] == [[3, 3, 3]] * 4
    alone = simulate(scenario(9, pipeline={"stages": 3, "skip_ratio": 0.3}, sync={"algorithm": "local"}))
    assert alone["exchanges"] == {}
    assert result["by_round"]["spread"][-1] < 0.9 * alone["by_round"]["spread"][-1]


def test_a_swarm_of_several_pipelines_keeps_them_apart_and_averages_across() -> None:
    """Too many for one bucket of the directory. Who reads another bucket meets partners there, but nobody to send microbatches to:
    those do not know it, and would not tell it when their iterations have ended."""
    result = simulate(
        scenario(
            48,
            swarm={"heartbeat_s": 3.0},
            model={"forward_s": 0.2},
            pipeline={"microbatches": 1, "hop_timeout_s": 10.0},
            links={"bytes_per_s": 1e8},
            sync={"inner_steps": 8},
        )
    )
    assert result["finished"]
    assert result["known_peers"]["mean"] < 40
    assert (result["microbatches"]["lost"], result["microbatches"]["rerouted"], result["failures"]) == (0, 0, {})
    assert result["overdue"] == 0
    assert result["exchanges"]["averaged"] > 48


def test_what_comes_and_goes_is_counted_once_or_lost() -> None:
    churn = {"joins_per_hour": 120.0, "leaves_per_hour": 4.0, "crashes_per_hour": 8.0, "join_s": 5.0}
    result = simulate(scenario(12, 4, **BUSY | {"churn": churn}))
    fates = result["microbatches"]
    assert result["population"]["crashed"] > 0
    assert result["population"]["joined"] > 0
    assert fates["lost"] > 0
    assert fates["returned"] > fates["lost"]
    assert fates["sent"] == fates["returned"] + fates["lost"]
    assert result["double_counts"] == 0
    assert max(result["by_stage"]["visits"]) <= fates["sent"]
    assert result["tokens"] <= fates["sent"] * 512
    assert sum(result["failures"].values()) > 0


def test_a_second_count_would_be_seen() -> None:
    tally = StagedTally(num_stages=2, num_parameters=1)
    tally.start(7, 0)
    for stage in (1, 0, 1):
        tally.count_visit(7, stage)
    assert tally.summary(microbatch_tokens=1, start_s=0.0)["double_counts"] == 1


def test_more_microbatches_keep_peers_busier_and_slow_lines_cost_time() -> None:
    few, many = (simulate(scenario(2, 1, pipeline={"microbatches": count})) for count in (1, 4))
    assert many["tokens_per_s"] > 1.3 * few["tokens_per_s"]
    assert many["by_stage"]["utilisation"][0] > few["by_stage"]["utilisation"][0]
    lines = [{"share": 1.0, "up_bytes_per_s": 1e5, "down_bytes_per_s": 1e6}]
    slow = simulate(scenario(2, 1, pipeline={"microbatches": 1}, links={"classes": lines}))
    payload_bytes = 2 * 2 * 256 * PRESETS["100m"].hidden_size
    more_s = 4 * payload_bytes * (1 / 1e5 - 1 / BYTES_PER_S)
    assert slow["iteration_s"]["p50"] - few["iteration_s"]["p50"] == pytest.approx(more_s, rel=0.02)


def test_a_swarm_that_has_lost_its_stages_comes_to_an_end() -> None:
    result = simulate(scenario(4, 5, churn={"crashes_per_hour": 200.0}))
    assert result["population"]["crashed"] >= 1
    json.dumps(result, allow_nan=False)


def test_a_newcomer_takes_the_stage_that_is_short_and_works() -> None:
    result = simulate(scenario(5, 6, churn={"joins_per_hour": 60.0, "join_s": 1.0}))
    joined = result["population"]["joined"]
    assert joined >= 1
    assert result["by_iteration"]["peers"][0] == [3, 2]
    assert result["by_iteration"]["peers"][-1][1] >= 3
    assert result["finished"]
