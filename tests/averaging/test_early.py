"""φ ahead of its exchange: what then travels, and that the exchange's result is the same whatever came ahead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
import torch

from averaging.early import EARLY_PROTOCOL, MAX_WAITING, EarlyReply, EarlyRequest, EarlySlow
from averaging.outer import OuterConfig
from averaging.replica import Replica, ReplicaConfig
from kernels import quantize
from protocol.errors import StreamClosedError
from protocol.memory import LinkSpec, MemoryNetwork
from protocol.transport import Stream
from protocol.virtual_time import run_virtual
from protocol.wire import read_bulk, read_message, write_bulk, write_message
from tests.averaging.replicas import OPEN, noise, train
from tests.averaging.swarm import RUN, Swarm, make_update, open_swarm

ROUND = 5
BYTES_PER_S = 1_000_000.0
NUM_BYTES = (100_000, 900_000)


@asynccontextmanager
async def slow_lines(num_peers: int, *, sends_early: bool = True) -> AsyncIterator[Swarm]:
    """Peers whose φ takes 0.9 s on the line, and their Δ 0.1 s."""
    network = MemoryNetwork(link=LinkSpec(latency_s=0.01, bytes_per_s=BYTES_PER_S))
    async with open_swarm(num_peers, network=network, num_bytes=NUM_BYTES, sends_early=sends_early) as swarm:
        yield swarm


def slow_of(swarm: Swarm, index: int) -> bytes:
    return bytes(make_update(swarm.ids[index], round=ROUND, num_bytes=NUM_BYTES).slow)


def early_of(swarm: Swarm, index: int) -> EarlySlow:
    early = swarm.averagers[index].early
    assert early is not None
    return early


async def look_ahead(swarm: Swarm, *, data: Callable[[int], bytes] | None = None) -> None:
    """Everybody publishes and fetches, as after an outer step."""
    async with asyncio.TaskGroup() as tasks:
        for index in range(len(swarm.averagers)):
            slow = slow_of(swarm, index) if data is None else data(index)
            tasks.create_task(early_of(swarm, index).go_ahead(ROUND, slow, candidates=swarm.ids))


async def exchanged_s(swarm: Swarm) -> float:
    """Seconds of an exchange of all, which is checked byte by byte."""
    results = dict(enumerate(await swarm.exchange_each(round=ROUND)))
    assert swarm.check(results, rounds=dict.fromkeys(results, ROUND))
    return max(result.seconds for result in results.values())


def test_only_the_progress_travels_when_the_slow_weights_came_ahead() -> None:
    async def main() -> tuple[float, float]:
        async with slow_lines(2) as swarm:
            await look_ahead(swarm)
            ahead_s = await exchanged_s(swarm)
        async with slow_lines(2, sends_early=False) as swarm:
            return ahead_s, await exchanged_s(swarm)

    ahead_s, whole_s = run_virtual(main())
    assert whole_s > 1.0
    assert ahead_s < 0.3


def test_who_expected_somebody_else_sends_all() -> None:
    """The expected partner has gone before the round ends, or has not come ahead at all."""

    async def main() -> float:
        async with slow_lines(2) as swarm:
            early_of(swarm, 0).publish(ROUND, slow_of(swarm, 0), candidates=swarm.ids)
            return await exchanged_s(swarm)

    assert run_virtual(main()) > 0.9


def test_one_side_may_hold_what_the_other_does_not() -> None:
    async def main() -> None:
        async with slow_lines(2) as swarm:
            early_of(swarm, 0).publish(ROUND, slow_of(swarm, 0), candidates=swarm.ids)
            await early_of(swarm, 1).fetch(ROUND, num_bytes=NUM_BYTES[1], candidates=swarm.ids)
            assert await exchanged_s(swarm) > 0.9

    run_virtual(main())


def test_what_does_not_fit_the_offer_is_not_used() -> None:
    """φ of another state, say, since a peer took the swarm's state meanwhile; or plain garbage."""

    async def main() -> float:
        async with slow_lines(2) as swarm:
            await look_ahead(swarm, data=lambda index: bytes(NUM_BYTES[1]))
            return await exchanged_s(swarm)

    assert run_virtual(main()) > 0.9


def test_a_request_waits_for_the_outer_step() -> None:
    async def main() -> None:
        async with slow_lines(2) as swarm:
            early_of(swarm, 0).publish(ROUND - 1, b"old", candidates=swarm.ids)
            fetch = early_of(swarm, 1).fetch(ROUND, num_bytes=NUM_BYTES[1], candidates=swarm.ids)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(fetch)
                await asyncio.sleep(20.0)
                early_of(swarm, 0).publish(ROUND, slow_of(swarm, 0), candidates=swarm.ids)
            early_of(swarm, 1).publish(ROUND, slow_of(swarm, 1), candidates=swarm.ids)
            await early_of(swarm, 0).fetch(ROUND, num_bytes=NUM_BYTES[1], candidates=swarm.ids)
            assert await exchanged_s(swarm) < 0.3

    run_virtual(main())


