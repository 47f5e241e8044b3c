"""Stages without substance: the node's own stage code runs on them, and only their arithmetic is left out.

A hidden state has its true sequences and tokens and a width of zero, so that whatever counts tokens counts right; its bytes on the
wire are as many as the real ones, and nobody copies them (`protocol.memory_stream.Hollow`); a pass spends the virtual time that
the real one would take on that peer. What a stage learns is the toy problem of node/simulation/quadratic.py, one step of it per
inner step, so that the averaging has something to average.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from averaging.replica import Replica, ReplicaConfig
from model.stage import Stage
from node.compute import Compute
from node.pipeline.activations import ActivationCodec
from node.pipeline.trainer import StageTrainer
from node.pipeline.worker import MicrobatchKey, StageWorker
from node.simulation.quadratic import Quadratic
from protocol.manifest import Manifest
from protocol.memory_stream import Hollow

__all__ = ["HollowCodec", "HollowTrainer", "SpentCompute", "Watcher"]

P = ParamSpec("P")
T = TypeVar("T")

_payloads: dict[int, Hollow] = {}


class SpentCompute(Compute):
    """Runs calls inline; each takes as much virtual time as it says it has spent.

    Args:
        forward_s: what a forward pass takes now.
    """

    def __init__(self, forward_s: Callable[[], float]) -> None:
        self._forward_s = forward_s
        self.busy_s = 0.0
        """All that was spent."""
        self._spent_s = 0.0

    def spend(self, num_passes: float) -> None:
        """The call in progress takes as long as so many forward passes."""
        self._spent_s += num_passes * self._forward_s()

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        self._spent_s = 0.0
        result = function(*args, **kwargs)
        spent_s = self._spent_s
        if spent_s > 0.0:
            self.busy_s += spent_s
            await asyncio.sleep(spent_s)
        return result

    def close(self) -> None:
        pass


class Watcher(Protocol):
    """Is told what a worker does."""

    def starts(self, key: MicrobatchKey) -> None:
        """One of our own microbatches begins."""

    def counts(self, key: MicrobatchKey) -> None:
        """A visit is over, and its gradient is counted here."""


class HollowStage(Stage):
    """A stage that does nothing to what it is given.

    Args:
        number: which stage.
        num_parameters: of the toy problem.
    """

    def __init__(self, number: int, num_parameters: int) -> None:
        nn.Module.__init__(self)  # and not Stage's, which would make a real one
        self.number = number
        self.theta = nn.Parameter(torch.zeros(num_parameters))

    def embed(self, tokens: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, 0)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self._nothing()

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return hidden.sum() + self._nothing()

    def _nothing(self) -> Tensor:
        """Zero, and a way for autograd to the parameters."""
        return self.theta[:0].sum()


class HollowWorker(StageWorker):
    """Counts and forgets as the real worker does, and spends the time of its passes.

    Args:
        backward_passes: a backward pass, in forward passes.
        loss_passes: head and loss, likewise.
    """

    def __init__(
        self, stage: Stage, compute: SpentCompute, watcher: Watcher, *, backward_passes: float, loss_passes: float
    ) -> None:
        super().__init__(stage)
        self._compute, self._watcher = compute, watcher
        self._backward_passes, self._loss_passes = backward_passes, loss_passes

    def forward(self, key: MicrobatchKey, inputs: Tensor) -> Tensor:
        if self.stage.number == 0:
            self._watcher.starts(key)
        self._compute.spend(1.0)
        return super().forward(key, inputs)

    def backward(self, key: MicrobatchKey, gradient: Tensor) -> Tensor | None:
        self._compute.spend(self._backward_passes)
        return super().backward(key, gradient)

    def loss(self, key: MicrobatchKey, hidden: Tensor) -> tuple[float, Tensor]:
        self._compute.spend(self._loss_passes)
        return super().loss(key, hidden)

    def commit(self, key: MicrobatchKey) -> None:
        super().commit(key)
        self._watcher.counts(key)


class HollowTrainer(StageTrainer):
    """A stage's replica whose inner step is one of the toy problem's."""

    def __init__(self, manifest: Manifest, *, stage: int, problem: Quadratic, replica: ReplicaConfig) -> None:
        super().__init__(manifest, stage=stage, model=HollowStage(stage, problem.num_parameters))
        self.replica = Replica(self.flat.theta, replica)
        self._problem = problem

    def serve(self, compute: SpentCompute, watcher: Watcher, *, backward_passes: float, loss_passes: float) -> None:
        """Let microbatches visit; see HollowWorker."""
        self.worker = HollowWorker(
            self.worker.stage, compute, watcher, backward_passes=backward_passes, loss_passes=loss_passes
        )

    def take_step(self, tokens: int) -> None:
        self._problem.train(self.flat.theta, 1)
        self.step_in_round += 1
        self.tokens_in_round += tokens
        self.tokens += tokens


class HollowCodec(ActivationCodec):
    """Payloads of the right size, which nobody reads.

    Args:
        name: the run's codec.
        shape: B, T and the width that a real hidden state has.
    """

    def __init__(self, name: str, shape: tuple[int, int, int]) -> None:
        super().__init__(name, shape)
        self._tensor = torch.zeros(*shape[:2], 0)
        if self.num_bytes not in _payloads:
            _payloads[self.num_bytes] = Hollow(self.num_bytes)

    def encode(self, tensor: Tensor) -> memoryview:
        return memoryview(_payloads[self.num_bytes])

    def decode(self, data: memoryview | bytes | bytearray) -> Tensor:
        return self._tensor
