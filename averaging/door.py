"""Where proposals from other peers come in, and wait.

Every incoming stream is one `Suitor`: its Propose has been read, and one read for what may follow is always under way, so a
proposer that goes away is noticed at once. While this peer exchanges, suitors are passed on to the exchange under way (the
`Listener`). Between exchanges the door answers by itself: it holds proposals made for our next round (the faster waits for
the slower) and turns down what can not become a pair.

A stranger costs at most one small message and one held stream; there are `MAX_HELD` of these in total, and when they are all
taken, strangers give way to candidates of the last exchange.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import Protocol

from averaging.exchange import Exchange, Terms
from averaging.exchange_messages import Answer, Offer, Propose, RejectReason
from protocol.errors import DeadlineError, LlmNodeError, ProtocolError, StreamClosedError, TransportError
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.transport import Stream
from protocol.violations import Violations
from protocol.wire import read_message, write_message

__all__ = ["MAX_HELD", "Door", "Listener", "Suitor"]

MAX_HELD = 64
"""Proposals held at once, one per peer; only candidates of the last exchange are let in beyond it."""
_HEADER_TIMEOUT_S = 10.0
"""Time for a stranger's first message, and for it to take our answer."""


class Suitor:
    """One proposal made to us, and its stream.

    It ends in exactly one way: `reject`, `finish` (after the exchange that it became), or the proposer goes away.
    """

    def __init__(self, *, stream: Stream, message: Propose, exchange: Exchange) -> None:
        self.peer = stream.peer
        self.stream = stream
        self.round = message.round
        self.expected_round = message.expected_round
        self.exchange = exchange
        self.is_claimed = False
        """Whether an exchange runs on this stream; whoever set it calls `finish`."""
        loop = asyncio.get_running_loop()
        self._ending: asyncio.Future[Answer | None] = loop.create_future()
        self._offer: asyncio.Future[Offer | LlmNodeError] = loop.create_future()

    def reject(self, reason: RejectReason, round: int) -> None:
        """Turn it down; the answer is sent in the background. `round` is the one in which we could (next) pair."""
        if not self._ending.done():
            self._ending.set_result(self.exchange.reject(reason, round))

    def finish(self) -> None:
        """Close the stream. Idempotent."""
        self.exchange.lose()
        if not self._ending.done():
            self._ending.set_result(None)

    @property
    def has_ended(self) -> bool:
        """Whether it was turned down, finished, or went away."""
        return self._ending.done()

    async def offer(self) -> Offer:
        """The proposer's Offer, after we accepted.

        Raises:
            ProtocolError: it sent something else.
            StreamClosedError: it went away.
        """
        outcome = await asyncio.shield(self._offer)
        if isinstance(outcome, LlmNodeError):
            raise outcome
        return outcome

    async def ending(self) -> Answer | None:
        """Wait for the end; the answer to send, if it ended in a rejection."""
        return await self._ending

    def deliver(self, outcome: Offer | LlmNodeError) -> None:
        """What the standing read gave."""
        if not self._offer.done():
            self._offer.set_result(outcome)


class Listener(Protocol):
    """An exchange under way."""

    def arrived(self, suitor: Suitor) -> None:
        """A proposal has come in. Reject it, claim it now or later, or leave it at the door."""

    def departed(self, suitor: Suitor) -> None:
        """A proposal that `arrived` is gone."""


