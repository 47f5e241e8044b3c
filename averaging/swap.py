"""The second half of an exchange, over a stream: offers, payloads both ways at once, receipts.

All rules are in `averaging.exchange`; this only moves bytes. The partner's payload is read into a fresh side buffer of the exact
known length, in chunks with a deadline each, and is handed out only after the exchange is committed.

What it costs is processor time: encryption in p2pd takes most, every copy and hash on top is felt. So bytes go from the
caller's buffers to the socket and from the socket into the side buffer, and each chunk is hashed right after it has come in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from averaging.early import EarlySlow
from averaging.exchange import Exchange, Progress
from averaging.exchange_messages import Ack, Holding, Offer, payload_hash
from averaging.side_buffer import SideBuffer
from averaging.update import RemoteUpdate, Update
from protocol.errors import ProtocolError, TransportError
from protocol.transport import Stream
from protocol.wire import read_bulk_into, read_message, write_bulk, write_message

__all__ = ["describe", "swap_offers", "swap_payloads"]

_HASH_INLINE_BYTES = 1 << 20
"""Up to here hashing on the loop (under a millisecond) is cheaper than handing it to a thread."""


async def describe(update: Update) -> Progress:
    """Our update as every Offer of this round will describe it."""
    return Progress(
        round=update.round,
        tokens=update.tokens,
        delta_digest=await _digest(update.delta),
        base_digest=await _digest(update.slow),
    )


async def swap_offers(stream: Stream, exchange: Exchange, read_offer: Callable[[], Awaitable[Offer]]) -> None:
    """Send our Offer and check the partner's, which `read_offer` takes from the same stream.

    Raises:
        ProtocolError: the partner's Offer breaks a rule.
        TransportError: the stream broke.
    """
    await write_message(stream, exchange.offer())
    exchange.receive_offer(await read_offer())


async def swap_payloads(
    stream: Stream,
    exchange: Exchange,
    update: Update,
    *,
    buffer: SideBuffer | None = None,
    early: EarlySlow | None = None,
) -> RemoteUpdate:
    """Send our payload while receiving the partner's, then swap receipts.

    Args:
        stream: to the partner.
        exchange: both Offers are in.
        update: what we send.
        buffer: where the partner's payload goes; absent, into memory of its own.
        early: in runs that send φ ahead: what came that way does not travel again.

    Returns:
        The partner's update; the exchange is committed.

    Raises:
        ProtocolError: the payload or the receipt is not what was signed.
        StreamClosedError: the partner went away.
        DeadlineError: the partner stalled in the middle of the payload.
    """
    held, partner_holds = (None, False) if early is None else await _compare_held(stream, exchange, early)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_send(stream, update, with_slow=not partner_holds))
            side = (buffer or SideBuffer()).take(update.delta.nbytes if held is not None else update.num_bytes)
            receiving = tasks.create_task(_receive(stream, exchange, update, side, held))
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


async def _compare_held(stream: Stream, exchange: Exchange, early: EarlySlow) -> tuple[memoryview | None, bool]:
    """The partner's φ, if it came ahead, and whether the partner has ours."""
    held = early.held(exchange.partner, exchange.partner_base_digest)
    await write_message(stream, Holding(slow=held is not None))
    return held, (await read_message(stream, Holding)).slow


async def _send(stream: Stream, update: Update, *, with_slow: bool) -> None:
    await write_bulk(stream, update.delta)
    if with_slow:
        await write_bulk(stream, update.slow)


async def _receive(
    stream: Stream, exchange: Exchange, update: Update, side: memoryview, held: memoryview | None
) -> tuple[memoryview, memoryview]:
    """Δ and φ; `held` is the φ that came ahead, and was hashed then."""
    delta, slow = side[: update.delta.nbytes], side[update.delta.nbytes :]
    delta_hash, slow_hash = payload_hash(), payload_hash()
    await read_bulk_into(stream, delta, take_chunk=delta_hash.update)
    await read_bulk_into(stream, slow, take_chunk=slow_hash.update)
    base_digest = slow_hash.digest() if held is None else exchange.partner_base_digest
    slow = slow if held is None else held
    exchange.receive_payload(
        num_bytes=delta.nbytes + slow.nbytes, delta_digest=delta_hash.digest(), base_digest=base_digest
    )
    return delta, slow


async def _digest(data: memoryview) -> bytes:
    if data.nbytes <= _HASH_INLINE_BYTES:
        return payload_hash(data).digest()
    return await asyncio.to_thread(lambda: payload_hash(data).digest())


def _most_telling(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Of the errors of both directions, the one to report: a bug before a violation before a network failure."""
    ranked = sorted(
        group.exceptions, key=lambda error: (isinstance(error, TransportError), isinstance(error, ProtocolError))
    )
    return ranked[0]
