"""What a peer trains and averages, whole or a stage: weights, inner optimizer, slow weights, counters. Synchronous.

A round is `inner_steps` steps, then `end_round` (what to send) and, whenever the exchange has ended, `apply`. With overlap,
`apply` happens between two steps of the next round: the weights get the outer step's correction and keep the local progress
made meanwhile. How a step comes to its gradients is for the two kinds of trainer to say: node/trainer.py, from a batch of one's
own; node/pipeline/trainer.py, from the microbatches that came by.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from averaging.admission import AdmissionConfig
from averaging.flatten import FlatParameters
from averaging.replica import Outcome, Replica, ReplicaConfig
from averaging.update import RemoteUpdate, Update
from model.batches import RoundBatches
from model.config import ModelConfig
from model.optim import InnerConfig, build_optimizer, learning_rate, set_learning_rate
from model.stage import Stage
from model.transformer import Transformer
from model.weights import decode_weights, encode_weights
from protocol.manifest import Manifest

__all__ = ["TrainingState", "inner_config", "model_config"]


def model_config(manifest: Manifest) -> ModelConfig:
    """The manifest's model section as the model's own configuration."""
    return ModelConfig(**manifest.model.model_dump())


def inner_config(manifest: Manifest) -> InnerConfig:
    """The manifest's inner section as the optimizer's own configuration."""
    return InnerConfig(**manifest.inner.model_dump())


class TrainingState(ABC):
    """Weights, inner optimizer and slow weights of one peer.

    Args:
        manifest: the run.
        model: the whole model or a stage of it, with its initial weights, on its device.
    """

    def __init__(self, manifest: Manifest, model: Transformer | Stage) -> None:
        self.manifest = manifest
        sync, safety = manifest.sync, manifest.safety
        self._module = model
        self.flat = FlatParameters(model)
        self._inner = inner_config(manifest)
        self.optimizer = build_optimizer(model, self._inner)
        self.replica = Replica(
            self.flat.theta,
            ReplicaConfig.of(sync, admission=AdmissionConfig(**safety.model_dump()), compiled=None),
        )
        self.round = 0
        self.step_in_round = 0
        self.tokens_in_round = 0
        self.tokens = 0
        self.num_divergences = 0
        """Rounds that ended with weights that were not finite and were given up."""
        self.is_shared = False
        """Whether what others learnt is in the weights, since the run began and not just this session."""

    @property
    def total_steps(self) -> int:
        """Inner steps of a finite run; 0 for a run without end."""
        return self.manifest.sync.total_rounds * self.manifest.sync.inner_steps

    @abstractmethod
    def evaluate(self, weights: Mapping[str, Tensor] | None = None) -> float | None:
        """Mean loss over the held-out set in nats per token, of the current weights or of others of the same shapes; None where
        weights alone have no loss."""

    def take_step(self, tokens: int) -> None:
        """The inner optimizer's step with the gradients that are there, which `tokens` tokens gave."""
        sync = self.manifest.sync
        # A stretched round is one round.
        step = self.round * sync.inner_steps + min(self.step_in_round, sync.inner_steps - 1)
        decay_steps = sync.decay_rounds * sync.inner_steps
        rate = learning_rate(step, config=self._inner, total_steps=self.total_steps, decay_steps=decay_steps)
        set_learning_rate(self.optimizer, rate)
        torch.nn.utils.clip_grad_norm_(self._module.parameters(), self._inner.clip_norm)
        self.optimizer.step()
        self.step_in_round += 1
        self.tokens_in_round += tokens
        self.tokens += tokens

    def end_round(self, next_round: int) -> Update:
        """Close the round: what to send for it; the next step belongs to `next_round`. After a skip the update carries the number
        before that, under which the others exchange now. A round that diverged is given up: the
        update then says that nothing changed."""
        try:
            update = self.replica.pack(round=next_round - 1, tokens=self.tokens_in_round)
        except FloatingPointError:
            self._go_back()
            update = self.replica.pack(round=next_round - 1, tokens=1)
        self.round = next_round
        self.step_in_round = 0
        self.tokens_in_round = 0
        return update

    def _go_back(self) -> None:
        """The weights are not finite: return to the slow weights, which are, and forget the optimizer's state."""
        self.num_divergences += 1
        self.flat.theta.copy_(self.replica.phi)
        self.optimizer = build_optimizer(self._module, self._inner)

    def apply(self, partners: Sequence[RemoteUpdate], group_mean: memoryview | None = None) -> Outcome:
        """The outer step of the last closed round, alone when `partners` is empty and there is no mean of a group."""
        outcome = self.replica.apply(partners, steps_since_pack=self.step_in_round, group_mean=group_mean)
        self.is_shared = self.is_shared or group_mean is not None or outcome.kind in ("averaged", "clipped")
        return outcome

    def snapshot(self) -> bytes:
        """The slow weights as a safetensors file, which joiners start from."""
        return encode_weights(self.flat.views(self.replica.phi))

    def read_snapshot(self, data: bytes) -> dict[str, Tensor]:
        """Decode a snapshot of this run's model.

        Raises:
            CheckpointError: other names, shapes or types, or values that are not finite.
        """
        return decode_weights(data, {name: tuple(p.shape) for name, p in self._module.named_parameters()})

    def distance(self, weights: Mapping[str, Tensor]) -> float:
        """‖others − φ‖ / ‖φ‖."""
        own = self.flat.views(self.replica.phi)
        squares = sum(float((weights[name].to(view.device) - view).square().sum()) for name, view in own.items())
        return math.sqrt(squares) / max(float(torch.linalg.vector_norm(self.replica.phi)), 1e-30)

    def adopt(self, weights: Mapping[str, Tensor], round: int) -> None:
        """Enter the swarm at `round` with another peer's slow weights; momentum and optimizer start from zero, and what was
        trained in the present round is not claimed."""
        phi = torch.empty_like(self.flat.theta)
        for name, view in self.flat.views(phi).items():
            view.copy_(weights[name])
        self.replica.replace_slow(phi)
        self.optimizer = build_optimizer(self._module, self._inner)
        self.round = round
        self.tokens_in_round = 0

    def checkpoint(self, batches: RoundBatches | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything needed to go on: tensors, and a JSON-able part with the counters and the data cursor."""
        tensors = {f"replica.{key}": value for key, value in self.replica.state_dict().items()}
        tensors["theta"] = self.flat.theta
        optimizer = self.optimizer.state_dict()
        for index, state in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{key}": v for key, v in state.items() if isinstance(v, Tensor)}
        meta = {
            "round": self.round,
            "step_in_round": self.step_in_round,
            "tokens_in_round": self.tokens_in_round,
            "tokens": self.tokens,
            "is_shared": self.is_shared,
            # Before a round's first step, `batches` may still be those of the round before.
            "cursor": batches.cursor if batches is not None and self.step_in_round else None,
            "admission": self.replica.admission.state_dict(),
            "optimizer": {
                str(index): {key: v for key, v in state.items() if not isinstance(v, Tensor)}
                for index, state in optimizer["state"].items()
            },
        }
        return tensors, meta

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Go on where `checkpoint` left off.

        Raises:
            KeyError, ValueError, RuntimeError: the checkpoint belongs to another model.
        """
        self.replica.load_state_dict(
            {key.removeprefix("replica."): value for key, value in tensors.items() if key.startswith("replica.")}
        )
        self.replica.admission.load_state_dict(meta["admission"])
        self.flat.theta.copy_(tensors["theta"])
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {int(index): dict(state) for index, state in meta["optimizer"].items()}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                optimizer["state"][int(index)][name] = value.clone()
        self.optimizer.load_state_dict(optimizer)
        self.round = int(meta["round"])
        self.step_in_round = int(meta["step_in_round"])
        self.tokens_in_round = int(meta["tokens_in_round"])
        self.tokens = int(meta["tokens"])
        self.is_shared = bool(meta.get("is_shared", False))  # checkpoints of before have none