@pytest.mark.parametrize("num_bytes", [1, NUM_BYTES[1] + 1])
def test_a_wrong_length_is_a_violation_and_costs_nothing_else(num_bytes: int) -> None:
    async def main() -> None:
        async with slow_lines(2) as swarm:

            async def lie(stream: Stream) -> None:
                await read_message(stream, EarlyRequest)
                await write_message(stream, EarlyReply(num_bytes=num_bytes))
                await write_bulk(stream, bytes(num_bytes))

            swarm.transports[0].handle(EARLY_PROTOCOL, lie)
            await early_of(swarm, 1).fetch(ROUND, num_bytes=NUM_BYTES[1], candidates=swarm.ids)
            assert swarm.averagers[1].violations[swarm.ids[0]] == 1
            await exchanged_s(swarm)

    run_virtual(main())


def test_it_is_sent_to_few_and_once_to_each() -> None:
    async def main() -> None:
        async with slow_lines(4) as swarm:
            early_of(swarm, 0).publish(ROUND, slow_of(swarm, 0), candidates=swarm.ids)

            async def asked(index: int, **changes: object) -> int:
                request = EarlyRequest.model_validate({"run": RUN, "round": ROUND} | changes)
                async with await swarm.transports[index].open(swarm.ids[0], EARLY_PROTOCOL) as stream:
                    await write_message(stream, request)
                    return (await read_message(stream, EarlyReply)).num_bytes

            assert await asked(1, run="00" * 32) == 0
            assert await asked(1, round=ROUND + 7) == 0
            assert [await asked(1), await asked(1)] == [NUM_BYTES[1], 0]
            assert [await asked(2), await asked(3)] == [NUM_BYTES[1], 0]
            early_of(swarm, 0).publish(ROUND, slow_of(swarm, 0), candidates=swarm.ids[:2])
            assert [await asked(3), await asked(1)] == [0, NUM_BYTES[1]], "a stranger takes nobody's place"

    run_virtual(main())


def test_a_slow_reader_does_not_keep_old_slow_weights() -> None:
    """Or it would have those of many rounds kept in memory."""

    async def main() -> None:
        async with slow_lines(2) as swarm:
            early = early_of(swarm, 0)
            early.publish(ROUND, bytes(10 << 20), candidates=swarm.ids)
            async with await swarm.transports[1].open(swarm.ids[0], EARLY_PROTOCOL) as stream:
                await write_message(stream, EarlyRequest(run=RUN, round=ROUND))
                num_bytes = (await read_message(stream, EarlyReply)).num_bytes
                assert num_bytes == 10 << 20
                await read_bulk(stream, 2 << 20)
                early.publish(ROUND + 1, b"new", candidates=swarm.ids)
                with pytest.raises(StreamClosedError):
                    await read_bulk(stream, num_bytes - (2 << 20))

    run_virtual(main())


def test_one_peer_does_not_take_all_places_of_those_who_wait() -> None:
    async def main() -> None:
        async with slow_lines(3) as swarm:
            early_of(swarm, 0).publish(ROUND - 1, b"old", candidates=swarm.ids)
            async with AsyncExitStack() as stack:
                for _ in range(MAX_WAITING):
                    stream = await stack.enter_async_context(
                        await swarm.transports[1].open(swarm.ids[0], EARLY_PROTOCOL)
                    )
                    await write_message(stream, EarlyRequest(run=RUN, round=ROUND))
                await asyncio.sleep(1.0)
                stream = await stack.enter_async_context(await swarm.transports[2].open(swarm.ids[0], EARLY_PROTOCOL))
                await write_message(stream, EarlyRequest(run=RUN, round=ROUND))
                await asyncio.sleep(1.0)
                early_of(swarm, 0).publish(ROUND, slow_of(swarm, 0), candidates=swarm.ids)
                assert (await read_message(stream, EarlyReply)).num_bytes == NUM_BYTES[1]

    run_virtual(main())


def test_nothing_is_compiled_for_what_goes_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hold up the inner steps for ten seconds."""
    monkeypatch.setattr(quantize, "compiled_version", lambda _: pytest.fail("compiles"))
    config = replace(OPEN, outer=OuterConfig(algorithm="noloco"), slow_codec="q8", compiled=True)
    assert Replica(noise(0, numel=4096), config).slow_ahead(0)


@pytest.mark.parametrize("slow_codec", ["fp32", "bf16", "q8", "q4"])
@pytest.mark.parametrize("fragments", [1, 3])
@pytest.mark.parametrize("compiled", [False, None], ids=["eager", "native"])
def test_what_goes_ahead_is_what_pack_encodes(slow_codec: str, fragments: int, compiled: bool | None) -> None:
    outer = OuterConfig(algorithm="noloco")
    config: ReplicaConfig = replace(OPEN, outer=outer, slow_codec=slow_codec, fragments=fragments, compiled=compiled)
    replica = Replica(noise(0, numel=40_000 if compiled is False else 1 << 20), config)
    for round in range(fragments):
        train(replica, round)
        replica.pack(round=round, tokens=1)
        replica.apply([])
        ahead = replica.slow_ahead(round + 1)
        train(replica, 10 + round)  # the inner steps move θ, not φ
        assert ahead == replica.pack(round=round + 1, tokens=1).slow
        replica.apply([])
    assert torch.isfinite(replica.phi).all()
