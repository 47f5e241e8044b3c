"""A scripted peer that plays an exchange by the rules up to a chosen point, and then dies, stalls or lies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal

from averaging.exchange import Exchange, Terms
from averaging.exchange_messages import Ack, Answer, Offer, Propose
from averaging.search import PROTOCOL
from averaging.swap import describe
from protocol.errors import StreamClosedError
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.memory import MemoryTransport
from protocol.transport import Stream
from protocol.wire import read_bulk, read_message, write_bulk, write_message
from tests.averaging.swarm import DELTA_BYTES, RUN, SLOW_BYTES, Swarm, make_update

__all__ = ["TERMS", "Actor", "Deed"]

PAYLOAD_BYTES = DELTA_BYTES + SLOW_BYTES
TERMS = Terms(run=RUN, payload_bytes=lambda round: PAYLOAD_BYTES, max_lag_rounds=1)
Deed = Literal["crash", "stall"]


class Actor:
    """A scripted peer that plays by the rules up to a stage, and then does its deed.

    Args:
        swarm: where; the actor is its first silent peer.
        stage: after which message of its own it turns.
        deed: crash (streams reset) or stall (alive, says nothing more).
        forge: changes an outgoing message or payload.
    """

    def __init__(
        self,
        swarm: Swarm,
        *,
        stage: str = "",
        deed: Deed = "stall",
        forge: Callable[[object], object] = lambda message: message,
    ) -> None:
        index = len(swarm.averagers)
        self.swarm = swarm
        self.transport: MemoryTransport = swarm.transports[index]
        self.identity: Identity = swarm.identities[index]
        self.stage, self.deed, self.forge = stage, deed, forge
        self.update = make_update(self.identity.peer_id)

    async def propose(self, to: PeerId) -> None:
        """Play the proposer; ends with its deed or with the exchange."""
        exchange = Exchange(terms=TERMS, identity=self.identity, partner=to)
        async with await self.transport.open(to, PROTOCOL) as stream:
            await self.reached("before")
            await self.say(stream, exchange.propose(await describe(self.update), self.update.round))
            if exchange.receive_answer(await read_message(stream, Answer)):
                await self.swap(stream, exchange)

    async def serve(self, stream: Stream) -> None:
        """Play the candidate."""
        exchange = Exchange(terms=TERMS, identity=self.identity, partner=stream.peer)
        exchange.receive_propose(await read_message(stream, Propose))
        await self.reached("before")
        await self.say(stream, exchange.accept(await describe(self.update)))
        await self.swap(stream, exchange)

    async def swap(self, stream: Stream, exchange: Exchange) -> None:
        await self.reached("paired")
        await self.say(stream, exchange.offer())
        await self.reached("offered")
        exchange.receive_offer(await read_message(stream, Offer))
        payload = self.forge(bytes(self.update.delta) + bytes(self.update.slow))
        assert isinstance(payload, bytes)
        await write_bulk(stream, payload[: PAYLOAD_BYTES // 2])
        await self.reached("half")
        await write_bulk(stream, payload[PAYLOAD_BYTES // 2 :])
        await self.reached("sent")
        delta, slow = await read_bulk(stream, DELTA_BYTES), await read_bulk(stream, SLOW_BYTES)
        theirs = make_update(exchange.partner, round=self.update.round)
        assert delta == theirs.delta
        assert slow == theirs.slow
        progress = await describe(theirs)
        exchange.receive_payload(
            num_bytes=PAYLOAD_BYTES, delta_digest=progress.delta_digest, base_digest=progress.base_digest
        )
        await self.say(stream, exchange.ack())
        await self.reached("acked")
        exchange.receive_ack(await read_message(stream, Ack))

    async def say(self, stream: Stream, message: object) -> None:
        forged = self.forge(message)
        if isinstance(forged, bytes):
            await stream.write(forged)
        else:
            await write_message(stream, forged)  # type: ignore[arg-type]

    async def reached(self, stage: str) -> None:
        if stage != self.stage:
            return
        await asyncio.sleep(0.05)  # what was written is delivered
        if self.deed == "crash":
            self.swarm.network.crash(self.identity.peer_id)
            raise StreamClosedError("crashed")
        await asyncio.Event().wait()
