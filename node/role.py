"""What a peer takes on, a whole replica or a stage of it, and the parts of a peer that differ with that.

The run decides which of the two: its manifest has one pipeline stage or several. Which stage is the peer's choice: the one in
its own checkpoint, else the one that the swarm lacks most among those that fit into its memory.
"""

from __future__ import annotations

from pathlib import Path

import torch

from model.config import training_bytes_per_parameter
from model.data import Tokens
from model.optim import state_bytes_per_parameter
from model.stage import Stage
from model.transformer import Transformer
from node.compute import Compute
from node.events import EventLog
from node.inner_steps import BatchSteps, InnerSteps
from node.pipeline.stage_choice import StageView, choose_stage
from node.pipeline.steps import PipelineSteps
from node.pipeline.trainer import StageTrainer
from node.progress import Progress
from node.service import Service
from node.trainer import Trainer
from node.training_state import TrainingState, model_config
from protocol.errors import UserError
from protocol.identity import Identity
from protocol.manifest import Manifest

__all__ = ["MEMORY_MARGIN", "Role", "memory_needed"]

MEMORY_MARGIN = 1.2
_TRANSIENT_BYTES = 4.0  # gradients of one microbatch until they count


def memory_needed(manifest: Manifest, stage: int | None) -> float:
    """Estimated bytes that training takes: of a whole replica, or of one stage."""
    config, inner, spec = model_config(manifest), manifest.inner, manifest.pipeline
    with torch.device("meta"):
        part = Transformer(config) if stage is None else Stage(config, stage, spec.stages)
    optimizer_bytes = state_bytes_per_parameter(part, inner.optimizer)
    if isinstance(part, Transformer):
        return config.memory_bytes(
            num_sequences=inner.min_sequences,
            sequence_tokens=inner.sequence_tokens,
            optimizer_state_bytes=optimizer_bytes,
        )
    parameters = sum(parameter.numel() for parameter in part.parameters())
    tokens = spec.microbatch_sequences * inner.sequence_tokens
    held = 2 * 4 * tokens * config.hidden_size * spec.slots  # what came in, and what was sent on
    layers = len(part.model.layers)
    computing = config.activation_bytes(tokens) * layers / config.num_layers
    return parameters * (training_bytes_per_parameter(optimizer_bytes) + _TRANSIENT_BYTES) + held + computing


class Role:
    """One peer's part in its run.

    Args:
        identity: our own.
        folder: of the run in this home, or None.
    """

    def __init__(
        self, manifest: Manifest, *, identity: Identity, service: Service, progress: Progress, folder: Path | None
    ) -> None:
        self._manifest, self._identity, self._service, self._progress = manifest, identity, service, progress
        self._checkpoints = None if folder is None else folder / "checkpoints"
        self.stage: int | None = None
        self.fitting: list[int] = []
        """Stages that fit into this machine's memory."""

    async def take(self, *, memory_bytes: float) -> None:
        """Choose, and tell the swarm.

        Args:
            memory_bytes: that training may take.

        Raises:
            UserError: no stage fits.
        """
        num_stages = self._manifest.pipeline.stages
        if num_stages == 1:
            return
        needed = [memory_needed(self._manifest, stage) for stage in range(num_stages)]
        self.fitting = [stage for stage, each in enumerate(needed) if each * MEMORY_MARGIN <= memory_bytes]
        if not self.fitting:
            raise UserError(
                f"a stage of {self._manifest.name} needs about {min(needed) / 2**30:.1f} GiB of memory and "
                f"{memory_bytes / 2**30:.1f} GiB are free; close other programs or join from a larger machine"
            )

        kept = self._kept()
        if kept in self.fitting:
            self.stage = kept
            await self._announce(kept)
        else:
            directory, peer = self._service.directory, self._identity.peer_id
            self.stage = await choose_stage(directory, stages=self.fitting, peer=peer, announce=self._announce)

    async def move(self, stage: int) -> None:
        """Take another stage."""
        self.stage = stage
        await self._announce(stage)

    async def _announce(self, stage: int) -> None:
        self._progress.stage, self._progress.next_stage = stage, None
        self._progress.snapshots = []
        await self._service.beat()

    @property
    def view(self) -> StageView:
        """The peers that do the same as we do."""
        return StageView(self._service.directory, self.stage)

    @property
    def checkpoints(self) -> Path | None:
        """Where this role's checkpoints are."""
        if self._checkpoints is None or self.stage is None:
            return self._checkpoints
        return self._checkpoints / f"stage-{self.stage}"

    def trainer(self, heldout: Tokens, *, device: str) -> TrainingState:
        """A new one, with the initial weights."""
        if self.stage is None:
            return Trainer(self._manifest, heldout=heldout, device=device)
        return StageTrainer(self._manifest, stage=self.stage, device=device)

    def steps(self, trainer: TrainingState, *, heldout: Tokens, compute: Compute, events: EventLog) -> InnerSteps:
        """How that trainer steps; a stage serves others from now on."""
        if isinstance(trainer, StageTrainer):
            steps = PipelineSteps(
                trainer,
                heldout=heldout,
                identity=self._identity,
                transport=self._service.transport,
                compute=compute,
                directory=self._service.directory,
                progress=self._progress,
                events=events,
            )
            steps.enter()
            return steps
        assert isinstance(trainer, Trainer)
        return BatchSteps(trainer, compute, self._progress)

    def _kept(self) -> int | None:
        """The stage of the newest checkpoint here."""
        folders = [] if self._checkpoints is None else list(self._checkpoints.glob("stage-*"))
        newest = max(folders, key=lambda folder: folder.stat().st_mtime, default=None)
        return None if newest is None else int(newest.name.removeprefix("stage-"))
