"""`llm-node simulate`: thousands of peers in one process, on the memory transport and in virtual time.

The averaging, the search for partners, the exchange, the directory and the pipelines are the node's own code; only the training
is a toy (node/simulation/quadratic.py), and time, links and misfortunes come from a scenario file. The same seed gives the same
result, bit for bit.

The swarm starts as one that has found itself: every peer knows how large the swarm is. Checks of signatures are real but not
repeated: what one simulated peer has found to be sound is not computed again by the next (`checked_once`).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from node.plotting import check_plotting
from node.simulation.links import network_of
from node.simulation.peer import SimulatedPeer
from node.simulation.plots import write_plots
from node.simulation.population import Population
from node.simulation.quadratic import loss_of
from node.simulation.scenario import Scenario
from node.simulation.staged import StagedSimulation
from node.simulation.tally import Tally
from node.simulation.world import World, problem_of, replica_config, run_id_of
from protocol import directory
from protocol.errors import UserError, first_leaf
from protocol.memory_links import Chance
from protocol.virtual_time import run_virtual

__all__ = ["simulate", "simulate_file"]

_REMEMBERED_RECORDS = 1 << 16
_GC_THRESHOLDS = (100_000, 50, 100)


def simulate(scenario: Scenario, folder: Path = Path()) -> dict[str, Any]:
    """Run a scenario to its end.

    Args:
        scenario: what to simulate.
        folder: where the scenario's link matrix is looked for.

    Returns:
        JSON-able: settings, round and exchange times in virtual seconds, success share, spread and loss by round, and bytes,
        messages and look-ups per peer and round. With stages: iteration times, the fate of microbatches, tokens per virtual
        second, and work and peers per stage (node/simulation/staged_tally.py).

    Raises:
        UserError: the link matrix is unusable, or the settings make the weights grow beyond all bounds.
    """
    torch.set_num_threads(1)  # the vectors are too small to share
    with checked_once(), rare_collections():
        simulation = StagedSimulation(scenario, folder) if scenario.is_staged else Simulation(scenario, folder)
        try:
            return run_virtual(simulation.run())
        except* UserError as group:
            problem = first_leaf(group)
    raise problem


def simulate_file(scenario: Scenario, folder: Path, *, out: Path | None) -> dict[str, Any]:
    """Run a scenario and, if `out` is given, write result.json and plots there. What could fail then is tried before.

    Args:
        scenario: what to simulate.
        folder: where the scenario's link matrix is looked for.
        out: folder to write, made if missing.

    Returns:
        As `simulate`.

    Raises:
        UserError: as `simulate`; `out` can not be written, or matplotlib is missing.
    """
    if out is None:
        return simulate(scenario, folder)
    check_plotting("--out")
    target = out / "result.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        target.open("a").close()
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; choose another folder for --out") from None
    result = simulate(scenario, folder)
    target.write_text(json.dumps(result, indent=1) + "\n")
    write_plots(result, out)
    return result


@contextlib.contextmanager
def checked_once() -> Iterator[None]:
    """Check every record of the directory once in this process instead of once by every peer that reads it: the outcome is the
    same for all of them, and checking would otherwise be most of the cost (measured at 512 peers: 40 s instead of 12)."""
    remembered = lru_cache(_REMEMBERED_RECORDS)(directory.unpack_record)
    with mock.patch.object(directory, "unpack_record", remembered):
        yield


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Look for cyclic garbage seldom: thousands of peers are millions of objects to look through (measured at 4,096 peers: 30 %
    of the time)."""
    thresholds = gc.get_threshold()
    gc.set_threshold(*_GC_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


class Simulation:
    """One run of a scenario on the running virtual loop."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self._scenario = scenario
        swarm = scenario.swarm
        network = network_of(scenario, folder, number_of=lambda peer: self._population.number_of[peer])
        self._world = World(
            scenario=scenario,
            network=network,
            run=run_id_of(scenario),
            replica=replica_config(scenario),
            problem=problem_of(scenario),
            chance=Chance(swarm.seed),
            tally=Tally(num_parameters=swarm.parameters),
        )
        self._population = Population(
            scenario,
            network=network,
            chance=self._world.chance,
            make=self._make,
            counts=self._world.tally.population,
        )

    async def run(self) -> dict[str, Any]:
        """Let everybody live until the last round is done."""
        await self._population.run()
        return self._report()

    def _make(self, number: int, donor: SimulatedPeer | None) -> SimulatedPeer:
        peer = SimulatedPeer(self._world, number)
        if donor is not None:
            peer.adopt(donor)
        return peer

    def _report(self) -> dict[str, Any]:
        scenario, tally = self._scenario, self._world.tally
        rounds = tally.rounds
        return {
            "name": scenario.name,
            "algorithm": scenario.sync.algorithm,
            "peers": scenario.swarm.peers,
            "rounds": scenario.num_rounds,
            "parameters": scenario.swarm.parameters,
            "seed": scenario.swarm.seed,
            "virtual_s": asyncio.get_running_loop().time(),
            **tally.summary(),
            "by_round": {
                "round": rounds,
                "spread": [tally.spread(round) for round in rounds],
                "replica_loss": [tally.replica_loss(round) for round in rounds],
                "mean_loss": [loss_of(tally.mean_replica(round), self._world.problem) for round in rounds],
            },
        }
