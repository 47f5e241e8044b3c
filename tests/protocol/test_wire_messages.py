"""Frames and messages: whole, damaged and hostile ones."""

from __future__ import annotations

import asyncio
import math
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from protocol import wire
from protocol.errors import ProtocolError, StreamClosedError
from protocol.wire import Message, Value, pack
from tests.protocol.byte_stream import B, ByteStream, attempt, fuzz
from tests.protocol.samples import damaged


class Greeting(Message):
    kind: Literal["hello", "bye"]
    number: Annotated[int, Field(ge=0, lt=2**32)]
    share: float = 0.5
    digest: Annotated[bytes, Field(max_length=32)] = b""
    names: Annotated[list[str], Field(max_length=4)] = Field(default=[])


async def test_frames_go_round() -> None:
    stream = ByteStream()
    for payload in (b"", b"x", bytes(70_000)):
        await wire.write_frame(stream, payload)
    reader = ByteStream(stream.written)
    assert [await wire.read_frame(reader, max_bytes=70_000) for _ in range(3)] == [b"", b"x", bytes(70_000)]


async def test_a_frame_is_capped_before_it_is_read() -> None:
    stream = ByteStream(b"\xff\xff\xff\xff" + bytes(100))
    with pytest.raises(ProtocolError, match="allowed") as error:
        await wire.read_frame(stream, max_bytes=100)
    assert error.value.peer == B
    assert stream.largest_read_bytes == 4
    assert len(stream.data) == 100


@fuzz
@given(data=st.binary(max_size=64) | damaged(b"\x00\x00\x00\x20" + bytes(32)))
def test_any_stream_is_a_frame_or_a_known_error(data: bytes) -> None:
    stream = ByteStream(data)
    try:
        payload = asyncio.run(wire.read_frame(stream, max_bytes=48))
    except (ProtocolError, StreamClosedError):
        assert stream.largest_read_bytes <= 48
    else:
        assert data.startswith(len(payload).to_bytes(4) + payload)


GREETING = Greeting(kind="hello", number=7, share=1.5, digest=b"\0\xff", names=["a", "b"])


async def test_messages_go_round() -> None:
    stream = ByteStream()
    await wire.write_message(stream, GREETING)
    await wire.write_message(stream, Greeting(kind="bye", number=0))
    reader = ByteStream(stream.written)
    assert await wire.read_message(reader, Greeting) == GREETING
    assert await wire.read_message(reader, Greeting) == Greeting(kind="bye", number=0)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"kind": "hello"},
        {"kind": "howdy", "number": 1},
        {"kind": "hello", "number": "1"},
        {"kind": "hello", "number": True},
        {"kind": "hello", "number": 1.0},
        {"kind": "hello", "number": 2**32},
        {"kind": "hello", "number": 1, "share": math.nan},
        {"kind": "hello", "number": 1, "share": math.inf},
        {"kind": "hello", "number": 1, "digest": "text"},
        {"kind": "hello", "number": 1, "digest": bytes(33)},
        {"kind": "hello", "number": 1, "names": ["a"] * 5},
        {"kind": "hello", "number": 1, "names": "abc"},
        {"kind": "hello", "number": 1, "\x1b[2J<script>": 1},
    ],
)
async def test_a_message_is_checked_strictly_and_blamed_on_its_sender(value: Value) -> None:
    stream = ByteStream()
    await wire.write_frame(stream, pack(value))
    with pytest.raises(ProtocolError, match="bad Greeting") as error:
        await wire.read_message(ByteStream(stream.written), Greeting)
    assert error.value.peer == B
    assert error.value.reason.isprintable()


async def test_bad_msgpack_in_a_message_is_blamed_on_its_sender() -> None:
    with pytest.raises(ProtocolError, match="never starts") as error:
        await wire.read_message(ByteStream(b"\0\0\0\1\xc1"), Greeting)
    assert error.value.peer == B


@fuzz
@given(data=damaged(wire.encode_message(GREETING)))
def test_any_damage_to_a_message_is_a_message_or_a_protocol_error(data: bytes) -> None:
    message = attempt(lambda: wire.decode_message(data, Greeting, peer=B))
    if isinstance(message, ProtocolError):
        assert message.peer == B
        assert message.reason.isprintable()
    else:
        assert wire.decode_message(wire.encode_message(message), Greeting) == message