class Door:
    """Serves `/llm-node/exchange/1`.

    Args:
        terms: the run and its limits.
        identity: ours.
        violations: counts broken rules per peer.
    """

    def __init__(self, *, terms: Terms, identity: Identity, violations: Violations) -> None:
        self._terms = terms
        self._identity = identity
        self._violations = violations
        self._suitors: dict[PeerId, Suitor] = {}
        self._listener: Listener | None = None
        self._next_round: int | None = None
        self._known: frozenset[PeerId] = frozenset()
        self._is_closed = False

    # ---- the exchange's side ----

    def attach(self, listener: Listener, *, candidates: Iterable[PeerId]) -> None:
        """Pass on the suitors held so far, and from now on every new one; `candidates` are no strangers."""
        assert self._listener is None, "one exchange at a time"
        self._listener = listener
        self._known = frozenset(candidates)
        for suitor in self._waiting():
            listener.arrived(suitor)

    def detach(self, *, next_round: int) -> None:
        """The exchange has ended; the next will be for `next_round` or later."""
        self._listener = None
        self._next_round = next_round
        for suitor in self._waiting():
            self._consider(suitor)

    def close(self) -> None:
        """Turn everybody away, now and later."""
        self._is_closed = True
        for suitor in self._waiting():
            suitor.reject("busy", self._next_round or 0)

    # ---- the network's side ----

    async def serve(self, stream: Stream) -> None:
        """Handler of one incoming stream; see protocol.transport.Handler."""
        suitor = await self._greet(stream)
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(self._read_offer(suitor))
            try:
                self._admit(suitor)
                answer = await suitor.ending()
            finally:
                self._forget(suitor)
                reading.cancel()
                suitor.deliver(StreamClosedError("no longer served"))  # matters if the transport is shutting down
            if answer is not None:
                with suppress(TransportError, TimeoutError):
                    async with asyncio.timeout(_HEADER_TIMEOUT_S):
                        await write_message(stream, answer)

    async def _greet(self, stream: Stream) -> Suitor:
        try:
            async with asyncio.timeout(_HEADER_TIMEOUT_S):
                message = await read_message(stream, Propose)
        except TimeoutError:
            raise DeadlineError("stream opened without a proposal") from None
        except ProtocolError:
            self._violations.blame(stream.peer)
            raise
        exchange = Exchange(terms=self._terms, identity=self._identity, partner=stream.peer)
        exchange.receive_propose(message)
        suitor = Suitor(stream=stream, message=message, exchange=exchange)
        if message.run != self._terms.run:
            suitor.reject("wrong-run", 0)
        return suitor

    async def _read_offer(self, suitor: Suitor) -> None:
        outcome: Offer | LlmNodeError
        try:
            outcome = await read_message(suitor.stream, Offer)
            if not suitor.is_claimed:
                outcome = ProtocolError("offer before the proposal was accepted", peer=suitor.peer)
        except LlmNodeError as error:
            outcome = error
        suitor.deliver(outcome)
        if suitor.is_claimed:
            return  # the exchange on this stream meets the error, if it is one
        if isinstance(outcome, ProtocolError):
            self._violations.blame(suitor.peer)
        self._forget(suitor)  # now, not when `serve` runs next: nobody may accept it in between
        suitor.finish()

    def _admit(self, suitor: Suitor) -> None:
        if suitor.has_ended:
            return None  # of another run
        older = self._suitors.get(suitor.peer)
        if older is not None and older.is_claimed:
            return suitor.reject("busy", suitor.round)
        if self._is_closed or (older is None and not self._make_room(suitor)):
            return suitor.reject("busy", suitor.round)
        if older is not None:
            self._forget(older)
            older.finish()
        self._suitors[suitor.peer] = suitor
        self._consider(suitor)
        return None

    def _make_room(self, suitor: Suitor) -> bool:
        if len(self._suitors) < MAX_HELD:
            return True
        if suitor.peer not in self._known:
            return False
        strangers = [other for other in self._waiting() if other.peer not in self._known]
        if strangers:
            self._forget(strangers[0])
            strangers[0].reject("busy", strangers[0].round)
        return True

    def _consider(self, suitor: Suitor) -> None:
        if self._listener is not None:
            self._listener.arrived(suitor)
        elif self._next_round is not None:
            lag = suitor.round - self._next_round
            if lag < 0:
                suitor.reject("passed", self._next_round)
            elif lag > self._terms.max_lag_rounds:
                suitor.reject("too-far", self._next_round)
            elif suitor.expected_round != self._next_round:
                suitor.reject("other-round", self._next_round)

    def _waiting(self) -> list[Suitor]:
        return [suitor for suitor in self._suitors.values() if not suitor.has_ended and not suitor.is_claimed]

    def _forget(self, suitor: Suitor) -> None:
        if self._suitors.get(suitor.peer) is suitor:
            del self._suitors[suitor.peer]
            if self._listener is not None:
                self._listener.departed(suitor)
