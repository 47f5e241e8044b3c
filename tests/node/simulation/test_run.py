"""Simulated swarms: repeatable, and with the outcome that the scenario asks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from node.simulation.quadratic import Quadratic, QuadraticConfig, common_optimum, loss_of
from node.simulation.run import simulate
from node.simulation.scenario import Scenario
from protocol import directory

LINKS = {"latency_s": 0.02}
QUICK = {"inner_steps": 10, "round_target_s": 10.0}


def scenario(peers: int = 8, rounds: int = 4, *, seed: int = 0, **sections: dict[str, Any]) -> Scenario:
    swarm = {"peers": peers, "rounds": rounds, "parameters": 32, "seed": seed, "heartbeat_s": 5.0}
    return Scenario.model_validate(
        {
            "swarm": swarm,
            **sections,
            "links": LINKS | sections.get("links", {}),
            "sync": QUICK | sections.get("sync", {}),
        }
    )


BUSY: dict[str, Any] = {
    "links": {"latency_message_ratio": 1.0, "latency_pair_ratio": 0.5, "exchange_loss": 0.2},
    "training": {"peer_ratio": 0.3, "round_ratio": 0.2, "slow_share": 0.2},
    "churn": {"joins_per_hour": 200.0, "leaves_per_hour": 10.0, "crashes_per_hour": 10.0, "join_s": 5.0},
}
"""Everything that is drawn at random."""


def test_the_same_seed_gives_the_same_result_to_the_last_bit() -> None:
    first = simulate(scenario(8, 5, **BUSY))
    assert first == simulate(scenario(8, 5, **BUSY))
    assert first != simulate(scenario(8, 5, seed=1, **BUSY))
    assert first["population"]["joined"] > 0
    assert first["population"]["left"] + first["population"]["crashed"] > 0
    json.dumps(first)


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_order_of_sets() -> None:
    script = (
        "import json; from tests.node.simulation.test_run import BUSY, scenario; from node.simulation.run import simulate;"
        "print(json.dumps(simulate(scenario(40, 4, **BUSY))))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(outputs) == 1


def test_slow_weights_travel_under_the_steps_if_the_run_says_so() -> None:
    """The same pairs meet; of the bytes that an exchange waits for, those of φ are gone in most."""
    sync = {"theta_only": False, "slow_codec": "bf16", "delta_codec": "q4"}
    swarm = {"peers": 8, "rounds": 6, "parameters": 1 << 14, "heartbeat_s": 5.0}
    first, later = (
        simulate(scenario(swarm=swarm, links={"bytes_per_s": 20_000.0}, sync=QUICK | sync | {"early_slow": early}))
        for early in (False, True)
    )
    assert later["exchanges"] == first["exchanges"]
    assert later["exchange_s"]["p50"] < 0.6 * first["exchange_s"]["p50"]


def test_equal_peers_on_good_links_all_average() -> None:
    result = simulate(scenario(8, 4))
    assert result["success_share"] == 1.0
    assert result["exchanges"] == {"averaged": 32}
    assert result["peer_rounds"] == 32
    assert result["round_s"]["p50"] == pytest.approx(10.0)
    # Opening a stream, proposal, answer, offers, payloads and receipts are at least six one-way latencies.
    assert result["exchange_cdf_s"][0] >= 6 * 0.02
    assert result["exchange_cdf_s"] == sorted(result["exchange_cdf_s"])
    assert result["by_round"]["round"] == [0, 1, 2, 3]


def test_averaging_keeps_replicas_together_and_their_mean_learns() -> None:
    together = simulate(scenario(12, 10))["by_round"]
    alone = simulate(scenario(12, 10, sync={"algorithm": "local"}))
    assert alone["exchanges"] == {}
    assert together["spread"][-1] < 0.7 * alone["by_round"]["spread"][-1]
    assert together["replica_loss"][-1] < 0.6 * alone["by_round"]["replica_loss"][-1]
    assert together["mean_loss"][-1] < 0.1 * together["mean_loss"][0]


@pytest.mark.parametrize("sync", [{"algorithm": "diloco"}, {"algorithm": "pair-average", "slow_codec": "fp32"}])
def test_other_algorithms_run_as_the_manifest_names_them(sync: dict[str, Any]) -> None:
    result = simulate(scenario(4, 3, sync=sync))
    assert result["algorithm"] == sync["algorithm"]
    assert result["exchanges"] == {"averaged": 4 * 3 * (3 if sync["algorithm"] == "diloco" else 1)}


def test_diloco_without_losses_has_one_model() -> None:
    result = simulate(scenario(4, 4, sync={"algorithm": "diloco", "overlap": False}))
    assert max(result["by_round"]["spread"]) < 0.01  # the Δ codec's rounding


def test_lost_exchanges_are_lost_in_the_share_asked_for_and_cost_consensus() -> None:
    sound, lossy = (
        simulate(scenario(16, 6, links={"exchange_loss": loss}, sync={"inner_steps": 20})) for loss in (0.0, 0.5)
    )
    total = sum(lossy["exchanges"].values())
    assert lossy["exchanges"]["lost"] / total == pytest.approx(0.5, abs=0.15)
    assert lossy["by_round"]["spread"][-1] > 1.1 * sound["by_round"]["spread"][-1]


def test_stragglers_make_longer_rounds() -> None:
    slow = simulate(scenario(8, 3, training={"slow_share": 0.3, "slow_factor": 3.0}))
    assert slow["round_s"]["max"] >= 30.0 > simulate(scenario(8, 3))["round_s"]["max"]


def test_a_crash_is_survived_and_a_newcomer_begins_with_the_others_weights() -> None:
    result = simulate(scenario(10, 12, churn={"crashes_per_hour": 12.0, "joins_per_hour": 120.0, "join_s": 1.0}))
    assert result["population"]["crashed"] > 0
    assert result["population"]["joined"] > 0
    assert result["by_round"]["round"][-1] == 11
    # One that began from nothing would be a whole unit away.
    assert max(result["by_round"]["spread"]) < 0.3


def test_a_measured_table_sets_the_pace(tmp_path: Path) -> None:
    (tmp_path / "far.csv").write_text("from,to,latency_ms,mbit_per_s\na,b,500,1\na,a,1,100\nb,b,1,100\n")
    result = simulate(scenario(2, 2, links={"matrix": "far.csv"}), tmp_path)
    assert result["exchange_cdf_s"][0] >= 6 * 0.5


def test_checks_are_shared_only_while_a_simulation_runs() -> None:
    before = directory.unpack_record
    simulate(scenario(2, 1))
    assert directory.unpack_record is before


class TestQuadratic:
    CONFIG = QuadraticConfig(num_parameters=20_000, lr=0.05, noise=2.0, data_spread=0.3, seed=1)

    def test_many_steps_at_once_have_the_distribution_of_single_ones(self) -> None:
        at_once, singly = torch.zeros(20_000), torch.zeros(20_000)
        Quadratic(self.CONFIG, 0).train(at_once, 40)
        problem = Quadratic(self.CONFIG, 0)
        for _ in range(40):
            problem.train(singly, 1)
        assert not torch.equal(at_once, singly)
        assert float(at_once.mean()) == pytest.approx(float(singly.mean()), abs=0.02)
        assert float(at_once.std()) == pytest.approx(float(singly.std()), rel=0.02)

    def test_a_peer_alone_ends_at_its_own_optimum(self) -> None:
        config = QuadraticConfig(num_parameters=20_000, lr=0.05, noise=0.0, data_spread=0.3, seed=1)
        theta = torch.zeros(20_000)
        Quadratic(config, 3).train(theta, 1000)
        assert loss_of(theta, config) == pytest.approx(0.5 * 0.3**2, rel=0.05)
        assert loss_of(common_optimum(config), config) == 0.0


def test_peers_leave_at_the_rate_asked_for_however_long_a_goodbye_takes() -> None:
    links = {"latency_s": 1.0}
    result = simulate(scenario(24, 40, links=links, churn={"leaves_per_hour": 1000.0}))
    assert result["population"]["left"] == 24, "nobody twice"
    assert result["virtual_s"] < 41.0 + 30.0, "3.6 s each on average, not one goodbye after the other"


def test_a_swarm_that_ends_before_its_first_round_is_reported() -> None:
    result = simulate(scenario(3, 40, churn={"crashes_per_hour": 1000.0}))
    assert result["population"]["crashed"] == 3
    assert result["success_share"] == 0.0
    json.dumps(result, allow_nan=False)
