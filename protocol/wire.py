"""Bytes between peers: bounded msgpack values, length-prefixed frames, validated messages and bulk data.

Everything here obeys one rule: a length is capped before it is read, and depth and counts are bounded before anything is decoded.
`protocol.scanner` walks msgpack before it is decoded; the transport puts the same scanner in front of the DHT's own loader.

On a stream, a message is a frame: a 32-bit big-endian length, then one msgpack map, checked strictly against its model. Bulk data
(tensors, shards) is raw bytes whose exact count both sides know beforehand, in chunks, each with its own deadline.
"""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar, cast

import msgpack
from pydantic import BaseModel, ConfigDict, ValidationError

from protocol.errors import DeadlineError, ProtocolError
from protocol.ids import PeerId
from protocol.scanner import scan
from protocol.transport import Stream

__all__ = [
    "CHUNK_BYTES",
    "CHUNK_TIMEOUT_S",
    "MAX_DEPTH",
    "MAX_HEADER_BYTES",
    "MAX_ITEMS",
    "MIN_BYTES_PER_S",
    "Message",
    "Value",
    "bulk_buffer",
    "decode_message",
    "encode_message",
    "pack",
    "read_bulk",
    "read_bulk_into",
    "read_frame",
    "read_message",
    "scan",
    "unpack",
    "write_bulk",
    "write_frame",
    "write_message",
]

MAX_HEADER_BYTES = 1 << 16
"""Largest message or other msgpack value."""
MAX_DEPTH = 4
"""Deepest nesting of containers: a bare number has depth 0, a list of numbers 1."""
MAX_ITEMS = 1024
"""Most entries of one array or map."""
CHUNK_BYTES = 1 << 20
"""Bulk data moves in pieces of this size."""
CHUNK_TIMEOUT_S = 10.0
"""Time that a chunk may take on top of its transfer at `MIN_BYTES_PER_S`."""
MIN_BYTES_PER_S = 16_384.0
"""Slowest transfer that is not taken for a stalled or hostile peer."""

Value = None | bool | int | float | str | bytes | list["Value"] | dict[str, "Value"]
"""What a message is made of."""


class Message(BaseModel):
    """Base of everything that crosses a stream as a message: exact types, no unknown keys, finite numbers, immutable.

    Fields hold what msgpack has (`list`, not `tuple`; `Literal`, not `Enum`), each with a bound.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


M = TypeVar("M", bound=BaseModel)


# ---- values ----------------------------------------------------------------------------------------------------------------


def pack(value: Value) -> bytes:
    """The msgpack bytes of `value`. Bounds are the receiver's to check; our own values are known to be small."""
    return cast(bytes, msgpack.packb(value))


def unpack(
    data: bytes, *, max_bytes: int = MAX_HEADER_BYTES, max_depth: int = MAX_DEPTH, max_items: int = MAX_ITEMS
) -> Value:
    """Decode a peer's bytes: one value without extensions, within the bounds of `scan`.

    Raises:
        ProtocolError: anything else.
    """
    if len(data) > max_bytes:
        raise ProtocolError(f"bad msgpack: longer than {max_bytes} bytes")
    scan(data, max_depth=max_depth, max_items=max_items, allowed_ext=frozenset())
    try:
        return cast(Value, msgpack.unpackb(data, raw=False))
    except ValueError:  # all that the scanner leaves to be wrong
        raise ProtocolError("bad msgpack: a string is not UTF-8") from None


# ---- messages --------------------------------------------------------------------------------------------------------------


def encode_message(message: BaseModel) -> bytes:
    """A message as one msgpack map, field name to value."""
    data = pack(message.model_dump())
    assert len(data) <= MAX_HEADER_BYTES
    return data


def decode_message(data: bytes, message_type: type[M], *, peer: PeerId | None = None) -> M:
    """The message in `data`, which `peer` sent, checked strictly.

    Raises:
        ProtocolError: not bounded msgpack, or not what the model asks for.
    """
    try:
        return message_type.model_validate(unpack(data), strict=True)
    except ProtocolError as error:
        raise ProtocolError(error.reason, peer=peer) from None
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ascii(".".join(str(part) for part in problem["loc"]))[:80]  # may be a key of the peer's choice
        raise ProtocolError(f"bad {message_type.__name__}: field {where}: {problem['type']}", peer=peer) from None


# ---- streams ---------------------------------------------------------------------------------------------------------------


async def write_frame(stream: Stream, payload: bytes) -> None:
    """Write a 32-bit big-endian length and `payload`.

    Raises:
        StreamClosedError: the stream is gone.
    """
    await stream.write(len(payload).to_bytes(4) + payload)


