"""One honest peer against a partner that dies, stalls or lies at every stage of the exchange, on either side of it."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from averaging.averager import ExchangeResult
from averaging.door import MAX_HELD, Suitor
from averaging.exchange import Exchange
from averaging.exchange_messages import Ack, Answer, Offer, Propose
from averaging.search import OFFER_TIMEOUT_S, PROTOCOL
from averaging.swap import describe
from protocol.errors import StreamClosedError, TransportError
from protocol.identity import Identity
from protocol.ids import PeerId, RunId
from protocol.memory import LinkSpec, MemoryNetwork, MemoryTransport
from protocol.transport import Stream
from protocol.virtual_time import run_virtual
from protocol.wire import read_message, write_message
from tests.averaging.actor import TERMS, Actor, Deed
from tests.averaging.swarm import RUN, Swarm, identities, make_update, open_swarm

STAGES = ["before", "paired", "offered", "half", "sent", "acked"]


async def against(
    swarm: Swarm, actor: Actor, role: str, *, round: int = 5, deadline_s: float = 60.0
) -> tuple[ExchangeResult, float]:
    """The result of the honest peer 0, and when it came."""
    if role == "candidate":
        actor.transport.handle(PROTOCOL, actor.serve)
        return await swarm.exchange(0, round=round, deadline_s=deadline_s), asyncio.get_running_loop().time()

    async def play() -> None:
        with suppress(TransportError):
            await actor.propose(swarm.ids[0])

    async with asyncio.TaskGroup() as group:
        playing = group.create_task(play())
        await asyncio.sleep(0.5)
        result = await swarm.exchange(0, round=round, deadline_s=deadline_s)
        ended_s = asyncio.get_running_loop().time()
        playing.cancel()
    return result, ended_s


def network() -> MemoryNetwork:
    return MemoryNetwork(link=LinkSpec(latency_s=0.01))


@pytest.mark.parametrize("role", ["proposer", "candidate"])
class TestPartnerFails:
    @pytest.mark.parametrize("stage", STAGES)
    def test_dies(self, role: str, stage: str) -> None:
        async def main() -> None:
            async with open_swarm(2, network=network(), num_silent=1) as swarm:
                result, ended_s = await against(swarm, Actor(swarm, stage=stage, deed="crash"), role)
                match stage:
                    case "before" | "paired":
                        expected = "alone"
                    case "acked":
                        expected = "averaged"
                    case _:
                        expected = "lost"
                assert result.outcome == expected
                assert ended_s < 2.0, "a reset is noticed at once"
                assert (result.remote is not None) == (expected == "averaged")
                assert not swarm.averagers[0].violations

        run_virtual(main())

    @pytest.mark.parametrize("stage", STAGES)
    def test_stalls(self, role: str, stage: str) -> None:
        async def main() -> None:
            async with open_swarm(2, network=network(), num_silent=1) as swarm:
                result, _ = await against(swarm, Actor(swarm, stage=stage), role, deadline_s=40.0)
                if stage == "acked":
                    assert result.outcome == "averaged"
                elif stage == "paired" or (stage, role) == ("before", "proposer"):
                    assert result.outcome == "alone"
                    assert result.seconds < 2 * OFFER_TIMEOUT_S + 1.0  # it is given a second chance
                else:
                    assert result.outcome == "timeout"
                    assert result.seconds <= 40.01
                assert not swarm.averagers[0].violations

        run_virtual(main())

    @pytest.mark.parametrize("deed", ["crash", "stall"])
    @pytest.mark.parametrize("stage", ["before", "paired"])
    def test_before_the_offers_another_candidate_takes_its_place(self, role: str, stage: str, deed: Deed) -> None:
        async def main() -> None:
            async with open_swarm(3, network=network(), num_silent=1) as swarm:
                async with asyncio.TaskGroup() as group:
                    other = group.create_task(swarm.exchange(1, at_s=0.5))
                    result, _ = await against(swarm, Actor(swarm, stage=stage, deed=deed), role)
                assert swarm.check({0: result, 1: other.result()}) == {frozenset({0, 1})}
                assert result.seconds < 40.0

        run_virtual(main())

    @pytest.mark.parametrize(
        "lie",
        [
            "answer",
            "offer round",
            "offer signature",
            "offer replay",
            "offer bytes",
            "payload",
            "ack hash",
            "ack signature",
            "huge frame",
            "nested",
        ],
    )
    def test_lies(self, role: str, lie: str) -> None:
        kept: list[Offer] = []

        def forge(message: object) -> object:
            match lie, message:
                case "answer", Answer() | Propose():
                    return message.model_copy(update={"round": 2**40, "expected_round": 2**40})
                case "offer round", Offer():
                    return message.model_copy(update={"round": message.round + 1})
                case "offer signature", Offer():
                    return message.model_copy(update={"signature": bytes(64)})
                case "offer replay", Offer():
                    kept.append(message)
                    return kept[0]
                case "offer bytes", Offer():
                    return message.model_copy(update={"num_bytes": 2**62})
                case "payload", bytes():
                    return message[:-1] + bytes([message[-1] ^ 1])
                case "ack hash", Ack():
                    return message.model_copy(update={"offer_hash": bytes(32)})
                case "ack signature", Ack():
                    return message.model_copy(update={"signature": bytes(64)})
                case "huge frame", Offer():
                    return b"\xff\xff\xff\xff" + bytes(100)
                case "nested", Offer():
                    return (3000).to_bytes(4) + b"\x91" * 3000
                case _:
                    return message

        async def main() -> None:
            async with open_swarm(2, network=network(), num_silent=1) as swarm:
                actor, round = Actor(swarm, forge=forge), 5
                if lie == "offer replay":
                    first, _ = await against(swarm, actor, role)
                    assert first.outcome == "averaged"
                    actor.update, round = make_update(actor.identity.peer_id, round=6), 6
                result, ended_s = await against(swarm, actor, role, round=round)
                assert result.outcome in ("alone", "lost")
                assert result.remote is None
                assert ended_s < 5.0
                if (role, lie) != ("proposer", "answer"):  # there it is only too far off, which is no crime
                    assert swarm.averagers[0].violations[actor.identity.peer_id] >= 1
                assert set(swarm.averagers[0].violations) <= {actor.identity.peer_id}

        run_virtual(main())


class TestStrangers:
    def test_unknown_peers_and_other_runs_are_turned_down_with_a_reason(self) -> None:
        async def main() -> None:
            async with open_swarm(3, network=network(), num_silent=2) as swarm:
                other_run = await ask(swarm, 1, run=RunId("00" * 32))
                assert other_run.reason == "wrong-run"
                async with asyncio.TaskGroup() as group:
                    honest = group.create_task(
                        swarm.averagers[0].exchange(make_update(swarm.ids[0]), candidates=swarm.ids[:2], deadline_s=5.0)
                    )
                    swarm.transports[1].handle(PROTOCOL, hold)
                    await asyncio.sleep(0.5)
                    assert (await ask(swarm, 2)).reason == "unknown"
                assert honest.result().outcome == "timeout"
                assert (await ask(swarm, 1)).reason == "passed"
                assert (await ask(swarm, 1, round=9)).reason == "too-far"
                assert (await ask(swarm, 1, round=7)).reason == "other-round"
                assert not swarm.averagers[0].violations

        run_virtual(main())

    def test_after_leaving_everybody_is_turned_away(self) -> None:
        async def main() -> None:
            async with open_swarm(2, network=network(), num_silent=1) as swarm:
                async with asyncio.TaskGroup() as group:
                    held = group.create_task(ask(swarm, 1))
                    await asyncio.sleep(1.0)
                    await swarm.averagers[0].__aexit__(None, None, None)
                assert held.result().reason == "busy"
                assert (await ask(swarm, 1)).reason == "busy"

        run_virtual(main())

    def test_noise_instead_of_a_proposal_is_a_violation(self) -> None:
        async def main() -> None:
            async with open_swarm(2, network=network(), num_silent=1) as swarm:
                noises = [b"\xff" * 64, (5).to_bytes(4) + b"\x81\xa1k\xc3\x00", (1).to_bytes(4) + b"\xc1"]
                for noise in noises:
                    async with await swarm.transports[1].open(swarm.ids[0], PROTOCOL) as stream:
                        await stream.write(noise)
                        with pytest.raises(StreamClosedError):
                            await stream.read_exactly(1)
                assert swarm.averagers[0].violations == {swarm.ids[1]: len(noises)}
                assert (await swarm.exchange(0, deadline_s=5.0)).outcome == "alone"

        run_virtual(main())

    def test_silence_instead_of_a_proposal_is_cut_off(self) -> None:
        async def main() -> None:
            async with open_swarm(2, network=network(), num_silent=1) as swarm:
                async with await swarm.transports[1].open(swarm.ids[0], PROTOCOL) as stream:
                    with pytest.raises(StreamClosedError):
                        await stream.read_exactly(1)
                assert asyncio.get_running_loop().time() == pytest.approx(10.0, abs=0.5)

        run_virtual(main())

    def test_an_offer_before_the_answer_is_a_violation(self) -> None:
        async def main() -> None:
            async with open_swarm(2, network=network(), num_silent=1) as swarm:
                exchange = Exchange(terms=TERMS, identity=swarm.identities[1], partner=swarm.ids[0])
                progress = await describe(make_update(swarm.ids[1]))
                async with await swarm.transports[1].open(swarm.ids[0], PROTOCOL) as stream:
                    await write_message(stream, exchange.propose(progress, 5))
                    exchange.receive_answer(Answer(accepted=True, reason=None, round=5, nonce=bytes(16)))
                    await write_message(stream, exchange.offer())
                    with pytest.raises(StreamClosedError):
                        await stream.read_exactly(1)
                assert swarm.averagers[0].violations == {swarm.ids[1]: 1}

        run_virtual(main())

    def test_a_proposal_that_is_gone_is_never_on_offer(self) -> None:
        """A suitor used to stay with the exchange for one turn of the loop after it had ended, and could be accepted."""

        class Watcher:
            def __init__(self) -> None:
                self.present: set[Suitor] = set()

            def arrived(self, suitor: Suitor) -> None:
                self.present.add(suitor)

            def departed(self, suitor: Suitor) -> None:
                self.present.remove(suitor)

        async def main() -> None:
            async with open_swarm(2, network=MemoryNetwork(), num_silent=1) as swarm:
                watcher = Watcher()
                swarm.averagers[0]._door.attach(watcher, candidates=swarm.ids)
                async with await swarm.transports[1].open(swarm.ids[0], PROTOCOL) as stream:
                    await write_message(stream, Propose(run=RUN, round=5, expected_round=5, nonce=bytes(16)))
                    await asyncio.sleep(1.0)
                    assert len(watcher.present) == 1
                for _ in range(20):
                    assert not any(suitor.has_ended for suitor in watcher.present)
                    await asyncio.sleep(0)
                assert not watcher.present

        run_virtual(main())

    def test_of_two_proposals_of_one_peer_the_newer_counts(self) -> None:
        async def main() -> None:
            async with open_swarm(2, network=network(), num_silent=1) as swarm:
                actor = Actor(swarm)
                async with asyncio.TaskGroup() as group:
                    older = group.create_task(ask_until_closed(swarm, 1))
                    await asyncio.sleep(0.5)
                    result, _ = await against(swarm, actor, "proposer")
                assert older.result() == "closed"
                assert result.outcome == "averaged"

        run_virtual(main())

    def test_held_proposals_are_bounded_and_strangers_give_way_to_known_peers(self) -> None:
        async def main() -> None:
            async with open_swarm(2, network=MemoryNetwork()) as swarm:
                await swarm.averagers[1].__aexit__(None, None, None)
                assert (await swarm.exchange(0, round=4, deadline_s=5.0)).outcome == "alone"  # now it knows peer 1
                answers: list[Answer] = []

                async def call(identity: Identity) -> None:
                    async with MemoryTransport(swarm.network, identity.peer_id) as transport:
                        answers.append(await ask_from(transport, swarm.ids[0]))

                async with asyncio.TaskGroup() as group:
                    callers = identities(MAX_HELD + 5)[2:]
                    calls = [group.create_task(call(identity)) for identity in callers]
                    await asyncio.sleep(1.0)
                    assert [answer.reason for answer in answers] == ["busy"] * 3
                    known = group.create_task(ask(swarm, 1))
                    await asyncio.sleep(1.0)
                    assert [answer.reason for answer in answers] == ["busy"] * 4
                    assert not known.done()
                    for task in [*calls, known]:
                        task.cancel()

        run_virtual(main())


async def hold(stream: Stream) -> None:
    await asyncio.Event().wait()


async def ask_from(transport: MemoryTransport, to: PeerId, *, run: RunId = RUN, round: int = 5) -> Answer:
    async with await transport.open(to, PROTOCOL) as stream:
        await write_message(stream, Propose(run=run, round=round, expected_round=round, nonce=bytes(16)))
        return await read_message(stream, Answer)


async def ask(swarm: Swarm, index: int, *, run: RunId = RUN, round: int = 5) -> Answer:
    """The answer of peer 0 to a proposal of a silent peer."""
    return await ask_from(swarm.transports[index], swarm.ids[0], run=run, round=round)


async def ask_until_closed(swarm: Swarm, index: int) -> str:
    try:
        return str((await ask(swarm, index)).reason)
    except StreamClosedError:
        return "closed"


async def read_to_the_end(stream: Stream) -> None:
    async with asyncio.timeout(5.0):
        while True:
            await stream.read_exactly(1)


@pytest.mark.parametrize("by", ["a timer", "a task"])
def test_an_acceptance_that_comes_in_with_the_cancellation(by: str) -> None:
    """At the same moment, in either order: the exchange is cancelled and nothing else, and no stream stays open."""

    async def main() -> None:
        async with open_swarm(2, network=network(), num_silent=1) as swarm:
            loop = asyncio.get_running_loop()
            actor = Actor(swarm)
            proposed: asyncio.Future[tuple[Stream, Exchange]] = loop.create_future()

            async def hold(stream: Stream) -> None:
                exchange = Exchange(terms=TERMS, identity=actor.identity, partner=stream.peer)
                exchange.receive_propose(await read_message(stream, Propose))
                proposed.set_result((stream, exchange))
                await asyncio.Event().wait()

            actor.transport.handle(PROTOCOL, hold)
            exchanging = asyncio.create_task(swarm.exchange(0))
            stream, exchange = await proposed
            await write_message(stream, exchange.accept(await describe(actor.update)))
            if by == "a timer":  # before whoever waits for the answer has run
                loop.call_later(0.01, exchanging.cancel)
            else:  # after it has run, and before the exchange has
                await asyncio.sleep(0.01)
                exchanging.cancel()
            with pytest.raises(asyncio.CancelledError):
                await exchanging
            with pytest.raises(StreamClosedError):
                await read_to_the_end(stream)

    run_virtual(main())
