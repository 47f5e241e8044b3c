"""One simulated peer: the node's own directory, averager and replica, around a toy problem instead of a model.

Its rounds go as in node/rounds.py: steps; a look at the directory under the last of them; pack; exchange, under the next
round's steps if the run says so; apply between two steps. What is left out is what costs no network: data, checkpoints,
snapshots. A slow peer does not shrink its batches here, so stragglers are at their worst.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from typing import Literal

import torch

from averaging.averager import Averager, ExchangeResult
from averaging.replica import Replica
from averaging.update import Update
from node.mixing import foreign_bucket
from node.round_clock import MAX_STRETCH, RoundClock
from node.rounds import DEADLINE_SHARE
from node.simulation.population import Member
from node.simulation.quadratic import Quadratic, loss_of
from node.simulation.world import World, identity_of, own_speed
from protocol.directory import Directory, validate_entry
from protocol.errors import UserError
from protocol.ids import PeerId
from protocol.memory import MemoryTransport
from protocol.memory_links import Counts
from protocol.records import PeerRecord
from protocol.transport import Traffic

__all__ = ["SimulatedPeer"]

TOKENS_PER_STEP = 1000
State = Literal["training", "leaving"]


class SimulatedPeer(Member):
    """One peer. Make it, then `live`.

    Args:
        world: where.
        number: its number; decides identity, speed and data.
    """

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        scenario = world.scenario
        self._identity = identity_of(scenario.swarm.seed, number)
        self.peer_id = self._identity.peer_id
        self.transport = MemoryTransport(world.network, self.peer_id, validator=validate_entry)
        self.directory = Directory(dht=self.transport.dht, identity=self._identity, run=world.run)
        self.round = 0
        self._theta = torch.zeros(scenario.swarm.parameters)
        self.replica = Replica(self._theta, world.replica)
        self._problem = Quadratic(world.problem, number)
        self._clock = RoundClock(total_rounds=scenario.num_rounds)
        self._averager = Averager(
            transport=self.transport,
            identity=self._identity,
            run=world.run,
            payload_bytes=lambda round: sum(world.replica.payload_bytes(scenario.swarm.parameters, round)),
            max_lag_rounds=scenario.sync.max_lag_rounds,
            sends_early=scenario.sync.early_slow,
        )
        self._ahead: asyncio.Task[None] | None = None
        self._sequence = 0
        self._steps_in_round = 0
        self._round_began_s = 0.0
        self._arrival: tuple[Traffic, Counts] | None = None

    def adopt(self, donor: SimulatedPeer) -> None:
        """Begin with another peer's slow weights and round."""
        self.replica.replace_slow(donor.replica.phi)
        self.round = donor.round

    async def live(self, *, start_s: float = 0.0) -> None:
        loop = asyncio.get_running_loop()
        async with self.transport, self._averager, asyncio.TaskGroup() as tasks:
            await self.directory.publish(self._record("training"))
            await asyncio.sleep(start_s - loop.time())
            await self.directory.refresh()
            self._arrival = dataclasses.replace(self.transport.traffic), dataclasses.replace(self.transport.counts)
            heart = tasks.create_task(self._heartbeat())
            await self._rounds(tasks)
            heart.cancel()
            await self.say_goodbye()

    async def say_goodbye(self) -> None:
        await self.directory.publish(self._record("leaving"))

    def close(self) -> None:
        if self._arrival is not None:
            self.world.tally.count_network(self.transport.traffic, self.transport.counts, since=self._arrival)

    # ---- rounds

    async def _rounds(self, tasks: asyncio.TaskGroup) -> None:
        pending: asyncio.Task[list[ExchangeResult]] | None = None
        while self.round < self.world.scenario.num_rounds:
            self._round_began_s = asyncio.get_running_loop().time()
            await self._train(tasks, pending)
            pending = await self._end_round(tasks)

    async def _train(self, tasks: asyncio.TaskGroup, pending: asyncio.Task[list[ExchangeResult]] | None) -> None:
        """The steps of one round; more of them while the last round's exchange or the others are not done."""
        planned, step_s = self.world.scenario.sync.inner_steps, self._draw_step_s()
        self._steps_in_round = 0
        looked = False
        while (steps := self._next_steps(planned, looked, step_s, pending)) > 0:
            if steps + self._steps_in_round >= planned and not looked:
                tasks.create_task(self._look())
                looked = True
            steps = await self._wait(steps, step_s, pending)
            self._problem.train(self._theta, steps)
            self._steps_in_round += steps
            if pending is not None and pending.done():
                self._apply(tasks, pending.result(), steps_since_pack=self._steps_in_round)
                pending = None
        if pending is not None:
            self._apply(tasks, await pending, steps_since_pack=self._steps_in_round)

    def _next_steps(
        self, planned: int, looked: bool, step_s: float, pending: asyncio.Task[list[ExchangeResult]] | None
    ) -> int:
        """How many steps to take before looking up again; 0 ends the round. The last planned one is taken apart."""
        done = self._steps_in_round
        if done < planned:
            return max(1, planned - 1 - done)
        self._observe()
        waits = self._clock.is_ahead(self.round) or pending is not None
        if done >= MAX_STRETCH * planned or not waits:
            return 0
        return max(1, min(planned, math.ceil(self.world.scenario.swarm.heartbeat_s / step_s)))

    async def _wait(self, steps: int, step_s: float, pending: asyncio.Task[list[ExchangeResult]] | None) -> int:
        """Let the time of `steps` steps pass, or of those until `pending` has ended; returns how many."""
        if pending is None or pending.done():
            await asyncio.sleep(steps * step_s)
            return steps
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        await asyncio.wait((pending,), timeout=steps * step_s)
        taken = min(steps, max(1, math.ceil((loop.time() - began_s) / step_s)))
        await asyncio.sleep(max(0.0, began_s + taken * step_s - loop.time()))
        return taken

    async def _end_round(self, tasks: asyncio.TaskGroup) -> asyncio.Task[list[ExchangeResult]] | None:
        """Pack, and start the exchange; without overlap or in the last round, go through with it."""
        scenario, tally, loop = self.world.scenario, self.world.tally, asyncio.get_running_loop()
        self._observe()
        following = self._clock.next_round(self.round)
        tally.population["skipped"] += following - self.round - 1
        update = self._pack(following - 1)
        self.round = following
        overlapped = scenario.sync.overlap and following < scenario.num_rounds
        limit_s = scenario.sync.exchange_timeout_s
        if overlapped:
            limit_s = min(
                limit_s, DEADLINE_SHARE * max(loop.time() - self._round_began_s, scenario.sync.round_target_s)
            )
        tasks.create_task(self._beat())
        exchange = tasks.create_task(self._exchange(update, loop.time() + limit_s))
        if not overlapped:
            self._apply(tasks, await exchange)
        tally.round_s.append(loop.time() - self._round_began_s)
        return exchange if overlapped else None

    def _pack(self, round: int) -> Update:
        try:
            return self.replica.pack(round=round, tokens=TOKENS_PER_STEP * self._steps_in_round)
        except FloatingPointError:
            raise self._diverged() from None

    async def _exchange(self, update: Update, deadline_s: float) -> list[ExchangeResult]:
        if self._ahead is not None:
            self._ahead.cancel()
        candidates = list(self._trainers())
        match self.world.scenario.sync.group:
            case "none":
                return []
            case "all":
                return await self._averager.exchange_all(update, candidates=candidates, deadline_s=deadline_s)
            case "pair":
                return [await self._averager.exchange(update, candidates=candidates, deadline_s=deadline_s)]

    def _apply(self, tasks: asyncio.TaskGroup, results: list[ExchangeResult], *, steps_since_pack: int = 0) -> None:
        partners = [result.remote for result in results if result.remote is not None]
        outcome = self.replica.apply(partners, steps_since_pack=steps_since_pack)
        if self._averager.early is not None and self.round < self.world.scenario.num_rounds:
            ahead = self._averager.early.go_ahead(
                self.round, self.replica.slow_ahead(self.round), candidates=self._trainers()
            )
            self._ahead = tasks.create_task(ahead)
        for result in results:
            self.world.tally.count_exchange(result, outcome)
        loss = loss_of(self.replica.phi, self.world.problem)
        if not math.isfinite(loss):
            raise self._diverged()
        self.world.tally.count_replica(self.round - 1, self.replica.phi, loss)

    def _diverged(self) -> UserError:
        """A real peer would go back to its slow weights; a swarm of which that is asked has the wrong settings."""
        return UserError(
            f"the simulated weights grow beyond all bounds by round {self.round}; lower sync.beta or sync.alpha"
        )

    # ---- the directory

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(self.world.scenario.swarm.heartbeat_s)
            await self._beat()

    async def _beat(self) -> None:
        await self.directory.publish(self._record("training"))
        await self.directory.refresh()

    async def _look(self) -> None:
        await self.directory.refresh(extra=foreign_bucket(self.world.run, self.round, self.peer_id))

    def _observe(self) -> None:
        self._clock.observe(self._trainers(), asyncio.get_running_loop().time())

    def _trainers(self) -> dict[PeerId, PeerRecord]:
        if self.world.scenario.sync.group == "none":
            return {}
        return {peer: record for peer, record in self.directory.peers.items() if record.state == "training"}

    def _record(self, state: State) -> PeerRecord:
        self._sequence += 1
        now_s = self.world.network.now_s()
        return PeerRecord(
            run=self.world.run,
            peer=self.peer_id,
            sequence=self._sequence,
            role="trainer",
            state=state,
            started_at_s=now_s,
            sent_at_s=now_s,
            round=self.round,
            inner_steps=self.world.scenario.sync.inner_steps,
        )

    def _draw_step_s(self) -> float:
        training, chance = self.world.scenario.training, self.world.chance
        own_s = own_speed(self.world.scenario, chance, training.step_s, self.number)
        return chance.log_normal(own_s, training.round_ratio, "round", self.number, self.round)
