"""The trainer of one stage: the same state as that of a whole replica, but its gradients come from microbatches that visited."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from model.initial import initialise
from model.stage import Stage
from node.pipeline.worker import StageWorker
from node.training_state import TrainingState, model_config
from protocol.manifest import Manifest

__all__ = ["StageTrainer"]

MEASURE_S, MEASURE_PASSES = 0.5, 20
"""When the measurement of the own speed ends; two passes at least."""


class StageTrainer(TrainingState):
    """Weights, inner optimizer and slow weights of one stage's replica.

    Args:
        manifest: the run; it has `pipeline.stages` stages.
        stage: which of them.
        device: torch device of the training state.
        model: what to train; left out, that stage of the run's model with its initial weights.
    """

    def __init__(self, manifest: Manifest, *, stage: int, device: str = "cpu", model: Stage | None = None) -> None:
        self.stage = stage
        if model is None:
            model = Stage(model_config(manifest), stage, manifest.pipeline.stages)
            initialise(model, manifest.initial_state.seed)
        super().__init__(manifest, model.to(device))
        self.worker = StageWorker(model)

    def measure_forward(self) -> float:
        """Seconds of a forward pass of one microbatch, the fastest of a few: whoever seems slow, since something else ran in
        between, is given little to do."""
        spec, inner = self.manifest.pipeline, self.manifest.inner
        shape = (spec.microbatch_sequences, inner.sequence_tokens, self.manifest.model.hidden_size)
        seconds: list[float] = []
        while len(seconds) < 2 or (sum(seconds) < MEASURE_S and len(seconds) < MEASURE_PASSES):
            started_s = time.perf_counter()
            with torch.no_grad():
                self.worker.stage(torch.zeros(shape, device=self.flat.theta.device))
            seconds.append(time.perf_counter() - started_s)
        return min(seconds)

    def evaluate(self, weights: Mapping[str, Tensor] | None = None) -> float | None:
        return None  # a stage alone has no loss

    def step(self, *, least_tokens: int) -> int:
        """The inner step at an iteration's end.

        Args:
            least_tokens: with fewer there is no step: their gradient would be mostly noise.

        Returns:
            The tokens that it is the mean over; 0 for no step.
        """
        tokens = self.worker.end_iteration(least_tokens=least_tokens)
        if tokens:
            self.take_step(tokens)
            self.worker.clear()
        return tokens

    def enter(self, iteration: int) -> None:
        """The next step is that of this iteration."""
        self.round, self.step_in_round = divmod(iteration, self.manifest.sync.inner_steps)
