"""φ ahead of its exchange: sent under the inner steps, to the partner that is expected.

Where φ and Δ travel apart, φ for round r + 1 is final as soon as round r's outer step is done. Whom a peer will meet if nobody is
missing is known as well (`foreseen_partner`), and the other one sees it the same way. So each asks the other for its φ at once
and keeps it. When they meet, each says whether it holds bytes with the digest that the other's signed Offer names; then only Δ
travels (averaging/swap.py). Whatever does not fit, another partner, another φ, a wrong byte or no answer, shows in the digest,
and all is sent as without this. So nothing here needs to be believed.

    asks      EarlyRequest(run, round)
    answers   EarlyReply(num_bytes), then so many bytes: 0 if it does not come to have them in time, or has sent them enough times
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from averaging.exchange import Terms
from averaging.exchange_messages import Count, Hash, payload_hash
from averaging.priority import foreseen_partner
from averaging.side_buffer import SideBuffer
from protocol.errors import DeadlineError, LlmNodeError, ProtocolError
from protocol.ids import PeerId
from protocol.transport import Stream, Transport
from protocol.violations import Violations
from protocol.wire import CHUNK_BYTES, Message, read_bulk_into, read_message, write_bulk, write_message

__all__ = ["EARLY_PROTOCOL", "EarlyReply", "EarlyRequest", "EarlySlow"]

EARLY_PROTOCOL = "/llm-node/early/1"
MAX_SERVED = 2
"""Times that one round's φ is sent, to different peers: as a rule one asks."""
MAX_WAITING = 8
"""Peers whose request waits for our outer step."""
WAIT_S = 60.0
"""Most time that one waits."""
_HEADER_TIMEOUT_S = 10.0


class EarlyRequest(Message):
    """Asks for the φ that a peer will offer in a round."""

    run: Hash
    round: Count


class EarlyReply(Message):
    """How many bytes follow."""

    num_bytes: Count


class EarlySlow:
    """One peer's own φ for the round under way, and that of the partner it expects.

    Args:
        terms: of the exchanges.
        transport: to ask others.
        violations: counts broken rules per peer.
    """

    def __init__(self, *, terms: Terms, transport: Transport, violations: Violations) -> None:
        self._terms, self._transport, self._violations = terms, transport, violations
        self._round, self._data = -1, b""
        self._served: set[PeerId] = set()
        self._known: frozenset[PeerId] = frozenset()
        self._is_ready = asyncio.Event()
        self._waiting: set[PeerId] = set()
        self._buffer = SideBuffer()
        self._held: tuple[PeerId, bytes, memoryview] | None = None

    def publish(self, round: int, data: bytes, *, candidates: Iterable[PeerId]) -> None:
        """From now on `data` is our encoded φ of that round, for these and nobody else."""
        self._round, self._data, self._served, self._known = round, data, set(), frozenset(candidates)
        self._is_ready.set()
        self._is_ready = asyncio.Event()

    def held(self, peer: PeerId, digest: bytes) -> memoryview | None:
        """The bytes with that digest, if that peer sent them ahead."""
        if self._held is None or self._held[:2] != (peer, digest):
            return None
        return self._held[2]

    async def go_ahead(self, round: int, data: bytes, *, candidates: Iterable[PeerId]) -> None:
        """Publish our encoded φ of that round and fetch the partner's; to be cancelled when the exchange begins."""
        candidates = list(candidates)
        self.publish(round, data, candidates=candidates)
        await self.fetch(round, num_bytes=len(data), candidates=candidates)

    async def fetch(self, round: int, *, num_bytes: int, candidates: Iterable[PeerId]) -> None:
        """Ask the candidate that we expect to meet in a round for its φ. Whatever goes wrong, there is none then.

        Args:
            num_bytes: of an encoded φ of that round.
        """
        self._held = None
        peer = foreseen_partner(self._terms.run.encode(), round, self._transport.peer_id, candidates)
        if peer is None:
            return
        try:
            data, digest = await self._ask(peer, round, num_bytes)
        except ProtocolError:
            self._violations.blame(peer)
        except LlmNodeError:
            pass
        else:
            self._held = (peer, digest, data) if data.nbytes else None

    async def serve(self, stream: Stream) -> None:
        """Handler of one incoming stream; see protocol.transport.Handler."""
        try:
            async with asyncio.timeout(_HEADER_TIMEOUT_S):
                request = await read_message(stream, EarlyRequest)
        except TimeoutError:
            raise DeadlineError("stream opened without a request") from None
        except ProtocolError:
            self._violations.blame(stream.peer)
            raise
        data = await self._data_for(stream.peer, request)
        await write_message(stream, EarlyReply(num_bytes=len(data)))
        for start in range(0, len(data), CHUNK_BYTES):
            if request.round != self._round:  # or slow readers would keep the φ of many rounds in memory
                raise DeadlineError("slow weights were read too slowly: there are newer ones")
            await write_bulk(stream, memoryview(data)[start : start + CHUNK_BYTES])

    async def _data_for(self, peer: PeerId, request: EarlyRequest) -> bytes:
        if request.run != self._terms.run or peer not in self._known:
            return b""
        if request.round == self._round + 1 and peer not in self._waiting and len(self._waiting) < MAX_WAITING:
            self._waiting.add(peer)
            try:
                async with asyncio.timeout(WAIT_S):
                    await self._is_ready.wait()
            except TimeoutError:
                pass
            finally:
                self._waiting.discard(peer)
        if request.round != self._round or peer in self._served or len(self._served) >= MAX_SERVED:
            return b""
        self._served.add(peer)
        return self._data

    async def _ask(self, peer: PeerId, round: int, num_bytes: int) -> tuple[memoryview, bytes]:
        async with await self._transport.open(peer, EARLY_PROTOCOL) as stream:
            await write_message(stream, EarlyRequest(run=self._terms.run, round=round))
            try:
                async with asyncio.timeout(WAIT_S + _HEADER_TIMEOUT_S):
                    reply = await read_message(stream, EarlyReply)
            except TimeoutError:
                raise DeadlineError("no answer to a request for slow weights") from None
            if reply.num_bytes not in (0, num_bytes):
                raise ProtocolError("slow weights of a wrong length", peer=peer)
            data, hashed = self._buffer.take(reply.num_bytes), payload_hash()
            await read_bulk_into(stream, data, take_chunk=hashed.update)
            return data, hashed.digest()
