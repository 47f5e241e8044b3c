"""What every transport promises of peers, handlers, limits and the DHT."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from protocol.errors import (
    DeadlineError,
    PeerUnreachableError,
    ProtocolError,
    StreamClosedError,
    TransportError,
    UserError,
)
from protocol.identity import Identity
from protocol.incoming import MAX_STREAMS_PER_PEER
from protocol.transport import Stream
from tests.protocol.eventually import eventually
from tests.protocol.worlds import ECHO, World, ask, echo, serve


async def test_unknown_protocols_and_peers_are_unreachable(world: World) -> None:
    a, b = await world.pair()
    with pytest.raises(PeerUnreachableError):
        await a.open(b.peer_id, "/llm-node/nothing/1")
    with pytest.raises((PeerUnreachableError, DeadlineError)):
        await a.open(Identity.generate(b"\x62" * 32).peer_id, ECHO, timeout_s=3.0)
    with pytest.raises(PeerUnreachableError):
        await a.open(a.peer_id, ECHO)


async def test_a_handler_can_be_added_and_replaced_while_running(world: World) -> None:
    a, b = await world.pair()

    async def say(stream: Stream) -> None:
        await stream.write(b"2")

    await serve(b, ECHO, echo)
    await serve(b, ECHO, say)
    async with await a.open(b.peer_id, ECHO) as stream:
        assert await stream.read_exactly(1) == b"2"


async def test_a_handler_can_be_taken_away_while_running(world: World) -> None:
    a, b = await world.pair()
    await serve(b, ECHO, echo)
    async with await a.open(b.peer_id, ECHO) as stream:
        assert await ask(stream, b"hi") == b"hi"
        b.unhandle(ECHO)
        b.unhandle(ECHO)
        assert await ask(stream, b"on") == b"on", "who is served already is served on"
    with pytest.raises(TransportError):
        async with await a.open(b.peer_id, ECHO) as stream:
            await stream.read_exactly(1)
    await serve(b, ECHO, echo)
    async with await a.open(b.peer_id, ECHO) as stream:
        assert await ask(stream, b"again") == b"again"


async def test_connect_by_address(world: World) -> None:
    a = await world.peer()
    b = await world.peer(alone=True)
    await serve(a, ECHO, echo)
    (address,) = await a.addresses()
    assert address.endswith(f"/p2p/{a.peer_id}")
    assert await b.connect(address) == a.peer_id
    async with await b.open(a.peer_id, ECHO) as stream:
        assert await ask(stream, b"hi") == b"hi"


@pytest.mark.parametrize("address", ["", "nonsense", "/ip4/1.2.3.4/tcp/80", "/ip4/1.2.3/tcp/80/p2p/x", "\0" * 5000])
async def test_malformed_addresses_are_the_users_fault(world: World, address: str) -> None:
    a = await world.peer()
    with pytest.raises(UserError) as caught:
        await a.connect(address)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


async def test_somebody_else_at_an_address_is_unreachable(world: World) -> None:
    a, b = await world.peer(), await world.peer(alone=True)
    (address,) = await a.addresses()
    stranger = Identity.generate(b"\x63" * 32).peer_id
    with pytest.raises(PeerUnreachableError):
        await b.connect(address.replace(a.peer_id, stranger))
    with pytest.raises(PeerUnreachableError):
        await b.connect((await b.addresses())[0])


async def test_learned_addresses_open_streams(world: World) -> None:
    a = await world.peer()
    b = await world.peer(alone=True)
    await serve(a, ECHO, echo)
    await b.learn(a.peer_id, ["rubbish", "/ip4/999.1.1.1/tcp/1/p2p/x", *(await a.addresses())])
    async with await b.open(a.peer_id, ECHO) as stream:
        assert await ask(stream, b"hi") == b"hi"


async def test_a_failing_handler_takes_nothing_down(world: World) -> None:
    a, b = await world.pair()
    errors: list[Exception] = [ProtocolError("bad frame"), ZeroDivisionError("a bug"), StreamClosedError("gone")]

    async def fail(stream: Stream) -> None:
        raise errors.pop(0)

    await serve(b, "/llm-node/fail/1", fail)
    await serve(b, ECHO, echo)
    while errors:
        async with await a.open(b.peer_id, "/llm-node/fail/1") as stream:
            with pytest.raises(StreamClosedError):
                await stream.read_exactly(1)
    async with await a.open(b.peer_id, ECHO) as stream:
        assert await ask(stream, b"still here") == b"still here"
    incoming = b.incoming  # type: ignore[attr-defined]
    assert incoming.violations[a.peer_id] == 1
    assert incoming.num_bugs == 1


async def test_one_peer_can_hold_only_so_many_streams(world: World) -> None:
    a, b = await world.pair()
    await serve(b, ECHO, echo)
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(await a.open(b.peer_id, ECHO)) for _ in range(MAX_STREAMS_PER_PEER)]
        for stream in streams:
            assert await ask(stream, b"x") == b"x"
        extra = await stack.enter_async_context(await a.open(b.peer_id, ECHO))
        with pytest.raises(StreamClosedError):
            await extra.read_exactly(1)
        assert await ask(streams[0], b"x") == b"x"
    async with asyncio.timeout(10):
        while True:  # the places are free again as soon as the other side notices
            async with await a.open(b.peer_id, ECHO) as stream:
                try:
                    assert await ask(stream, b"x") == b"x"
                    break
                except* StreamClosedError:
                    pass


async def test_traffic_is_counted_on_both_sides(world: World) -> None:
    a, b = await world.pair()
    await serve(b, ECHO, echo)
    async with await a.open(b.peer_id, ECHO) as stream:
        await ask(stream, bytes(1000))
    assert (a.traffic.sent_bytes, a.traffic.received_bytes) == (1004, 1000)
    assert (b.traffic.sent_bytes, b.traffic.received_bytes) == (1000, 1004)


async def test_leaving_ends_streams_and_handlers(world: World) -> None:
    a, b = await world.pair()
    cancelled = asyncio.Event()

    async def wait_for_ever(stream: Stream) -> None:
        try:
            await stream.write(b"!")
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    await serve(b, ECHO, wait_for_ever)
    async with await a.open(b.peer_id, ECHO) as stream:
        await stream.read_exactly(1)
        await b.__aexit__(None, None, None)
        assert cancelled.is_set()
        async with asyncio.timeout(10):
            with pytest.raises(StreamClosedError):
                await stream.read_exactly(1)

    async def is_gone() -> bool:
        try:
            async with await a.open(b.peer_id, ECHO, timeout_s=3.0):
                return False  # the other side's daemon has not noticed yet
        except (PeerUnreachableError, DeadlineError):
            return True

    await eventually(is_gone, timeout_s=10.0)


async def test_a_cancelled_open_leaves_nothing(world: World) -> None:
    a, b = await world.pair()
    await serve(b, ECHO, echo)
    opening = asyncio.ensure_future(a.open(b.peer_id, ECHO))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    async with await a.open(b.peer_id, ECHO) as stream:
        assert await ask(stream, b"x") == b"x"


async def test_dht_records_are_seen_by_all_and_replaced(world: World) -> None:
    peers = [await world.peer() for _ in range(3)]
    assert await peers[0].dht.get("run/peers/0/0") == []
    assert await peers[1].dht.store("run/peers/0/0", "one", b"first", ttl_s=60)
    assert await peers[2].dht.store("run/peers/0/0", "two", b"other", ttl_s=60)
    for peer in peers:
        assert {entry.subkey: entry.value for entry in await peer.dht.get("run/peers/0/0")} == {
            "one": b"first",
            "two": b"other",
        }
    for value, ttl_s in ((b"second", 60.0), (b"third", 5.0)):  # even one that asks for less time replaces
        assert await peers[1].dht.store("run/peers/0/0", "one", value, ttl_s=ttl_s)
        for peer in peers:
            assert {entry.value for entry in await peer.dht.get("run/peers/0/0")} == {value, b"other"}


async def test_dht_records_expire(world: World) -> None:
    a, b = await world.pair()
    assert await a.dht.store("key", "brief", b"x", ttl_s=0.5)
    assert await a.dht.store("key", "long", b"y", ttl_s=60)

    async def only_the_long_one_is_left() -> bool:
        return {entry.subkey for entry in await b.dht.get("key")} == {"long"}

    await eventually(only_the_long_one_is_left, timeout_s=10)


async def test_dht_refuses_what_the_validator_refuses(world: World) -> None:
    seen: list[tuple[str, str, bytes]] = []

    def validate(key: str, subkey: str, value: bytes, expires_at_s: float, now_s: float) -> bool:
        seen.append((key, subkey, value))
        return key.startswith("run/") and value.startswith(subkey.encode())

    a, b = await world.peer(validator=validate), await world.peer(validator=validate)
    assert await a.dht.store("run/x", "me", b"me: hello", ttl_s=60)
    assert ("run/x", "me", b"me: hello") in seen
    assert not await a.dht.store("run/x", "you", b"me: forged", ttl_s=60)
    assert not await a.dht.store("other/x", "me", b"me: foreign key", ttl_s=60)
    assert not await a.dht.store("run/x", "big", b"big" + bytes(5000), ttl_s=60)
    assert [entry.value for entry in await b.dht.get("run/x")] == [b"me: hello"]
    assert await b.dht.get("other/x") == []
