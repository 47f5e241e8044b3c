"""What only the in-process network can do: latency, bandwidth, loss, crashes and partitions, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from protocol.errors import DeadlineError, PeerUnreachableError, StreamClosedError, UserError
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.memory import KEEPALIVE_S, LinkSpec, MemoryNetwork, MemoryTransport, run_virtual
from protocol.memory_stream import Hollow
from protocol.transport import Stream

A, B, C = (Identity.generate(bytes([number]) * 32).peer_id for number in range(3))
ECHO = "/llm-node/echo/1"


async def echo(stream: Stream) -> None:
    while True:
        await stream.write(await stream.read_exactly(1))


def now_s() -> float:
    return asyncio.get_running_loop().time()


def with_peers(
    network: MemoryNetwork, scenario: Callable[..., Awaitable[None]], *, peers: tuple[PeerId, ...] = (A, B)
) -> None:
    """Run `scenario(*transports)` in virtual time; every peer serves ECHO."""

    async def main() -> None:
        transports = [MemoryTransport(network, peer) for peer in peers]
        for transport in transports:
            transport.handle(ECHO, echo)
            await transport.__aenter__()
        try:
            await scenario(*transports)
        finally:
            for transport in transports:
                await transport.__aexit__(None, None, None)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run_virtual(main())


def test_latency_and_bandwidth_take_their_time() -> None:
    async def scenario(a: MemoryTransport, b: MemoryTransport) -> None:
        async def swallow(stream: Stream) -> None:
            await stream.read_exactly(2_000_000)
            await stream.write(b"k")

        b.handle("/llm-node/sink/1", swallow)
        stream = await a.open(B, "/llm-node/sink/1")
        assert now_s() == pytest.approx(0.1)  # one round trip
        async with stream:
            await stream.write(bytes(2_000_000))
            await stream.read_exactly(1)
        assert now_s() == pytest.approx(0.1 + 2.0 + 2 * 0.05, abs=1e-3)

    with_peers(MemoryNetwork(link=LinkSpec(latency_s=0.05, bytes_per_s=1e6)), scenario)


def test_streams_share_the_bandwidth_of_their_link() -> None:
    async def scenario(a: MemoryTransport, b: MemoryTransport) -> None:
        async def swallow(stream: Stream) -> None:
            await stream.read_exactly(1_000_000)
            await stream.write(b"k")

        b.handle("/llm-node/sink/1", swallow)

        async def send() -> None:
            async with await a.open(B, "/llm-node/sink/1") as stream:
                await stream.write(bytes(1_000_000))
                await stream.read_exactly(1)

        async with asyncio.TaskGroup() as group:
            group.create_task(send())
            group.create_task(send())
        assert now_s() == pytest.approx(2.0, abs=1e-3)

    with_peers(MemoryNetwork(link=LinkSpec(bytes_per_s=1e6)), scenario)


def test_hollow_bytes_take_their_time_and_are_not_copied() -> None:
    async def scenario(a: MemoryTransport, b: MemoryTransport) -> None:
        found: list[bytes] = []

        async def swallow(stream: Stream) -> None:
            out = bytearray(b"." * 8)
            await stream.read_into(memoryview(out)[:3])
            await stream.read_into(memoryview(out)[3:])
            found.append(bytes(out))
            found.append(await stream.read_exactly(1_999_998))
            await stream.write(b"k")

        b.handle("/llm-node/sink/1", swallow)
        async with await a.open(B, "/llm-node/sink/1") as stream:
            await stream.write(b"true")
            await stream.write(memoryview(Hollow(2_000_000))[:1_999_999])
            await stream.write(b"end")
            await stream.read_exactly(1)
        assert found[0] == b"true....", "nothing is written where hollow bytes go"
        assert found[1] == bytes(1_999_995) + b"end"
        assert now_s() == pytest.approx(0.1 + 2.0 + 2 * 0.05, abs=1e-3)
        assert b.traffic.received_bytes == 2_000_006

    with_peers(MemoryNetwork(link=LinkSpec(latency_s=0.05, bytes_per_s=1e6)), scenario)


def test_one_slow_link_does_not_slow_the_others() -> None:
    network = MemoryNetwork()
    network.set_link(A, B, LinkSpec(latency_s=10.0))

    async def scenario(a: MemoryTransport, b: MemoryTransport, c: MemoryTransport) -> None:
        async with await a.open(C, ECHO) as stream:
            await stream.write(b"x")
            await stream.read_exactly(1)
        assert now_s() == 0.0
        with pytest.raises(DeadlineError):
            await a.open(B, ECHO, timeout_s=5.0)
        assert now_s() == pytest.approx(5.0)

    with_peers(network, scenario, peers=(A, B, C))


def losses(seed: int) -> list[int]:
    """Numbers of round trips that each of 20 streams survives on a lossy link."""
    survived: list[int] = []

    async def scenario(a: MemoryTransport, b: MemoryTransport) -> None:
        for _ in range(20):
            async with await a.open(B, ECHO) as stream:
                count = 0
                try:
                    while count < 1000:
                        await stream.write(b"x")
                        await stream.read_exactly(1)
                        count += 1
                except StreamClosedError:
                    survived.append(count)

    with_peers(MemoryNetwork(seed=seed, link=LinkSpec(loss=0.05)), scenario)
    return survived


def test_loss_resets_streams_and_repeats_with_its_seed() -> None:
    survived = losses(seed=1)
    assert len(survived) == 20
    assert 3 < sum(survived) / 20 < 30  # 1 / (2 × 0.05) = 10 expected
    assert losses(seed=1) == survived
    assert losses(seed=2) != survived


def test_a_crash_resets_streams_and_stops_handlers() -> None:
    network = MemoryNetwork()

    async def scenario(a: MemoryTransport, b: MemoryTransport) -> None:
        stream = await a.open(B, ECHO)
        waiting = asyncio.ensure_future(stream.read_exactly(1))
        await asyncio.sleep(1)
        network.crash(B)
        with pytest.raises(StreamClosedError):
            await waiting
        with pytest.raises(StreamClosedError):
            await stream.write(b"x")
        with pytest.raises(PeerUnreachableError):
            await a.open(B, ECHO)
        with pytest.raises(PeerUnreachableError):
            await b.open(A, ECHO)
        async with MemoryTransport(network, B) as reborn:
            reborn.handle(ECHO, echo)
            async with await a.open(B, ECHO) as again:
                await again.write(b"x")
                assert await again.read_exactly(1) == b"x"

    with_peers(network, scenario)


def test_a_crash_wakes_a_writer_that_waits() -> None:
    network = MemoryNetwork()

    async def scenario(a: MemoryTransport, b: MemoryTransport) -> None:
        async def ignore(stream: Stream) -> None:
            await asyncio.Event().wait()

        b.handle("/llm-node/ignore/1", ignore)
        stream = await a.open(B, "/llm-node/ignore/1")
        writing = asyncio.ensure_future(stream.write(bytes(64 << 20)))
        await asyncio.sleep(1)
        assert not writing.done()
        network.crash(B)
        with pytest.raises(StreamClosedError):
            await writing

    with_peers(network, scenario)


def test_a_short_partition_only_delays() -> None:
    network = MemoryNetwork()

    async def scenario(a: MemoryTransport, b: MemoryTransport) -> None:
        async with await a.open(B, ECHO) as stream:
            network.partition([A], [B])
            await stream.write(b"x")
            waiting = asyncio.ensure_future(stream.read_exactly(1))
            await asyncio.sleep(KEEPALIVE_S - 1)
            assert not waiting.done()
            network.heal()
            assert await waiting == b"x"
            assert now_s() == pytest.approx(KEEPALIVE_S - 1)
            await asyncio.sleep(KEEPALIVE_S)  # the healed partition's alarm must not ring
            await stream.write(b"y")
            assert await stream.read_exactly(1) == b"y"

    with_peers(network, scenario)


def test_a_long_partition_breaks_streams_and_hangs_dials() -> None:
    network = MemoryNetwork()

    async def scenario(a: MemoryTransport, b: MemoryTransport, c: MemoryTransport) -> None:
        across, within = await a.open(B, ECHO), await a.open(C, ECHO)
        network.partition([B])
        with pytest.raises(StreamClosedError):
            await across.read_exactly(1)
        assert now_s() == pytest.approx(KEEPALIVE_S)
        await within.write(b"x")
        assert await within.read_exactly(1) == b"x"
        with pytest.raises(DeadlineError):
            await a.open(B, ECHO, timeout_s=7)
        assert now_s() == pytest.approx(KEEPALIVE_S + 7)
        asyncio.get_running_loop().call_later(3, network.heal)
        async with await a.open(B, ECHO, timeout_s=7):
            assert now_s() == pytest.approx(KEEPALIVE_S + 10)

    with_peers(network, scenario, peers=(A, B, C))


def test_the_halves_of_a_partition_see_their_own_tables() -> None:
    network = MemoryNetwork()

    async def scenario(a: MemoryTransport, b: MemoryTransport) -> None:
        await a.dht.store("k", "a", b"1", ttl_s=60)
        network.partition([A], [B])
        await a.dht.store("k", "a", b"2", ttl_s=60)
        await b.dht.store("k", "b", b"3", ttl_s=60)
        assert {entry.value for entry in await a.dht.get("k")} == {b"2"}
        assert {entry.value for entry in await b.dht.get("k")} == {b"1", b"3"}
        network.heal()
        assert {entry.value for entry in await b.dht.get("k")} == {b"2", b"3"}

    with_peers(network, scenario)


def test_records_expire_in_virtual_time_and_survive_their_publisher() -> None:
    network = MemoryNetwork()

    async def scenario(a: MemoryTransport, b: MemoryTransport) -> None:
        await a.dht.store("k", "a", b"1", ttl_s=45)
        network.crash(A)
        await asyncio.sleep(44)
        assert len(await b.dht.get("k")) == 1
        await asyncio.sleep(2)
        assert await b.dht.get("k") == []

    with_peers(network, scenario)


def test_an_identity_runs_once() -> None:
    network = MemoryNetwork()

    async def scenario(a: MemoryTransport, b: MemoryTransport) -> None:
        with pytest.raises(UserError, match="already running"):
            await MemoryTransport(network, A).__aenter__()

    with_peers(network, scenario)
