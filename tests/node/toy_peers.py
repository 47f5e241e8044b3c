"""Peers that train nothing: the node's own rounds, averager and directory around a handful of numbers, in virtual time.

Steps take their time and no work, so that a hundred rounds of several peers cost seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from averaging.averager import Averager
from averaging.replica import Outcome, Replica, ReplicaConfig
from averaging.update import RemoteUpdate, Update
from node.compute import VirtualCompute
from node.dataset import BatchSource
from node.events import EventLog
from node.inner_steps import InnerSteps
from node.progress import Progress
from node.rounds import RoundLoop, RoundSettings
from node.service import HEARTBEAT_S
from node.trainer import StepStats
from node.training_state import TrainingState
from protocol.directory import Directory, validate_entry
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.manifest import Manifest
from protocol.memory import LinkSpec, MemoryNetwork, MemoryTransport
from protocol.records import ExchangeNote
from protocol.virtual_time import run_virtual

__all__ = ["ToyPeer", "live_together"]

LINK = LinkSpec(latency_s=0.02, bytes_per_s=1e7)


class ToyState:
    """As much of a training state as a round loop touches."""

    def __init__(self, manifest: Manifest) -> None:
        self.replica = Replica(torch.zeros(64), ReplicaConfig.of(manifest.sync, admission=None))
        self.num_divergences = self.round = self.step_in_round = self.tokens = 0
        self.steps_per_round: list[int] = []

    def end_round(self, next_round: int) -> Update:
        update = self.replica.pack(round=next_round - 1, tokens=self.step_in_round)
        self.steps_per_round.append(self.step_in_round)
        self.round, self.step_in_round = next_round, 0
        return update

    def apply(self, partners: Sequence[RemoteUpdate], group_mean: memoryview | None = None) -> Outcome:
        return self.replica.apply(partners, steps_since_pack=self.step_in_round, group_mean=group_mean)


class ToySteps(InnerSteps):
    """Steps that take time."""

    reads_data = False

    def __init__(self, state: ToyState, step_s: float) -> None:
        self._state, self._step_s = state, step_s

    async def step(self, batches: object) -> tuple[StepStats, float]:
        await asyncio.sleep(self._step_s)
        self._state.step_in_round += 1
        return StepStats(loss=1.0, tokens=1), self._step_s

    async def measure(self, *, last: bool) -> float | None:
        return None

    def stop(self) -> None:
        pass


@dataclass(kw_only=True)
class ToyPeer:
    """One peer, and what became of it.

    Args:
        manifest: the run.
        number: decides its identity.
        step_s: seconds per inner step.
        start_s: when it begins its first round.
    """

    manifest: Manifest
    number: int
    step_s: float
    start_s: float = 0.0
    notes: list[ExchangeNote] = field(default_factory=list)
    """One per round."""
    training_share: float = 0.0

    def __post_init__(self) -> None:
        self._identity = Identity.generate(self.number.to_bytes(32))
        self._state = ToyState(self.manifest)

    @property
    def peer_id(self) -> PeerId:
        """Its id."""
        return self._identity.peer_id

    @property
    def steps_per_round(self) -> list[int]:
        """Of the rounds that have ended."""
        return self._state.steps_per_round

    async def live(self, network: MemoryNetwork) -> None:
        """Train until the run's last round is done."""
        run, sync = self.manifest.run_id, self.manifest.sync
        async with (
            MemoryTransport(network, self.peer_id, validator=validate_entry) as transport,
            Averager(
                transport=transport,
                identity=self._identity,
                run=run,
                payload_bytes=self._state.replica.num_payload_bytes,
                max_lag_rounds=sync.max_lag_rounds,
            ) as averager,
            asyncio.TaskGroup() as tasks,
        ):
            await asyncio.sleep(self.start_s)
            self._progress = Progress(
                run=run, peer=self.peer_id, name="", inner_steps=sync.inner_steps, traffic=transport.traffic
            )
            self._progress.state = "training"
            self._directory = Directory(dht=transport.dht, identity=self._identity, run=run)
            heart = tasks.create_task(self._heartbeat())
            await self._rounds(averager).run()
            self.training_share = self._progress.training_share or 0.0
            self._progress.state = "leaving"
            await self._beat()
            heart.cancel()

    def _rounds(self, averager: Averager) -> RoundLoop:
        events = EventLog()
        events.listen(self._hear)
        return RoundLoop(
            self.manifest,
            trainer=cast(TrainingState, self._state),
            steps=ToySteps(self._state, self.step_s),
            compute=VirtualCompute(seconds_per_call=0.0),
            source=cast(BatchSource, None),
            averager=averager,
            directory=self._directory,
            progress=self._progress,
            events=events,
            settings=RoundSettings(sequences=1, adapt=False),
            after_round=self._after_round,
            announce=self._beat,
        )

    async def _heartbeat(self) -> None:
        while True:
            await self._beat()
            await asyncio.sleep(HEARTBEAT_S)

    async def _beat(self) -> None:
        await self._directory.publish(self._progress.record([]))
        await self._directory.refresh()

    async def _after_round(self, round: int) -> None:
        pass

    def _hear(self, event: str, fields: dict[str, Any]) -> None:
        if event == "exchange":
            self.notes.append(ExchangeNote.model_validate(fields))


def live_together(peers: Sequence[ToyPeer]) -> None:
    """All of them on one network in virtual time, to the run's end."""

    async def story() -> None:
        network = MemoryNetwork(link=LINK)
        async with asyncio.TaskGroup() as tasks:
            for peer in peers:
                tasks.create_task(peer.live(network))

    run_virtual(story())
