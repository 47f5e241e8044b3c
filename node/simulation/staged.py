"""A simulated swarm that trains a model in stages: who serves whom, in which time, and what is lost.

Scheduler, executor, routing, averaging and directory are the node's own; see node/simulation/staged_peer.py for what is not.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from model.config import PRESETS
from node.simulation.links import network_of
from node.simulation.population import Population
from node.simulation.scenario import Scenario
from node.simulation.staged_peer import StagedPeer, StagedWorld
from node.simulation.staged_tally import StagedTally
from node.simulation.world import identity_of, replica_config
from protocol.manifest import (
    DataSpec,
    InitialStateSpec,
    InnerSpec,
    Manifest,
    ModelSpec,
    SafetySpec,
    TokenizerSpec,
)
from protocol.memory_links import Chance

__all__ = ["StagedSimulation", "manifest_of"]

_NO_HASH = "0" * 64
_ORGANISER = -1
_SPARE_ITERATIONS = 5
"""Beyond so many more than planned, each as long as can be, nobody is left who could go on."""
_SETTLE_S = 45.0
"""Who finds the directory's bucket too full moves on, and is forgotten by those who do not after so long."""


class StagedSimulation:
    """One run of a scenario on the running virtual loop."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self._scenario = scenario
        network = network_of(scenario, folder, number_of=lambda peer: self._population.number_of[peer])
        self._world = StagedWorld(
            scenario=scenario,
            manifest=manifest_of(scenario),
            network=network,
            replica=replica_config(scenario),
            chance=Chance(scenario.swarm.seed),
            tally=StagedTally(num_stages=scenario.pipeline.stages, num_parameters=scenario.swarm.parameters),
            peers=lambda: self._population.live.values(),
        )
        self._population: Population[StagedPeer] = Population(
            scenario,
            network=network,
            chance=self._world.chance,
            make=lambda number, donor: StagedPeer(self._world, number, is_founder=donor is None),
            counts=self._world.tally.population,
            settle_s=_SETTLE_S + 2 * scenario.swarm.heartbeat_s,
        )

    async def run(self) -> dict[str, Any]:
        """Let everybody live until the last round is done."""
        manifest = self._world.manifest
        most = manifest.sync.total_rounds * manifest.sync.inner_steps + _SPARE_ITERATIONS
        try:
            async with asyncio.timeout(self._population.start_s + most * manifest.pipeline.iteration_timeout_s):
                await self._population.run()
        except TimeoutError:
            return self._report(is_finished=False)
        return self._report(is_finished=True)

    def _report(self, *, is_finished: bool) -> dict[str, Any]:
        scenario, manifest, tally = self._scenario, self._world.manifest, self._world.tally
        tokens = manifest.pipeline.microbatch_sequences * manifest.inner.sequence_tokens
        return {
            "name": scenario.name,
            "algorithm": scenario.sync.algorithm,
            "peers": scenario.swarm.peers,
            "stages": manifest.pipeline.stages,
            "path_length": manifest.pipeline.path_length,
            "rounds": scenario.num_rounds,
            "iterations": scenario.num_rounds * manifest.sync.inner_steps,
            "seed": scenario.swarm.seed,
            "finished": is_finished,
            "start_s": self._population.start_s,
            "virtual_s": asyncio.get_running_loop().time(),
            **tally.summary(microbatch_tokens=tokens, start_s=self._population.start_s),
        }


def manifest_of(scenario: Scenario) -> Manifest:
    """The run that is simulated; what only real data and weights need is filled with zeros."""
    shape, sync = PRESETS[scenario.model.preset], scenario.sync
    tokens = scenario.model.sequence_tokens
    return Manifest(
        name="simulated",
        organiser=identity_of(scenario.swarm.seed, _ORGANISER).peer_id,
        model=ModelSpec(**{name: getattr(shape, name) for name in ModelSpec.model_fields}),
        tokenizer=TokenizerSpec(blob=_NO_HASH),
        data=DataSpec(kind="local", heldout=_NO_HASH, heldout_tokens=tokens + 1, train_tokens=0),
        inner=InnerSpec(lr=scenario.training.lr, sequence_tokens=tokens),
        sync=sync.model_copy(update={"total_rounds": scenario.num_rounds}),
        safety=scenario.safety or SafetySpec(),
        pipeline=scenario.pipeline,
        initial_state=InitialStateSpec(seed=scenario.swarm.seed, sha256=_NO_HASH),
    )
