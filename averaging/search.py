"""One round's pair exchange of one peer: find a partner, swap with it.

`Matcher` decides, `Exchange` holds the rules of the swap, and this carries out what they say: it opens streams, answers
suitors, and starts the swap as soon as a pair stands. A pairing that breaks before both Offers are in costs nothing: the search
goes on. After that the partner is final, and losing it ends the round.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from averaging.door import Suitor
from averaging.early import EarlySlow
from averaging.exchange import Exchange, Progress, Terms
from averaging.exchange_messages import Answer, Offer
from averaging.pairing import Accept, Action, Alone, Matcher, Propose, Reject, Withdraw
from averaging.side_buffer import SideBuffer
from averaging.swap import swap_offers, swap_payloads
from averaging.update import RemoteUpdate, Update
from protocol.errors import DeadlineError, LlmNodeError, ProtocolError
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.transport import Stream, Transport
from protocol.violations import Violations
from protocol.wire import read_message, write_message

__all__ = ["OFFER_TIMEOUT_S", "PROTOCOL", "Ending", "PeerContext", "Search"]

PROTOCOL = "/llm-node/exchange/1"

OFFER_TIMEOUT_S = 10.0
"""Time from the acceptance to both Offers: nothing but two small messages, so whoever needs longer is not worth waiting for."""

Outcome = Literal["averaged", "alone", "timeout", "lost"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerContext:
    """What every exchange of this peer shares."""

    transport: Transport
    identity: Identity
    terms: Terms
    violations: Violations
    side_buffer: SideBuffer = field(default_factory=SideBuffer)
    """For the payload of a pair's other half; there is one pair at a time."""
    early: EarlySlow | None = None
    """In runs that send φ ahead."""

    def blame(self, error: LlmNodeError, peer: PeerId) -> None:
        """Count the error against `peer` if it is a violation."""
        if isinstance(error, ProtocolError):
            self.violations.blame(peer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a search ended."""

    outcome: Outcome
    partner: PeerId | None = None
    remote: RemoteUpdate | None = None


@dataclass(slots=True, kw_only=True)
class _Pairing:
    """A pair that stands, from either side's view."""

    stream: Stream
    exchange: Exchange
    suitor: Suitor | None
    """None if the proposal was ours."""

    async def read_offer(self) -> Offer:
        if self.suitor is not None:
            return await self.suitor.offer()
        return await read_message(self.stream, Offer)

    async def close(self) -> None:
        self.exchange.lose()
        if self.suitor is not None:
            self.suitor.finish()
        else:
            await self.stream.close()


@dataclass(frozen=True, slots=True)
class _Standing:
    """Our proposal to one candidate."""

    task: asyncio.Task[None]
    patience: asyncio.TimerHandle

    def end(self) -> None:
        self.patience.cancel()
        self.task.cancel()


class Search:
    """Looks for one partner and swaps with it. Serves once, as the door's listener while it runs.

    Args:
        context: this peer.
        update: what we send.
        progress: its description.
        candidates: whom we may pair with.
        patience_s: how long a candidate may let us wait before others are preferred to it.
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
        self.num_attempts = 0
        """Pairs tried: proposals sent and proposals accepted."""
        self._context = context
        self._update = update
        self._progress = progress
        self._patience_s = patience_s
        self._random = random.Random(f"{context.transport.peer_id} {update.round}")
        self._matcher = Matcher(
            me=context.transport.peer_id,
            round=update.round,
            candidates=candidates,
            beacon=context.terms.run.encode(),
            max_lag_rounds=context.terms.max_lag_rounds,
        )
        self._suitors: dict[PeerId, Suitor] = {}
        self._proposals: dict[PeerId, _Standing] = {}
        self._found: asyncio.Future[_Pairing | None] = asyncio.get_running_loop().create_future()
        self._spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]] | None = None

    @property
    def partner(self) -> PeerId | None:
        """Whom we are or were paired with last."""
        return self._matcher.partner

    async def run(self) -> Ending:
        """Search and swap. Cancelling it leaves no stream of ours open and no suitor waiting.

        Returns:
            How it ended; never "timeout" unless the partner stalled (the deadline of the whole is the caller's).
        """
        async with asyncio.TaskGroup() as tasks:
            self._spawn = tasks.create_task
            self._perform(self._matcher.start())
            try:
                # Shielded: an answer may come in with the cancellation, and must still find the future open.
                while (pairing := await asyncio.shield(self._found)) is not None:
                    self._found = asyncio.get_running_loop().create_future()
                    ending = await self._swap(pairing)
                    if ending is not None:
                        return ending
            finally:
                self.close()
                self._spawn = None
                for proposal in self._proposals.values():
                    proposal.end()
                if self._found.done() and (unused := self._found.result()) is not None:
                    await unused.close()
        return Ending(outcome="alone")

    def close(self) -> None:
        """Release every suitor that still waits. Idempotent."""
        self._perform(self._matcher.close())

    # ---- the door's listener ----

    def arrived(self, suitor: Suitor) -> None:
        self._suitors[suitor.peer] = suitor
        self._perform(self._matcher.called(suitor.peer, suitor.round, suitor.expected_round))

    def departed(self, suitor: Suitor) -> None:
        if self._suitors.get(suitor.peer) is suitor:
            del self._suitors[suitor.peer]
            self._perform(self._matcher.hung_up(suitor.peer))

    # ---- carrying out ----

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Propose(peer, expected_round):
                    assert self._spawn is not None
                    self.num_attempts += 1
                    task = self._spawn(self._propose(peer, expected_round))
                    # spread, or peers that began together would lose patience at once and miss each other again
                    patience_s = self._patience_s * self._random.uniform(0.75, 1.25)
                    timer = asyncio.get_running_loop().call_later(patience_s, self._waited_long, peer)
                    self._proposals[peer] = _Standing(task, timer)
                case Withdraw(peer):
                    self._proposals.pop(peer).end()
                case Accept(peer):
                    self.num_attempts += 1
                    suitor = self._suitors[peer]
                    suitor.is_claimed = True
                    self._found.set_result(_Pairing(stream=suitor.stream, exchange=suitor.exchange, suitor=suitor))
                case Reject(peer, reason, round):
                    self._suitors[peer].reject(reason, round)
                case Alone():
                    self._found.set_result(None)

    def _waited_long(self, peer: PeerId) -> None:
        self._perform(self._matcher.waited_long(peer))

    async def _propose(self, peer: PeerId, expected_round: int) -> None:
        """Propose to `peer` and tell the matcher what became of it. The stream is closed unless it becomes a pairing."""
        context = self._context
        exchange = Exchange(terms=context.terms, identity=context.identity, partner=peer)
        stream: Stream | None = None
        keep = False
        try:
            stream = await context.transport.open(peer, PROTOCOL)
            self._matcher.sent(peer)
            await write_message(stream, exchange.propose(self._progress, expected_round))
            answer = await read_message(stream, Answer)
            keep = exchange.receive_answer(answer)
        except LlmNodeError as error:
            context.blame(error, peer)
            self._proposals.pop(peer).patience.cancel()
            self._perform(self._matcher.unreachable(peer))
        else:
            self._proposals.pop(peer).patience.cancel()
            if answer.accepted:
                self._matcher.accepted(peer)
                self._found.set_result(_Pairing(stream=stream, exchange=exchange, suitor=None))
            else:
                assert answer.reason is not None
                self._perform(self._matcher.turned_down(peer, answer.reason, answer.round))
        finally:
            if stream is not None and not keep:
                await stream.close()

    async def _swap(self, pairing: _Pairing) -> Ending | None:
        """Go through with a pairing. None: it broke while that was still free of cost, and the search goes on."""
        peer = pairing.exchange.partner
        try:
            if not await self._settle(pairing):
                return None
            context = self._context
            remote = await swap_payloads(
                pairing.stream, pairing.exchange, self._update, buffer=context.side_buffer, early=context.early
            )
            return Ending(outcome="averaged", partner=peer, remote=remote)
        except DeadlineError:
            return Ending(outcome="timeout", partner=peer)
        except LlmNodeError as error:
            self._context.blame(error, peer)
            return Ending(outcome="lost", partner=peer)
        finally:
            await pairing.close()

    async def _settle(self, pairing: _Pairing) -> bool:
        """Swap Offers; afterwards the partner is final and everybody else is released."""
        try:
            async with asyncio.timeout(OFFER_TIMEOUT_S):
                if pairing.suitor is not None:
                    await write_message(pairing.stream, pairing.exchange.accept(self._progress))
                await swap_offers(pairing.stream, pairing.exchange, pairing.read_offer)
        except (LlmNodeError, TimeoutError) as error:
            if isinstance(error, LlmNodeError):
                self._context.blame(error, pairing.exchange.partner)
            await pairing.close()
            self._perform(self._matcher.broke_off())
            return False
        self._release_crossed(pairing)
        self._perform(self._matcher.confirmed())
        return True

    def _release_crossed(self, pairing: _Pairing) -> None:
        """If both proposed at once, the partner's other stream is of no use any more."""
        crossed = self._suitors.get(pairing.exchange.partner)
        if crossed is not None and crossed is not pairing.suitor:
            crossed.finish()
