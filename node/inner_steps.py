"""How the inner steps of a round are taken: from batches of one's own, or from what comes through a pipeline.

The round loop (node/rounds.py) knows rounds, exchanges and the swarm, and asks one of these for every step. The other kind is
node/pipeline/steps.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from model.batches import RoundBatches
from node.compute import Compute
from node.evaluation import Evaluation
from node.progress import Progress
from node.trainer import StepStats, Trainer

__all__ = ["BatchSteps", "InnerSteps"]


class InnerSteps(ABC):
    """One way of taking steps."""

    reads_data: bool
    """Whether a round needs batches."""

    @property
    def round_now(self) -> int | None:
        """The round that it is for all peers alike, where steps are taken in common; None where every peer has its own pace."""
        return None

    @abstractmethod
    async def step(self, batches: RoundBatches | None) -> tuple[StepStats, float]:
        """One inner step.

        Args:
            batches: of the round; None unless `reads_data`.

        Returns:
            What it gave (a loss that is not finite stands for none), and the seconds that it took.
        """

    @abstractmethod
    async def measure(self, *, last: bool) -> float | None:
        """The held-out loss at a round's end, exact after the run's last one; None where it can not be measured here."""

    @abstractmethod
    def stop(self) -> None:
        """The owner leaves: a step that waits for others ends now."""


class BatchSteps(InnerSteps):
    """Steps of a whole replica. To be made on the event loop."""

    reads_data = True

    def __init__(self, trainer: Trainer, compute: Compute, progress: Progress) -> None:
        self._trainer, self._compute, self._progress = trainer, compute, progress
        self._evaluation = Evaluation(trainer, compute)

    async def step(self, batches: RoundBatches | None) -> tuple[StepStats, float]:
        assert batches is not None
        return await self._compute.timed(self._trainer.step, batches, self._progress.sequences_per_step)

    async def measure(self, *, last: bool) -> float | None:
        return await self._evaluation.after_round(last=last)

    def stop(self) -> None:
        pass  # a step of one's own waits for nobody
