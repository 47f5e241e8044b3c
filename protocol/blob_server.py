"""Serving blobs on the stream `/llm-node/blob/1`: a peer asks for a leaf list or a leaf, any number of times per stream.

Requests are answered in order and may be sent ahead, which hides the round trip. What is served is hashed before it leaves, so a
flipped bit on our disk makes us a donor that lacks the blob, never a liar. Streams are few and each holds one leaf in memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Annotated, Literal

from pydantic import Field

from protocol.blobs import BlobStore
from protocol.errors import DeadlineError, ProtocolError, StreamClosedError, UserError
from protocol.ids import BlobId, PeerId
from protocol.merkle import MAX_BLOB_BYTES, LeafList, num_leaves
from protocol.transport import Stream, Transport
from protocol.wire import CHUNK_TIMEOUT_S, Message, read_message, write_bulk, write_message

__all__ = ["BLOB_PROTOCOL", "BlobReply", "BlobRequest", "serve_blobs"]

logger = logging.getLogger(__name__)

BLOB_PROTOCOL = "/llm-node/blob/1"
MAX_STREAMS = 32
MAX_STREAMS_PER_PEER = 4
IDLE_TIMEOUT_S = 60.0


class BlobRequest(Message):
    """Asks for one thing of one blob."""

    blob: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    leaf: Annotated[int, Field(ge=0, lt=num_leaves(MAX_BLOB_BYTES))] | None
    """Index of the wanted leaf; None asks for the size and the leaf list."""


class BlobReply(Message):
    """Answers one request. The bytes of the leaf, or of the leaf list, follow an `ok`."""

    status: Literal["ok", "missing", "busy"]
    """missing: not here (any more); busy: too many streams, come back later; the stream ends after it."""
    size_bytes: Annotated[int, Field(ge=0, le=MAX_BLOB_BYTES)] | None = None
    """Size of the blob, in the answer to a request for the leaf list only."""


def serve_blobs(transport: Transport, store: BlobStore) -> None:
    """Let every peer read every finished blob of `store`."""
    transport.handle(BLOB_PROTOCOL, _BlobServer(store).serve)


class _BlobServer:
    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._streams: Counter[PeerId] = Counter()

    async def serve(self, stream: Stream) -> None:
        if self._streams.total() >= MAX_STREAMS or self._streams[stream.peer] >= MAX_STREAMS_PER_PEER:
            await _send(stream, BlobReply(status="busy"))
            return
        self._streams[stream.peer] += 1
        try:
            await self._answer_all(stream)
        finally:
            self._streams[stream.peer] -= 1
            self._streams += Counter()  # forgets peers without streams

    async def _answer_all(self, stream: Stream) -> None:
        leaves: LeafList | None = None
        blob: BlobId | None = None
        while True:
            try:
                async with asyncio.timeout(IDLE_TIMEOUT_S):
                    request = await read_message(stream, BlobRequest)
            except (StreamClosedError, TimeoutError):
                return
            try:
                if leaves is None or request.blob != blob:
                    blob = BlobId(request.blob)
                    leaves = await asyncio.to_thread(self._store.leaves, blob)
                await self._answer(stream, blob, leaves, request.leaf)
            except UserError as error:
                logger.debug("cannot serve a blob: %s", error)
                leaves = None
                await _send(stream, BlobReply(status="missing"))

    async def _answer(self, stream: Stream, blob: BlobId, leaves: LeafList, leaf: int | None) -> None:
        if leaf is None:
            await _send(stream, BlobReply(status="ok", size_bytes=leaves.size_bytes), leaves.hashes)
            return
        if leaf >= leaves.num_leaves:
            raise ProtocolError(f"asked for leaf {leaf} of a blob of {leaves.num_leaves}", peer=stream.peer)
        data = await asyncio.to_thread(self._store.read_leaf, blob, leaves, leaf)
        await _send(stream, BlobReply(status="ok"), data)


async def _send(stream: Stream, reply: BlobReply, data: bytes = b"") -> None:
    try:
        async with asyncio.timeout(CHUNK_TIMEOUT_S):
            await write_message(stream, reply)
    except TimeoutError:
        raise DeadlineError("the peer does not read its answers") from None
    await write_bulk(stream, data)
