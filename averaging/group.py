"""One round's exchange with everybody (DiLoCo's group): the same two-phase swap, once per pair of peers.

Of two peers the one with the smaller id proposes, so every pair has one stream. Proposals are all out at once, in an order that
differs from peer to peer; the acceptor lets in `_MAX_SWAPS` of them at a time, and one more for each that takes very long. A swap
under way needs nothing else, so nothing waits in a circle. A group round is for one round number only: a proposer that is ahead
waits, one that is behind is turned down.
"""

from __future__ import annotations

import asyncio
from bisect import bisect
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from averaging.door import Suitor
from averaging.exchange import Exchange, Progress
from averaging.exchange_messages import Answer, Offer
from averaging.search import PROTOCOL, Ending, PeerContext
from averaging.swap import swap_offers, swap_payloads
from averaging.update import Update
from protocol.errors import DeadlineError, LlmNodeError
from protocol.ids import PeerId
from protocol.wire import read_message, write_message

__all__ = ["GroupSwap", "round_robin"]

_MAX_SWAPS = 2
"""Payloads received at once from peers with smaller ids: enough to keep the link busy while one of them stalls."""

_SPARE_PROPOSALS = 4
"""A peer that is behind turns us down once per round; beyond so many times it is leading us by the nose."""


def round_robin(me: PeerId, candidates: Iterable[PeerId]) -> list[PeerId]:
    """The candidates in ring order, starting after `me`: no two peers begin with the same partner."""
    ordered = sorted(set(candidates) - {me})
    start = bisect(ordered, me)
    return ordered[start:] + ordered[:start]


class GroupSwap:
    """Swaps with every candidate. Serves once, as the door's listener while it runs.

    Args:
        context: this peer.
        update: what we send.
        progress: its description.
        candidates: the group, ourselves not counted.
        patience_s: how long a swap may keep others waiting.
    """

    def __init__(
        self,
        context: PeerContext,
        *,
        update: Update,
        progress: Progress,
        candidates: Iterable[PeerId],
        patience_s: float,
    ) -> None:
        self._context = context
        self._update = update
        self._progress = progress
        self._patience_s = patience_s
        self._me = context.transport.peer_id
        self.order = round_robin(self._me, candidates)
        loop = asyncio.get_running_loop()
        self._calls: dict[PeerId, asyncio.Future[Suitor]] = {
            peer: loop.create_future() for peer in self.order if peer < self._me
        }
        self._entry = asyncio.Semaphore(_MAX_SWAPS)

    async def swap(self, peer: PeerId) -> Ending:
        """Swap with one candidate; to be run for all of `order` at once.

        Returns:
            averaged; alone if it turned us down; lost if it went away, broke a rule or could not be reached; timeout if
            it stalled (the deadline of the whole is the caller's).
        """
        try:
            return await (self._propose(peer) if self._me < peer else self._accept(peer))
        except DeadlineError:
            return Ending(outcome="timeout", partner=peer)
        except LlmNodeError as error:
            self._context.blame(error, peer)
            return Ending(outcome="lost", partner=peer)

    def close(self) -> None:
        """Release every suitor that still waits."""
        for call in self._calls.values():
            if call.done() and not call.result().is_claimed:
                call.result().reject("busy", self._update.round + 1)

    # ---- the door's listener ----

    def arrived(self, suitor: Suitor) -> None:
        call = self._calls.get(suitor.peer)
        if call is None:
            suitor.reject("unknown", self._update.round)
        elif suitor.round < self._update.round:
            suitor.reject("passed", self._update.round)
        elif suitor.round == self._update.round:
            if call.done():
                suitor.reject("busy", self._update.round + 1)
            else:
                call.set_result(suitor)

    def departed(self, suitor: Suitor) -> None:
        if not suitor.is_claimed:
            self._await_another(suitor)

    def _await_another(self, suitor: Suitor) -> None:
        """Wait for that peer's next proposal, if this one is still what we have from it."""
        call = self._calls.get(suitor.peer)
        if call is not None and call.done() and call.result() is suitor:
            self._calls[suitor.peer] = asyncio.get_running_loop().create_future()

    @asynccontextmanager
    async def _let_in(self) -> AsyncIterator[None]:
        """Wait for a place, and have it until the swap is over or our patience is."""
        await self._entry.acquire()
        places = [self._entry]

        def pass_on() -> None:
            if places:
                places.pop().release()

        timer = asyncio.get_running_loop().call_later(self._patience_s, pass_on)
        try:
            yield
        finally:
            timer.cancel()
            pass_on()

    # ---- both sides of a pair ----

    async def _propose(self, peer: PeerId) -> Ending:
        context, expected_round = self._context, self._update.round
        for _ in range(context.terms.max_lag_rounds + _SPARE_PROPOSALS):
            exchange = Exchange(terms=context.terms, identity=context.identity, partner=peer)
            async with await context.transport.open(peer, PROTOCOL) as stream:
                await write_message(stream, exchange.propose(self._progress, expected_round))
                answer = await read_message(stream, Answer)
                if exchange.receive_answer(answer):
                    await swap_offers(stream, exchange, lambda: read_message(stream, Offer))
                    remote = await swap_payloads(stream, exchange, self._update)
                    return Ending(outcome="averaged", partner=peer, remote=remote)
            is_behind = answer.reason == "other-round" and answer.round <= self._update.round
            if not is_behind or answer.round == expected_round:
                break
            expected_round = answer.round
        return Ending(outcome="alone", partner=peer)

    async def _accept(self, peer: PeerId) -> Ending:
        while True:
            suitor = await asyncio.shield(self._calls[peer])
            async with self._let_in():
                if suitor.has_ended:  # it went away while it queued; it may come back, or has already
                    self._await_another(suitor)
                    continue
                suitor.is_claimed = True
                try:
                    await write_message(suitor.stream, suitor.exchange.accept(self._progress))
                    await swap_offers(suitor.stream, suitor.exchange, suitor.offer)
                    remote = await swap_payloads(suitor.stream, suitor.exchange, self._update)
                    return Ending(outcome="averaged", partner=peer, remote=remote)
                finally:
                    suitor.finish()
