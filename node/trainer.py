"""The trainer of a whole replica: batches of one's own, and everything that torch does with them. Synchronous: the node calls it on
its compute thread. What it shares with the trainer of a stage is in node/training_state.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.batches import RoundBatches
from model.data import Tokens
from model.initial import initialise, weights_sha256
from model.transformer import Transformer
from node.heldout import Heldout
from node.training_state import TrainingState, model_config
from protocol.errors import UserError
from protocol.manifest import Manifest

__all__ = ["StepStats", "Trainer", "new_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One inner step."""

    loss: float
    tokens: int


def new_model(manifest: Manifest, *, verify: bool = True) -> Transformer:
    """The run's model in its initial state.

    Args:
        verify: check the weights against the manifest's hash.

    Raises:
        UserError: the hash differs, so this machine would train another model than the others.
    """
    model = Transformer(model_config(manifest))
    initialise(model, manifest.initial_state.seed)
    if verify and weights_sha256(dict(model.named_parameters())) != manifest.initial_state.sha256:
        raise UserError(
            "the initial weights made here differ from the manifest's initial_state.sha256; "
            "the organiser must run `llm-node init` again after changing the model"
        )
    return model


class Trainer(TrainingState):
    """Model, inner optimizer and slow weights of one peer.

    Args:
        manifest: the run.
        heldout: held-out tokens [T].
        device: torch device of the training state.
    """

    def __init__(self, manifest: Manifest, *, heldout: Tokens, device: str = "cpu") -> None:
        self.model = new_model(manifest).to(device)
        super().__init__(manifest, self.model)
        self.heldout = Heldout(heldout, sequence_tokens=manifest.inner.sequence_tokens)
        self.affordable_pieces: int | None = None
        """Pieces of the held-out set to measure foreign weights by; None for all. Set while training, see node/evaluation.py."""
        self._device = device

    def step(self, batches: RoundBatches, num_sequences: int) -> StepStats:
        """One inner step on `num_sequences` sequences drawn from `batches`."""
        batch = batches.next(num_sequences).to(self._device)
        self.optimizer.zero_grad(set_to_none=False)
        loss = self.model.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        tokens = num_sequences * self.manifest.inner.sequence_tokens
        self.take_step(tokens)
        return StepStats(loss=float(loss.detach()), tokens=tokens)

    def evaluate(self, weights: Mapping[str, Tensor] | None = None) -> float:
        """Mean loss over the held-out set in nats per token, of the current weights or of others of the same shapes.

        The current weights are measured on the whole set, and estimates refer to that from then on. Others are measured on
        `affordable_pieces` of it."""
        if weights is None:
            return self.heldout.whole(self._heldout_loss, remember=True)
        with self._using(weights):
            if self.affordable_pieces is None or not self.heldout.is_measured:
                return self.heldout.whole(self._heldout_loss)
            return self.heldout.estimate(self._heldout_loss, num_pieces=self.affordable_pieces)

    def estimate(self, num_pieces: int) -> float:
        """What `evaluate` would return for the current weights, from a few pieces of the set; see node/heldout.py."""
        return self.heldout.estimate(self._heldout_loss, num_pieces=num_pieces)

    @torch.no_grad()
    def _heldout_loss(self, batch: Tensor) -> Tensor:
        return self.model.loss(batch.to(self._device))

    @contextlib.contextmanager
    def _using(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the model compute with other weights for a moment; its own stay where they are."""
        own = {name: parameter.data for name, parameter in self.model.named_parameters()}
        try:
            for name, parameter in self.model.named_parameters():
                parameter.data = weights[name].to(self._device)
            yield
        finally:
            for name, parameter in self.model.named_parameters():
                parameter.data = own[name]
