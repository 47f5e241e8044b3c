"""Coming and going, of peers that do nothing else."""

from __future__ import annotations

import asyncio
from collections import Counter

from node.simulation.population import Member, Population
from node.simulation.scenario import Scenario
from node.simulation.world import identity_of
from protocol.directory import Directory
from protocol.ids import RunId
from protocol.memory import MemoryNetwork, MemoryTransport
from protocol.memory_links import Chance
from protocol.virtual_time import run_virtual

FOUNDER_S, NEWCOMER_S = 100.0, 1e6


class Idler(Member):
    """Stays for a while."""

    def __init__(self, network: MemoryNetwork, number: int, stay_s: float) -> None:
        identity = identity_of(0, number)
        self.peer_id = identity.peer_id
        self.transport = MemoryTransport(network, self.peer_id)
        self.directory = Directory(dht=self.transport.dht, identity=identity, run=RunId("0" * 64))
        self._stay_s = stay_s

    async def live(self, *, start_s: float = 0.0) -> None:
        async with self.transport:
            await asyncio.sleep(self._stay_s)

    async def say_goodbye(self) -> None:
        pass

    def close(self) -> None:
        pass


def lived_s(churn: dict[str, float], counts: Counter[str]) -> float:
    """Virtual seconds until two founders and all who joined them are gone."""
    scenario = Scenario.model_validate({"swarm": {"peers": 2, "rounds": 1}, "churn": churn})

    async def story() -> float:
        network = MemoryNetwork()
        population: Population[Idler] = Population(
            scenario,
            network=network,
            chance=Chance(0),
            make=lambda number, donor: Idler(network, number, NEWCOMER_S if donor else FOUNDER_S),
            counts=counts,
        )
        await population.run()
        return asyncio.get_running_loop().time()

    return run_virtual(story())


def test_newcomers_come_and_go_when_the_last_founder_is_gone() -> None:
    counts: Counter[str] = Counter()
    end_s = lived_s({"joins_per_hour": 360.0, "join_s": 1.0, "crashes_per_hour": 40.0}, counts)
    assert counts["joined"] > 2
    assert counts["crashed"] >= counts["joined"]
    assert end_s < NEWCOMER_S, "nobody stayed to the end"


def test_nobody_is_waited_for_who_would_come_too_late() -> None:
    counts: Counter[str] = Counter()
    assert lived_s({"joins_per_hour": 3600.0, "join_s": 10 * FOUNDER_S}, counts) == FOUNDER_S
    assert counts["joined"] == 0
