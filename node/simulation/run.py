"""`llm-node simulate`: thousands of peers in one process, on the memory transport and in virtual time.

The averaging, the search for partners, the exchange and the directory are the node's own code; only the training is a toy
(node/simulation/quadratic.py), and time, links and misfortunes come from a scenario file. The same seed gives the same result,
bit for bit.

The swarm starts as one that has found itself: every peer knows how large the swarm is. Checks of signatures are real but not
repeated: what one simulated peer has found to be sound is not computed again by the next (`checked_once`).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from averaging.admission import AdmissionConfig
from averaging.replica import ReplicaConfig
from node.plotting import check_plotting
from node.simulation.links import link_table, read_matrix, typical_link
from node.simulation.peer import SimulatedPeer, World
from node.simulation.plots import write_plots
from node.simulation.quadratic import QuadraticConfig, loss_of
from node.simulation.scenario import Scenario
from node.simulation.tally import Tally
from protocol import directory
from protocol.errors import UserError
from protocol.ids import PeerId, RunId
from protocol.memory import MemoryNetwork
from protocol.memory_links import Chance
from protocol.virtual_time import run_virtual

__all__ = ["simulate", "simulate_file"]

_REMEMBERED_RECORDS = 1 << 16
_GC_THRESHOLDS = (100_000, 50, 100)
_SETTLE_ROUND_TRIPS = 20
"""Time for all founders' records to be stored, in mean round trips."""


def simulate(scenario: Scenario, folder: Path = Path()) -> dict[str, Any]:
    """Run a scenario to its end.

    Args:
        scenario: what to simulate.
        folder: where the scenario's link matrix is looked for.

    Returns:
        JSON-able: settings, round and exchange times in virtual seconds, success share, spread and loss by round, and bytes,
        messages and look-ups per peer and round.

    Raises:
        UserError: the link matrix is unusable.
    """
    torch.set_num_threads(1)  # the vectors are too small to share
    with checked_once(), rare_collections():
        return run_virtual(Simulation(scenario, folder).run())


def simulate_file(scenario: Scenario, folder: Path, *, out: Path | None) -> dict[str, Any]:
    """Run a scenario and, if `out` is given, write result.json and plots there. What could fail then is tried before.

    Args:
        scenario: what to simulate.
        folder: where the scenario's link matrix is looked for.
        out: folder to write, made if missing.

    Returns:
        As `simulate`.

    Raises:
        UserError: the link matrix is unusable, `out` can not be written, or matplotlib is missing.
    """
    if out is None:
        return simulate(scenario, folder)
    check_plotting()
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
        swarm, training, links = scenario.swarm, scenario.training, scenario.links
        sites = read_matrix(folder / links.matrix) if links.matrix else None
        self._number_of: dict[PeerId, int] = {}
        network = MemoryNetwork(
            seed=swarm.seed,
            link=typical_link(links, sites),
            links=link_table(links, seed=swarm.seed, sites=sites, number_of=self._number_of.__getitem__),
        )
        self._world = World(
            scenario=scenario,
            network=network,
            run=RunId(hashlib.sha256(scenario.model_dump_json().encode()).hexdigest()),
            replica=replica_config(scenario),
            problem=QuadraticConfig(
                num_parameters=swarm.parameters,
                lr=training.lr,
                noise=training.noise,
                data_spread=training.data_spread,
                seed=swarm.seed,
            ),
            chance=Chance(swarm.seed),
            tally=Tally(num_parameters=swarm.parameters),
        )
        self._start_s = 1.0 + _SETTLE_ROUND_TRIPS * 2 * network.default_link.latency_s
        self._live: dict[int, SimulatedPeer] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def run(self) -> dict[str, Any]:
        """Let everybody live until the last round is done."""
        num_founders = self._scenario.swarm.peers
        level = max(0, math.ceil(math.log2(num_founders / directory.BUCKET_RECORDS)))
        async with asyncio.TaskGroup() as tasks:
            for number in range(num_founders):
                self._add(number).directory.level = level
                self._tasks[number] = tasks.create_task(self._life(number, self._start_s))
            fate = [tasks.create_task(self._joins(tasks)), tasks.create_task(self._exits(tasks))]
            await asyncio.wait(list(self._tasks.values()))
            for task in fate:
                task.cancel()
        return self._report()

    def _add(self, number: int) -> SimulatedPeer:
        peer = self._live[number] = SimulatedPeer(self._world, number)
        self._number_of[peer.peer_id] = number
        return peer

    async def _life(self, number: int, start_s: float = 0.0) -> None:
        peer = self._live[number]
        try:
            await peer.live(start_s=start_s)
        finally:
            del self._live[number]
            self._tasks.pop(number, None)
            peer.count_network()

    # ---- churn

    async def _joins(self, tasks: asyncio.TaskGroup) -> None:
        """Newcomers, one after another."""
        churn, chance = self._scenario.churn, self._world.chance
        number = self._scenario.swarm.peers
        await asyncio.sleep(self._start_s)
        while churn.joins_per_hour > 0.0:
            await asyncio.sleep(-math.log(chance.uniform("join", number)) * 3600.0 / churn.joins_per_hour)
            tasks.create_task(self._join(tasks, number))
            number += 1

    async def _join(self, tasks: asyncio.TaskGroup, number: int) -> None:
        await asyncio.sleep(self._scenario.churn.join_s)
        donors = sorted(self._live)
        if donors:
            donor = self._live[donors[int(self._world.chance.uniform("donor", number) * len(donors))]]
            self._add(number).adopt(donor)
            self._world.tally.population["joined"] += 1
            self._tasks[number] = tasks.create_task(self._life(number))

    async def _exits(self, tasks: asyncio.TaskGroup) -> None:
        """Peers that leave or crash: the next one, whoever it is, until nobody is left to."""
        churn, chance = self._scenario.churn, self._world.chance
        rate = churn.leaves_per_hour + churn.crashes_per_hour
        await asyncio.sleep(self._start_s)
        for serial in itertools.count():
            if not self._live or rate <= 0.0:
                return
            await asyncio.sleep(-math.log(chance.uniform("exit", serial)) * 3600.0 / (rate * len(self._live)))
            numbers = sorted(number for number in self._tasks if self._live[number].transport.alive)
            if numbers:
                number = numbers[int(chance.uniform("who", serial) * len(numbers))]
                crashes = chance.uniform("how", serial) * rate < churn.crashes_per_hour
                tasks.create_task(self._exit(number, self._tasks.pop(number), crashes=crashes))  # nobody goes twice

    async def _exit(self, number: int, life: asyncio.Task[None], *, crashes: bool) -> None:
        peer = self._live[number]
        if crashes:
            self._world.network.crash(peer.peer_id)
        else:
            await peer.say_goodbye()
        life.cancel()
        self._world.tally.population["crashed" if crashes else "left"] += 1

    # ---- result

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


def replica_config(scenario: Scenario) -> ReplicaConfig:
    """The scenario's [sync] and [safety] as the replica's own configuration."""
    safety = scenario.safety
    return ReplicaConfig.of(scenario.sync, admission=None if safety is None else AdmissionConfig(**safety.model_dump()))
