"""What one stage peer computes: forward and backward passes of microbatches, and the inner step at an iteration's end.

A forward pass keeps only what came in and runs again when the gradient arrives: activations inside a stage are several
times larger than what passes between stages, and a peer that keeps less can serve more microbatches at once. What a backward
pass adds to the weights' gradient is held apart until `commit`: a peer that was given up as dead, and is not, must
be able to throw its share away, or the microbatch would count twice (node/pipeline/visits.py).

Every gradient is a sum over tokens; the step divides by the tokens that visited this replica, not by those of the whole
iteration (SkipPipe's n_i), so a replica that was skipped more often learns as fast.

Synchronous; called on the compute thread, but for `forget`, which the loop may call in between, and `commit`, which may run beside
a pass: once `end_iteration` has begun, nothing is committed any more.
Shapes: B sequences, T tokens, W width.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.stage import Stage
from protocol.errors import LlmNodeError

__all__ = ["MicrobatchKey", "StageWorker", "Visit", "VisitGoneError"]

MicrobatchKey = tuple[str, int]
"""Where a microbatch started, and its number there."""


class VisitGoneError(LlmNodeError):
    """The microbatch was given up while its pass waited for the processor."""


@dataclass(slots=True)
class Visit:
    """A microbatch between its forward and its backward pass.

    Args:
        inputs: what came in, fp32 [B, T, W]; token ids [B, T + 1] at stage 0.
        num_tokens: B · T.
        gradients: of the weights, once the backward pass has run; not counted yet.
    """

    inputs: Tensor
    num_tokens: int
    gradients: Sequence[Tensor | None] = ()
    head_gradients: Sequence[Tensor | None] = ()


class StageWorker:
    """One stage's weights and the microbatches that visit it.

    Args:
        stage: the weights; the caller owns the optimizer.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.visits: dict[MicrobatchKey, Visit] = {}
        self.num_tokens = 0
        """Tokens whose gradients are in the weights' gradient now."""
        self._parameters = list(stage.parameters())
        self._counting = threading.Lock()
        self._device = self._parameters[0].device
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)

    # ---- any stage

    def forward(self, key: MicrobatchKey, inputs: Tensor) -> Tensor:
        """Visit: hidden states [B, T, W] of `inputs`, which stage 0 takes as token ids [B, T + 1]."""
        inputs = inputs.to(self._device)
        num_tokens = inputs.shape[0] * (inputs.shape[1] - (self.stage.number == 0))
        self.visits[key] = Visit(inputs, num_tokens)
        with torch.no_grad():
            return self._run(inputs)

    def infer(self, inputs: Tensor) -> Tensor:
        """The same without a visit: nothing is kept."""
        with torch.no_grad():
            return self._run(inputs.to(self._device))

    def admit(self, key: MicrobatchKey, inputs: Tensor) -> None:
        """Take over a visit whose forward pass ran elsewhere: hidden states [B, T, W] that went in there."""
        self.visits[key] = Visit(inputs.to(self._device), inputs.shape[0] * inputs.shape[1])

    def backward(self, key: MicrobatchKey, gradient: Tensor) -> Tensor | None:
        """The gradient [B, T, W] with respect to what came in, from that of what went out; None at stage 0. Counts on `commit`.

        Raises:
            VisitGoneError: the microbatch is not here any more.
        """
        visit = self._visit(key)
        is_first = self.stage.number == 0
        inputs = visit.inputs if is_first else visit.inputs.detach().requires_grad_()
        outputs = self._run(inputs)
        wanted = self._parameters if is_first else [inputs, *self._parameters]
        found = torch.autograd.grad(outputs, wanted, gradient.to(self._device), allow_unused=True)
        visit.gradients = found if is_first else found[1:]
        return None if is_first else found[0]

    def commit(self, key: MicrobatchKey) -> None:
        """Count the microbatch's gradients, and forget it.

        Raises:
            VisitGoneError: it is not here any more, and does not count.
        """
        with self._counting, torch.no_grad():
            visit = self._visit(key)
            self.forget(key)
            for gradients in (visit.gradients, visit.head_gradients):
                for parameter, gradient in zip(self._parameters, gradients, strict=False):
                    if gradient is not None:
                        assert parameter.grad is not None
                        parameter.grad.add_(gradient)
            self.num_tokens += visit.num_tokens

    def forget(self, key: MicrobatchKey) -> None:
        """Drop a microbatch and what it would have added. Harmless for one that is not here."""
        self.visits.pop(key, None)

    def end_iteration(self, *, least_tokens: int) -> int:
        """Make the weights' gradient a mean over tokens, for the optimizer to step with; `clear` afterwards.

        Returns:
            The tokens it is the mean of; 0 if there were fewer than `least_tokens`, and then there is nothing to step with.
        """
        with self._counting:
            self.visits.clear()
        if self.num_tokens < max(least_tokens, 1):
            self.clear()
            return 0
        for parameter in self._parameters:
            assert parameter.grad is not None
            parameter.grad.div_(self.num_tokens)
        return self.num_tokens

    def clear(self) -> None:
        """Begin the next iteration's sum."""
        self.num_tokens = 0
        for parameter in self._parameters:
            assert parameter.grad is not None
            parameter.grad.zero_()

    # ---- stage 0

    def loss(self, key: MicrobatchKey, hidden: Tensor) -> tuple[float, Tensor]:
        """Head and loss of a microbatch that comes back.

        Args:
            hidden: [B, T, W], from the last stage of the path.

        Returns:
            Mean loss in nats per token, and the gradient of the SUM over tokens with respect to `hidden`.

        Raises:
            VisitGoneError: the microbatch is not here any more.
        """
        visit = self._visit(key)
        hidden = hidden.detach().to(self._device).requires_grad_()
        loss = self.stage.loss(hidden, visit.inputs[:, 1:])
        gradient, *visit.head_gradients = torch.autograd.grad(
            loss * visit.num_tokens, [hidden, *self._parameters], allow_unused=True
        )
        return float(loss.detach()), gradient

    @torch.no_grad()
    def loss_of(self, hidden: Tensor, tokens: Tensor) -> float:
        """Mean loss in nats per token of token ids [B, T + 1] whose hidden states [B, T, W] have come back; nothing is kept."""
        return float(self.stage.loss(hidden.to(self._device), tokens[:, 1:].to(self._device)))

    def _visit(self, key: MicrobatchKey) -> Visit:
        visit = self.visits.get(key)
        if visit is None:
            raise VisitGoneError("the microbatch was given up meanwhile")
        return visit

    def _run(self, inputs: Tensor) -> Tensor:
        if self.stage.number == 0:
            inputs = self.stage.embed(inputs[:, :-1])
        hidden: Tensor = self.stage(inputs)
        return hidden
