"""What all peers of a simulation share, and what is drawn for each of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from averaging.admission import AdmissionConfig
from averaging.replica import ReplicaConfig
from node.simulation.quadratic import QuadraticConfig
from node.simulation.scenario import Scenario
from node.simulation.tally import Tally
from protocol.identity import Identity
from protocol.ids import RunId
from protocol.memory import MemoryNetwork
from protocol.memory_links import Chance

__all__ = ["World", "identity_of", "own_speed", "problem_of", "replica_config", "run_id_of"]

_LATER_SETTINGS: Any = {"pipeline": True, "model": True, "links": {"classes"}, "sync": {"early_slow"}}
"""They came after results had been published, whose lots they leave as they were."""


@dataclass(frozen=True, kw_only=True)
class World:
    """What all peers of a simulation share.

    Args:
        scenario: the description.
        network: the wires.
        run: an id like a real run's.
        replica: how replicas average.
        problem: what is trained.
        chance: luck of the peers' speeds and lives.
        tally: counts everything.
    """

    scenario: Scenario
    network: MemoryNetwork
    run: RunId
    replica: ReplicaConfig
    problem: QuadraticConfig
    chance: Chance
    tally: Tally


def replica_config(scenario: Scenario) -> ReplicaConfig:
    """The scenario's [sync] and [safety] as the replica's own configuration."""
    safety = scenario.safety
    return ReplicaConfig.of(scenario.sync, admission=None if safety is None else AdmissionConfig(**safety.model_dump()))


def problem_of(scenario: Scenario, *, stage: int = 0) -> QuadraticConfig:
    """What a peer trains; every stage has an optimum of its own."""
    training = scenario.training
    return QuadraticConfig(
        num_parameters=scenario.swarm.parameters,
        lr=training.lr,
        noise=training.noise,
        data_spread=training.data_spread,
        seed=scenario.swarm.seed + (stage << 64),
    )


def own_speed(scenario: Scenario, chance: Chance, mean_s: float, number: int) -> float:
    """The seconds that a peer needs for what takes `mean_s` on average."""
    training = scenario.training
    own_s = chance.log_normal(mean_s, training.peer_ratio, "speed", number)
    return own_s * training.slow_factor if chance.uniform("slow", number) < training.slow_share else own_s


def run_id_of(scenario: Scenario) -> RunId:
    """An id like a real run's; other settings, another lot in everything that is drawn from it."""
    return RunId(hashlib.sha256(scenario.model_dump_json(exclude=_LATER_SETTINGS).encode()).hexdigest())


def identity_of(seed: int, number: int) -> Identity:
    """The key of a simulated peer."""
    return Identity.generate(hashlib.sha256(f"{seed}/peer {number}".encode()).digest())
