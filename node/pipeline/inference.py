"""Forward passes through the whole pipeline without training: the held-out loss of a model that nobody holds.

After each round one origin, drawn by lot, sends a few held-out microbatches through all stages in order, always the same ones.
Unlike training, everything goes by way of the asker, stage by stage: nobody has to keep anything, and a replica that fails is
replaced by the next one. `/llm-node/stage-forward/1`: Request, activations ─► Reply, activations.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from model.data import Tokens
from node.compute import Compute
from node.pipeline.activations import ActivationCodec
from node.pipeline.messages import Reply
from node.pipeline.routing import StageMap
from node.pipeline.worker import StageWorker
from protocol.errors import LlmNodeError, TransportError
from protocol.ids import PeerId, RunId
from protocol.transport import Stream, Transport
from protocol.wire import Message, read_bulk, read_message, write_bulk, write_message

__all__ = ["FORWARD_PROTOCOL", "Inference", "heldout_microbatches"]

FORWARD_PROTOCOL = "/llm-node/stage-forward/1"
NUM_MICROBATCHES = 4
MAX_TIMEOUTS = 2.5
"""Measuring takes no longer than so many replicas that do not answer."""


class Request(Message):
    """Asks for one forward pass."""

    run: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def heldout_microbatches(tokens: Tokens, *, sequences: int, sequence_tokens: int) -> list[Tensor]:
    """A few microbatches int64 [B, T + 1] that lie far apart in the held-out set; the same for everybody."""
    windows = (tokens.size - 1) // sequence_tokens
    if windows < 1:
        return []
    wanted = NUM_MICROBATCHES * sequences
    starts = [window * windows // wanted * sequence_tokens for window in range(wanted)]
    rows = torch.stack([torch.as_tensor(tokens[s : s + sequence_tokens + 1].astype("int64")) for s in starts])
    return list(rows.view(NUM_MICROBATCHES, sequences, -1).unbind())


class Inference:
    """One stage peer's part: serves its stage, and measures the whole at stage 0.

    Args:
        stages: who holds what.
        timeout_s: for one stage's pass.
    """

    def __init__(
        self,
        run: RunId,
        *,
        transport: Transport,
        compute: Compute,
        worker: StageWorker,
        codec: ActivationCodec,
        stages: StageMap,
        timeout_s: float,
    ) -> None:
        self._run, self._transport, self._compute = run, transport, compute
        self._worker, self._codec, self._stages, self._timeout_s = worker, codec, stages, timeout_s
        self._one_at_a_time = asyncio.Lock()
        transport.handle(FORWARD_PROTOCOL, self.serve)

    def close(self) -> None:
        """Answer nobody any more."""
        self._transport.unhandle(FORWARD_PROTOCOL)

    async def serve(self, stream: Stream) -> None:
        """One pass, for a peer of stage 0."""
        try:
            async with asyncio.timeout(self._timeout_s):
                request = await read_message(stream, Request)
                if request.run != self._run or self._stages.stage_of(stream.peer) != 0:
                    await write_message(stream, Reply(ok=False, reason="not-for-me"))
                    return
                async with self._one_at_a_time:
                    await write_message(stream, Reply(ok=True))
                    hidden = await read_bulk(stream, self._codec.num_bytes)
                    passed = await self._compute.run(self._pass, hidden)
                await write_bulk(stream, passed)
        except TimeoutError:
            raise TransportError("a forward pass was not done in time") from None

    def _pass(self, hidden: memoryview | bytes | bytearray) -> memoryview:
        return self._codec.encode(self._worker.infer(self._codec.decode(hidden)))

    def is_our_turn(self, round: int) -> bool:
        """Whether the lot makes us measure after this round."""

        def lot(peer: PeerId) -> bytes:
            return hashlib.sha256(f"llm-node:measure\0{self._run}\0{round}\0{peer}".encode()).digest()

        return min(self._stages.holders(0), key=lot, default=None) == self._transport.peer_id

    async def loss(self, microbatches: Sequence[Tensor]) -> float | None:
        """Mean loss in nats per token through all stages; None while a stage can not be reached."""
        losses: list[float] = []
        failed: set[PeerId] = set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MAX_TIMEOUTS * self._timeout_s):  # the round's end waits for it
                for tokens in microbatches:
                    hidden: Tensor | None = await self._compute.run(self._worker.infer, tokens)
                    for stage in range(1, self._stages.num_stages):
                        hidden = None if hidden is None else await self._through(stage, hidden, failed)
                    if hidden is None:
                        return None
                    losses.append(await self._compute.run(self._worker.loss_of, hidden, tokens))
        if len(losses) < len(microbatches):
            return None
        mean = sum(losses) / len(losses) if losses else math.nan
        return mean if math.isfinite(mean) else None

    async def _through(self, stage: int, hidden: Tensor, failed: set[PeerId]) -> Tensor | None:
        """Through the first replica of a stage that does it; who does not is not asked again."""
        payload = await self._compute.run(self._codec.encode, hidden)
        for peer in self._stages.holders(stage):
            if peer in failed:
                continue
            try:
                async with asyncio.timeout(self._timeout_s):
                    async with await self._transport.open(peer, FORWARD_PROTOCOL) as stream:
                        await write_message(stream, Request(run=self._run))
                        if not (await read_message(stream, Reply)).ok:
                            failed.add(peer)
                            continue
                        await write_bulk(stream, payload)
                        passed = await read_bulk(stream, self._codec.num_bytes)
                return await self._compute.run(self._codec.decode, passed)
            except (LlmNodeError, TimeoutError):
                failed.add(peer)
        return None