async def read_frame(stream: Stream, *, max_bytes: int) -> bytes:
    """Read what `write_frame` wrote, if it has at most `max_bytes`. Deadlines are the caller's.

    Raises:
        ProtocolError: the frame says that it is longer; nothing of it has been read then.
        StreamClosedError: the stream ended first.
    """
    num_bytes = int.from_bytes(await stream.read_exactly(4))
    if num_bytes > max_bytes:
        raise ProtocolError(f"frame of {num_bytes} bytes where {max_bytes} are allowed", peer=stream.peer)
    return await stream.read_exactly(num_bytes) if num_bytes else b""


async def write_message(stream: Stream, message: BaseModel) -> None:
    """Write `message` as one frame.

    Raises:
        StreamClosedError: the stream is gone.
    """
    await write_frame(stream, encode_message(message))


async def read_message(stream: Stream, message_type: type[M]) -> M:
    """Read one message of a known type. Deadlines are the caller's.

    Raises:
        ProtocolError: too long, or not such a message.
        StreamClosedError: the stream ended first.
    """
    return decode_message(await read_frame(stream, max_bytes=MAX_HEADER_BYTES), message_type, peer=stream.peer)


async def write_bulk(
    stream: Stream,
    data: bytes | bytearray | memoryview,
    *,
    chunk_timeout_s: float = CHUNK_TIMEOUT_S,
    min_bytes_per_s: float = MIN_BYTES_PER_S,
) -> None:
    """Write all of `data` in chunks, each of which the peer must take in time.

    Raises:
        DeadlineError: a chunk took longer than `chunk_timeout_s` plus its transfer at `min_bytes_per_s`.
        StreamClosedError: the stream is gone.
    """
    view = memoryview(data).cast("B")
    for start in range(0, len(view), CHUNK_BYTES):
        chunk = view[start : start + CHUNK_BYTES]
        try:
            async with asyncio.timeout(chunk_timeout_s + len(chunk) / min_bytes_per_s):
                await stream.write(chunk)
        except TimeoutError:
            raise DeadlineError(f"the peer took too long to read, after {start} of {len(view)} bytes") from None


async def read_bulk(
    stream: Stream,
    num_bytes: int,
    *,
    chunk_timeout_s: float = CHUNK_TIMEOUT_S,
    min_bytes_per_s: float = MIN_BYTES_PER_S,
) -> bytearray:
    """Read exactly `num_bytes`, a number that never comes from the peer alone. Memory grows with what has arrived.

    Raises:
        DeadlineError: a chunk took longer than `chunk_timeout_s` plus its transfer at `min_bytes_per_s`.
        StreamClosedError: the stream ended first.
    """
    data = bytearray()
    while len(data) < num_bytes:
        chunk_bytes = min(CHUNK_BYTES, num_bytes - len(data))
        try:
            async with asyncio.timeout(chunk_timeout_s + chunk_bytes / min_bytes_per_s):
                data += await stream.read_exactly(chunk_bytes)
        except TimeoutError:
            raise DeadlineError(f"the peer sent too slowly, {len(data)} of {num_bytes} bytes arrived") from None
    return data


async def read_bulk_into(
    stream: Stream,
    out: memoryview,
    *,
    take_chunk: Callable[[memoryview], object] | None = None,
    chunk_timeout_s: float = CHUNK_TIMEOUT_S,
    min_bytes_per_s: float = MIN_BYTES_PER_S,
) -> None:
    """Like `read_bulk`, into memory that is there already: without copies, for what is large and of a known length.

    Args:
        stream: where from.
        out: flat, of single bytes; partly filled after an error.
        take_chunk: called with each chunk once it is there and still in the processor's cache; to be done within a
            millisecond or so, since the loop waits.
        chunk_timeout_s, min_bytes_per_s: how slow the peer may be.

    Raises:
        DeadlineError: a chunk took longer than `chunk_timeout_s` plus its transfer at `min_bytes_per_s`.
        StreamClosedError: the stream ended first.
    """
    for start in range(0, out.nbytes, CHUNK_BYTES):
        chunk = out[start : start + CHUNK_BYTES]
        try:
            async with asyncio.timeout(chunk_timeout_s + chunk.nbytes / min_bytes_per_s):
                await stream.read_into(chunk)
        except TimeoutError:
            raise DeadlineError(f"the peer sent too slowly, {start} of {out.nbytes} bytes arrived") from None
        if take_chunk is not None:
            take_chunk(chunk)


def bulk_buffer(num_bytes: int) -> memoryview:
    """A writable buffer of zeros that takes up memory only as it is written to, so that a peer which sends nothing costs nothing.

    In huge pages where the machine has them: 400 MB in pages of 4 KiB are a hundred thousand page faults.
    """
    if num_bytes < mmap.PAGESIZE:
        return memoryview(bytearray(num_bytes))
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(pages)
