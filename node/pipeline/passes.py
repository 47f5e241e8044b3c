"""What a stage peer computes for the microbatches that visit it, between what comes in and what is sent on; and how long it takes.

Every pass runs on the compute thread, one after another; node/pipeline/turnstile.py says which is next. Decoding and counting run
beside them.
Shapes: B sequences, T tokens, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch import Tensor

from node.compute import Compute
from node.pipeline.activations import ActivationCodec
from node.pipeline.replay import BACKWARD, FORWARD, LOSS
from node.pipeline.worker import MicrobatchKey, StageWorker

__all__ = ["Passes"]

P = ParamSpec("P")
T = TypeVar("T")

RECENT = 0.2
"""Weight of the latest measurement of our speed."""


class Passes:
    """The passes of one stage.

    Args:
        worker: our stage.
        codec: of activations and gradients.
    """

    def __init__(self, *, compute: Compute, worker: StageWorker, codec: ActivationCodec) -> None:
        self._compute, self._worker, self._codec = compute, worker, codec
        self.pace: dict[int, float] = {}
        """Seconds of a forward pass, loss and backward pass, as measured lately."""

    async def decode(self, payload: memoryview) -> Tensor:
        """Activations or their gradient [B, T, W].

        Raises:
            ProtocolError: values that nobody honest sends.
        """
        # Beside the passes: behind one, it would come to the turnstile when that has already admitted something less urgent.
        return await self._compute.run_beside(self._codec.decode, payload)

    async def forward(self, key: MicrobatchKey, inputs: Tensor) -> memoryview:
        """A visit's forward pass: what to send on.

        Args:
            inputs: hidden states [B, T, W]; token ids [B, T + 1] at stage 0.
        """
        return await self._paced(FORWARD, self._run_forward, key, inputs)

    async def loss(self, key: MicrobatchKey, hidden: Tensor) -> tuple[float, memoryview]:
        """Head and loss of one of our own microbatches: nats per token, and the gradient to send back.

        Raises:
            VisitGoneError: it is not here any more.
        """
        return await self._paced(LOSS, self._run_loss, key, hidden)

    async def backward(self, key: MicrobatchKey, gradient: Tensor) -> memoryview | None:
        """A visit's backward pass: the gradient to send on, None at the origin. It counts on `commit`.

        Raises:
            VisitGoneError: it is not here any more.
        """
        return await self._paced(BACKWARD, self._run_backward, key, gradient)

    async def commit(self, key: MicrobatchKey) -> None:
        """Count a visit's gradients, and forget it.

        Raises:
            VisitGoneError: it is not here any more, and does not count.
        """
        # Beside the passes: others wait for our word, and a pass may take long.
        await self._compute.run_beside(self._worker.commit, key)

    def admit(self, key: MicrobatchKey, inputs: Tensor) -> None:
        """Take over a visit whose forward pass ran elsewhere."""
        self._worker.admit(key, inputs)

    def forget(self, key: MicrobatchKey) -> None:
        """Drop a visit and what it would have added; harmless for one that is not here."""
        self._worker.forget(key)

    def _run_forward(self, key: MicrobatchKey, inputs: Tensor) -> memoryview:
        return self._codec.encode(self._worker.forward(key, inputs))

    def _run_loss(self, key: MicrobatchKey, hidden: Tensor) -> tuple[float, memoryview]:
        loss, gradient = self._worker.loss(key, hidden)
        return loss, self._codec.encode(gradient)

    def _run_backward(self, key: MicrobatchKey, gradient: Tensor) -> memoryview | None:
        onward = self._worker.backward(key, gradient)
        return None if onward is None else self._codec.encode(onward)

    async def _paced(self, kind: int, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Compute, and remember how long it took."""
        result, seconds = await self._compute.timed(function, *args, **kwargs)
        self.pace[kind] = (1.0 - RECENT) * self.pace.get(kind, seconds) + RECENT * seconds
        return result
