"""Serves the status document to other programs over libp2p: one frame on a stream, then the end.

The stream is `/llm-node/status/1`: four bytes of big-endian length, then UTF-8 JSON of at most 1 MiB. It asks nothing of the
caller, so that any libp2p implementation can read it in a dozen lines (node/light_client.py does, with py-libp2p).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from bootstrap.document import STATUS_PROTOCOL, encode_document
from protocol.errors import DeadlineError
from protocol.transport import Stream, Transport
from protocol.wire import write_frame

__all__ = ["STATUS_PROTOCOL", "serve_status"]

_WRITE_TIMEOUT_S = 30.0


def serve_status(transport: Transport, get_document: Callable[[], dict[str, Any]]) -> None:
    """Register the stream on `transport`.

    Args:
        transport: ours, started or not.
        get_document: returns the current document (see `bootstrap.summary.swarm_status`); called once per stream.
    """

    async def handle(stream: Stream) -> None:
        payload = encode_document(get_document())
        try:
            async with asyncio.timeout(_WRITE_TIMEOUT_S):
                await write_frame(stream, payload)
        except TimeoutError:
            raise DeadlineError(f"the reader of our status took more than {_WRITE_TIMEOUT_S:.0f} s") from None

    transport.handle(STATUS_PROTOCOL, handle)
