"""Who takes part in a simulated swarm: founders at the start, then newcomers, and those who leave or crash.

Poisson processes in virtual time, as the scenario's [churn] section says. What a peer does with its life is its own affair.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import Generic, TypeVar

from node.simulation.scenario import Scenario
from protocol import directory
from protocol.directory import Directory
from protocol.ids import PeerId
from protocol.memory import MemoryNetwork, MemoryTransport
from protocol.memory_links import Chance

__all__ = ["Member", "Population"]

_SETTLE_ROUND_TRIPS = 20
"""Time for all founders' records to be stored, in mean round trips."""


class Member(ABC):
    """One simulated peer, as far as coming and going is concerned."""

    peer_id: PeerId
    transport: MemoryTransport
    directory: Directory

    @abstractmethod
    async def live(self, *, start_s: float = 0.0) -> None:
        """Take part until the last round is done.

        Args:
            start_s: loop time before which it only makes itself known.
        """

    @abstractmethod
    async def say_goodbye(self) -> None:
        """Tell the directory that this peer leaves."""

    @abstractmethod
    def close(self) -> None:
        """Its life is over, one way or another: tell the tally what it has done."""


M = TypeVar("M", bound=Member)


class Population(Generic[M]):
    """Everybody, by number.

    Args:
        make: a peer of this number; it begins with the state of another one, or as a founder.
        counts: of joined, left and crashed.
        settle_s: time for the founders to find each other; left out, for their records to be stored.
    """

    def __init__(
        self,
        scenario: Scenario,
        *,
        network: MemoryNetwork,
        chance: Chance,
        make: Callable[[int, M | None], M],
        counts: Counter[str],
        settle_s: float = 0.0,
    ) -> None:
        self._scenario, self._network, self._chance = scenario, network, chance
        self._make, self._counts = make, counts
        self.start_s = max(settle_s, 1.0 + _SETTLE_ROUND_TRIPS * 2 * network.default_link.latency_s)
        """Loop time at which the founders begin."""
        self.live: dict[int, M] = {}
        self.number_of: dict[PeerId, int] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._fate: list[asyncio.Task[None]] = []
        """What makes peers come and go; it ends with the last of them."""

    async def run(self) -> None:
        """Let everybody live until the last round is done."""
        num_founders = self._scenario.swarm.peers
        level = max(0, math.ceil(math.log2(num_founders / directory.BUCKET_RECORDS)))
        async with asyncio.TaskGroup() as tasks:
            for number in range(num_founders):
                self._add(number, None).directory.level = level
                self._tasks[number] = tasks.create_task(self._life(number, self.start_s))
            self._fate = [tasks.create_task(self._joins(tasks)), tasks.create_task(self._exits(tasks))]
            while self._tasks:  # newcomers, too
                await asyncio.wait(list(self._tasks.values()))
            for task in self._fate:
                task.cancel()

    def _add(self, number: int, donor: M | None) -> M:
        peer = self.live[number] = self._make(number, donor)
        self.number_of[peer.peer_id] = number
        return peer

    async def _life(self, number: int, start_s: float = 0.0) -> None:
        peer = self.live[number]
        try:
            await peer.live(start_s=start_s)
        finally:
            del self.live[number]
            self._tasks.pop(number, None)
            peer.close()

    # ---- churn

    async def _joins(self, tasks: asyncio.TaskGroup) -> None:
        """Newcomers, one after another."""
        churn, chance = self._scenario.churn, self._chance
        number = self._scenario.swarm.peers
        await asyncio.sleep(self.start_s)
        while churn.joins_per_hour > 0.0:
            await asyncio.sleep(-math.log(chance.uniform("join", number)) * 3600.0 / churn.joins_per_hour)
            self._fate.append(tasks.create_task(self._join(tasks, number)))
            number += 1

    async def _join(self, tasks: asyncio.TaskGroup, number: int) -> None:
        await asyncio.sleep(self._scenario.churn.join_s)
        donors = sorted(self.live)
        if donors:
            donor = self.live[donors[int(self._chance.uniform("donor", number) * len(donors))]]
            self._add(number, donor)
            self._counts["joined"] += 1
            self._tasks[number] = tasks.create_task(self._life(number))

    async def _exits(self, tasks: asyncio.TaskGroup) -> None:
        """Peers that leave or crash: the next one, whoever it is, until nobody is left to."""
        churn, chance = self._scenario.churn, self._chance
        rate = churn.leaves_per_hour + churn.crashes_per_hour
        await asyncio.sleep(self.start_s)
        for serial in itertools.count():
            if not self.live or rate <= 0.0:
                return
            await asyncio.sleep(-math.log(chance.uniform("exit", serial)) * 3600.0 / (rate * len(self.live)))
            numbers = sorted(number for number in self._tasks if self.live[number].transport.alive)
            if numbers:
                number = numbers[int(chance.uniform("who", serial) * len(numbers))]
                crashes = chance.uniform("how", serial) * rate < churn.crashes_per_hour
                tasks.create_task(self._exit(number, self._tasks.pop(number), crashes=crashes))  # nobody goes twice

    async def _exit(self, number: int, life: asyncio.Task[None], *, crashes: bool) -> None:
        peer = self.live[number]
        if crashes:
            self._network.crash(peer.peer_id)
        else:
            await peer.say_goodbye()
        life.cancel()
        self._counts["crashed" if crashes else "left"] += 1
