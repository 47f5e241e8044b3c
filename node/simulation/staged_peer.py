"""One simulated peer of a pipeline: the node's own round loop, pipeline, directory and averager, around a hollow stage.

What is left out is what costs no network: data, checkpoints, snapshots, consolidation. A newcomer takes its stage as a real one
does, and then begins with the slow weights of a live replica of it, at no cost beyond the scenario's `join_s`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from averaging.replica import ReplicaConfig
from model.batches import RoundBatches
from node.averaging_round import averagers_of
from node.dataset import BatchSource
from node.events import EventLog
from node.inner_steps import InnerSteps
from node.pipeline.stage_choice import StageView, choose_stage
from node.pipeline.steps import PipelineSteps
from node.pipeline.worker import MicrobatchKey
from node.progress import Progress
from node.rounds import RoundLoop, RoundSettings
from node.service import Watcher
from node.simulation.hollow import HollowCodec, HollowTrainer, SpentCompute
from node.simulation.population import Member
from node.simulation.quadratic import Quadratic, loss_of
from node.simulation.scenario import Scenario
from node.simulation.staged_tally import StagedTally
from node.simulation.world import identity_of, own_speed, problem_of
from node.trainer import StepStats
from protocol.directory import Directory, validate_entry
from protocol.manifest import Manifest
from protocol.memory import MemoryNetwork, MemoryTransport
from protocol.memory_links import Chance
from protocol.records import PeerRecord

__all__ = ["StagedPeer", "StagedWorld"]

_SEQUENCES_PER_SHARD = 8


@dataclass(frozen=True, kw_only=True)
class StagedWorld:
    """What all peers of a simulation share.

    Args:
        scenario: the description.
        manifest: of the run.
        network: the wires.
        replica: how replicas average.
        chance: luck of the peers' speeds and lives.
        tally: counts everything.
        peers: all that are live.
    """

    scenario: Scenario
    manifest: Manifest
    network: MemoryNetwork
    replica: ReplicaConfig
    chance: Chance
    tally: StagedTally
    peers: Callable[[], Iterable[StagedPeer]]

    def peers_per_stage(self) -> list[int]:
        """How many train each stage now."""
        counts = [0] * self.manifest.pipeline.stages
        for peer in self.peers():
            if peer.progress.stage is not None and peer.progress.state == "training":
                counts[peer.progress.stage] += 1
        return counts


class StagedPeer(Member):
    """One peer. Make it, then `live`.

    Args:
        world: where.
        number: its number; decides identity, speed and data, and a founder's stage.
        is_founder: whether it is there from the start.
    """

    def __init__(self, world: StagedWorld, number: int, *, is_founder: bool) -> None:
        self.world, self.number, self._is_founder = world, number, is_founder
        scenario, manifest = world.scenario, world.manifest
        self._identity = identity_of(scenario.swarm.seed, number)
        self.peer_id = self._identity.peer_id
        self.transport = MemoryTransport(world.network, self.peer_id, validator=validate_entry)
        self.directory = Directory(dht=self.transport.dht, identity=self._identity, run=manifest.run_id)
        self._own_s = own_speed(scenario, world.chance, scenario.model.forward_s, number)
        self.progress = Progress(
            run=manifest.run_id,
            peer=self.peer_id,
            name="",
            inner_steps=manifest.sync.inner_steps,
            traffic=self.transport.traffic,
            forward_s=self._own_s,
            started_at_s=0.0,
        )
        self.trainer: HollowTrainer | None = None
        self._compute = SpentCompute(self._forward_s)
        self._events = EventLog()
        self._events.listen(self._hear)
        self._sequence = 0
        self._began_s: float | None = None

    async def live(self, *, start_s: float = 0.0) -> None:
        async with self.transport, asyncio.TaskGroup() as tasks:
            await self._take_stage(start_s)
            trainer = self.trainer = self._make_trainer()
            self.progress.state = "training"
            self._began_s = asyncio.get_running_loop().time()
            steps = self._steps(trainer)
            steps.enter()
            heart = tasks.create_task(self._heartbeat(steps, tasks))
            await self._train(trainer, CountedSteps(steps, self))
            heart.cancel()
            await self.say_goodbye()

    async def say_goodbye(self) -> None:
        self.progress.state = "leaving"
        await self.directory.publish(self._record())

    def close(self) -> None:
        if self._began_s is not None and self.progress.stage is not None:
            lived_s = asyncio.get_running_loop().time() - self._began_s
            tally, stage = self.world.tally, self.progress.stage
            tally.count_work(stage, busy_s=self._compute.busy_s, lived_s=lived_s)
            tally.count_network(self.transport.traffic, self.transport.counts)

    # ---- before the first iteration

    async def _take_stage(self, start_s: float) -> None:
        stages = range(self.world.manifest.pipeline.stages)
        if self._is_founder:
            self.progress.stage, self.progress.state = self.number % len(stages), "training"
            loop = asyncio.get_running_loop()
            await self._beat()
            while (left_s := start_s - loop.time()) > 0.0:
                await asyncio.sleep(min(left_s, self.world.scenario.swarm.heartbeat_s))
                await self._beat()
        else:
            await choose_stage(self.directory, stages=stages, peer=self.peer_id, announce=self._announce_stage)

    async def _announce_stage(self, stage: int) -> None:
        self.progress.stage = stage
        await self._beat()

    def _make_trainer(self) -> HollowTrainer:
        """With the initial weights, or those of the stage's first live replica."""
        scenario, stage = self.world.scenario, self.progress.stage
        assert stage is not None
        problem = Quadratic(problem_of(scenario, stage=stage), self.number)
        trainer = HollowTrainer(self.world.manifest, stage=stage, problem=problem, replica=self.world.replica)
        trainer.serve(
            self._compute,
            self,
            backward_passes=scenario.model.backward_multiplier,
            loss_passes=scenario.model.loss_multiplier,
        )
        if not self._is_founder:
            donors = [peer.trainer for peer in self.world.peers() if peer.progress.stage == stage]
            donor = next((each for each in donors if each is not None), None)
            if donor is not None:
                trainer.replica.replace_slow(donor.replica.phi)
            else:
                self.world.tally.population["restarted"] += 1
        return trainer

    def _steps(self, trainer: HollowTrainer) -> PipelineSteps:
        manifest = self.world.manifest
        shape = (manifest.pipeline.microbatch_sequences, manifest.inner.sequence_tokens, manifest.model.hidden_size)
        return PipelineSteps(
            trainer,
            heldout=np.zeros(0, dtype=np.uint16),
            identity=self._identity,
            transport=self.transport,
            compute=self._compute,
            directory=self.directory,
            progress=self.progress,
            events=self._events,
            codec=HollowCodec(manifest.pipeline.codec, shape),
        )

    # ---- rounds

    async def _train(self, trainer: HollowTrainer, steps: InnerSteps) -> None:
        averager, group = averagers_of(trainer, transport=self.transport, identity=self._identity)
        loop = RoundLoop(
            self.world.manifest,
            trainer=trainer,
            steps=steps,
            compute=self._compute,
            source=EmptySource(self.world.manifest),
            averager=averager,
            group=group,
            directory=StageView(self.directory, trainer.stage),
            progress=self.progress,
            events=self._events,
            settings=RoundSettings(sequences=self.world.manifest.pipeline.microbatch_sequences, adapt=False),
            after_round=self._after_round,
            announce=self._beat,
        )
        async with averager, group or contextlib.nullcontext():
            await self._beat()
            await loop.run()

    async def _after_round(self, round: int) -> None:
        assert self.trainer is not None
        stage, phi = self.trainer.stage, self.trainer.replica.phi
        loss = loss_of(phi, problem_of(self.world.scenario, stage=stage))
        self.world.tally.averaging[stage].count_replica(round, phi, loss)

    async def _heartbeat(self, steps: PipelineSteps, tasks: asyncio.TaskGroup) -> None:
        """As node/service.py does it: what watches may take long, and is never run twice at once."""
        running: dict[Watcher, asyncio.Task[None]] = {}
        try:
            while True:
                await asyncio.sleep(self.world.scenario.swarm.heartbeat_s)
                await self._beat()
                for watcher in steps.watchers:
                    if watcher not in running or running[watcher].done():
                        running[watcher] = tasks.create_task(watcher())
        finally:
            for task in running.values():
                task.cancel()

    async def _beat(self) -> None:
        await self.directory.publish(self._record())
        await self.directory.refresh()

    def _record(self) -> PeerRecord:
        """As of now in virtual time: the machine's clock has no say here."""
        self._sequence += 1
        record = self.progress.record([])
        return record.model_copy(update={"sequence": self._sequence, "sent_at_s": self.world.network.now_s()})

    def _forward_s(self) -> float:
        ratio = self.world.scenario.training.round_ratio
        return self.world.chance.log_normal(self._own_s, ratio, "iteration", self.number, self.progress.iteration)

    # ---- what the tally is told

    def starts(self, key: MicrobatchKey) -> None:
        self.world.tally.start(key[1], self.progress.iteration)

    def counts(self, key: MicrobatchKey) -> None:
        assert self.trainer is not None
        self.world.tally.count_visit(key[1], self.trainer.stage)

    def count_step(self, number: int, seconds: float) -> None:
        """An iteration of ours has ended."""
        self.world.tally.count_iteration(
            number,
            seconds=seconds,
            peers=self.world.peers_per_stage(),
            num_known=1 + len(self.directory.peers),
            now_s=asyncio.get_running_loop().time(),
        )

    def _hear(self, event: str, fields: dict[str, Any]) -> None:
        tally = self.world.tally
        match event:
            case "hop_failed":
                tally.count_failure(fields["microbatch"], fields["reason"])
            case "iteration":
                tally.overdue += not fields["complete"]
            case "exchange":
                tally.outcomes[fields["outcome"]] += 1


class CountedSteps(InnerSteps):
    """A pipeline's steps, whose iterations are counted."""

    def __init__(self, steps: PipelineSteps, peer: StagedPeer) -> None:
        self._steps, self._peer = steps, peer
        self.reads_data = steps.reads_data

    @property
    def round_now(self) -> int | None:
        return self._steps.round_now

    async def step(self, batches: RoundBatches | None) -> tuple[StepStats, float]:
        number = self._peer.progress.iteration
        stats, seconds = await self._steps.step(batches)
        self._peer.count_step(number, seconds)
        return stats, seconds

    async def measure(self, *, last: bool) -> float | None:
        return await self._steps.measure(last=last)

    def stop(self) -> None:
        self._steps.stop()


class EmptySource(BatchSource):
    """Tokens of no meaning, at once."""

    def __init__(self, manifest: Manifest) -> None:
        self._sequence_tokens = manifest.inner.sequence_tokens

    async def batches(self, round: int) -> RoundBatches:
        tokens = np.zeros(_SEQUENCES_PER_SHARD * self._sequence_tokens + 1, dtype=np.uint16)
        return RoundBatches(tokens, seed=0, sequence_tokens=self._sequence_tokens)

    async def prefetch(self, round: int) -> None:
        pass
