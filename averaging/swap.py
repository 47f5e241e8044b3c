"""The second half of an exchange, over a stream: offers, payloads both ways at once, receipts.

All rules are in `averaging.exchange`; this only moves bytes. The partner's payload is read into a fresh side buffer of the exact
known length, in chunks with a deadline each, and is handed out only after the exchange is committed.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable

from averaging.exchange import Exchange, Progress
from averaging.exchange_messages import Ack, Offer
from averaging.update import RemoteUpdate, Update
from protocol.errors import ProtocolError, TransportError
from protocol.transport import Stream
from protocol.wire import read_bulk, read_message, write_bulk, write_message

__all__ = ["describe", "swap_offers", "swap_payloads"]

_HASH_INLINE_BYTES = 1 << 20
"""Up to here hashing on the loop (under a millisecond or two) is cheaper than handing it to a thread."""


async def describe(update: Update) -> Progress:
    """Our update as every Offer of this round will describe it."""
    return Progress(
        round=update.round,
        tokens=update.tokens,
        delta_digest=await _sha256(update.delta),
        base_digest=await _sha256(update.slow),
    )


async def swap_offers(stream: Stream, exchange: Exchange, read_offer: Callable[[], Awaitable[Offer]]) -> None:
    """Send our Offer and check the partner's, which `read_offer` takes from the same stream.

    Raises:
        ProtocolError: the partner's Offer breaks a rule.
        TransportError: the stream broke.
    """
    await write_message(stream, exchange.offer())
    exchange.receive_offer(await read_offer())


async def swap_payloads(stream: Stream, exchange: Exchange, update: Update) -> RemoteUpdate:
    """Send our payload while receiving the partner's, then swap receipts.

    Returns:
        The partner's update; the exchange is committed.

    Raises:
        ProtocolError: the payload or the receipt is not what was signed.
        StreamClosedError: the partner went away.
        DeadlineError: the partner stalled in the middle of the payload.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_send(stream, update))
            receiving = tasks.create_task(_receive(stream, exchange, update))
    except BaseExceptionGroup as group:
        raise _most_telling(group) from None
    delta, slow = receiving.result()
    await write_message(stream, exchange.ack())
    exchange.receive_ack(await read_message(stream, Ack))
    assert exchange.committed
    return RemoteUpdate(
        peer=exchange.partner,
        round=exchange.partner_round,
        tokens=exchange.partner_tokens,
        delta=delta,
        slow=slow,
    )


async def _send(stream: Stream, update: Update) -> None:
    await write_bulk(stream, update.delta)
    await write_bulk(stream, update.slow)


async def _receive(stream: Stream, exchange: Exchange, update: Update) -> tuple[memoryview, memoryview]:
    delta = memoryview(await read_bulk(stream, update.delta.nbytes))
    slow = memoryview(await read_bulk(stream, update.slow.nbytes))
    exchange.receive_payload(
        num_bytes=delta.nbytes + slow.nbytes, delta_digest=await _sha256(delta), base_digest=await _sha256(slow)
    )
    return delta, slow


async def _sha256(data: memoryview) -> bytes:
    if data.nbytes <= _HASH_INLINE_BYTES:
        return hashlib.sha256(data).digest()
    return await asyncio.to_thread(lambda: hashlib.sha256(data).digest())


def _most_telling(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Of the errors of both directions, the one to report: a bug before a violation before a network failure."""
    ranked = sorted(
        group.exceptions, key=lambda error: (isinstance(error, TransportError), isinstance(error, ProtocolError))
    )
    return ranked[0]
