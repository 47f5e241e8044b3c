"""A peer's side of all exchanges of a run: give it an update and candidates, get back a partner's update or none.

Nothing that a partner or the network does comes out of here as an exception: a partner that dies, stalls or lies costs at most
the deadline, and the result says so. Broken rules are counted in `violations`. Exchanges of one peer run one after the other;
between them, proposals for the next round are held at the door.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from averaging.door import Door
from averaging.early import EARLY_PROTOCOL, EarlySlow
from averaging.exchange import Progress, Terms
from averaging.group import GroupSwap
from averaging.search import PROTOCOL, Ending, PeerContext, Search
from averaging.swap import describe
from averaging.update import RemoteUpdate, Update
from protocol.identity import Identity
from protocol.ids import PeerId, RunId
from protocol.transport import Transport
from protocol.violations import Violations

__all__ = ["Averager", "ExchangeResult"]

_PATIENCE = 0.25
"""Share of the time to the deadline that one candidate may let us, or others, wait before we look at those."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeResult:
    """How one exchange ended.

    Args:
        outcome: averaged: both sides hold both updates. alone: nobody was free. timeout: the deadline passed or the partner
            stalled. lost: the partner vanished or broke a rule after the pair stood.
        partner: the (last) partner, if there was one; for a group exchange always the candidate.
        remote: the partner's update, exactly when averaged.
        seconds: how long it took.
        attempts: pairs tried.
    """

    outcome: Literal["averaged", "alone", "timeout", "lost"]
    partner: PeerId | None
    remote: RemoteUpdate | None
    seconds: float
    attempts: int


class Averager:
    """Serves and starts exchanges. An async context manager: leaving it turns every waiting proposal away.

    Args:
        transport: the network; its peer id must be the identity's.
        identity: signs offers and receipts.
        run: the run; also the shared randomness of the pairing.
        payload_bytes: exact length of Δ and φ on the wire together: a number, or a function of the round (the same for rounds up
            to `max_lag_rounds` apart).
        max_lag_rounds: largest difference of rounds between two partners.
        sends_early: whether φ is sent ahead of its exchange (averaging/early.py).
    """

    def __init__(
        self,
        *,
        transport: Transport,
        identity: Identity,
        run: RunId,
        payload_bytes: int | Callable[[int], int],
        max_lag_rounds: int,
        sends_early: bool = False,
    ) -> None:
        assert transport.peer_id == identity.peer_id
        bytes_of_round = payload_bytes if callable(payload_bytes) else lambda round: payload_bytes
        self.violations = Violations()
        """Broken rules per peer since the start."""
        terms = Terms(run=run, payload_bytes=bytes_of_round, max_lag_rounds=max_lag_rounds)
        self.early = EarlySlow(terms=terms, transport=transport, violations=self.violations) if sends_early else None
        """What goes ahead, in runs where something does."""
        self._context = PeerContext(
            transport=transport, identity=identity, terms=terms, violations=self.violations, early=self.early
        )
        self._door = Door(terms=self._context.terms, identity=identity, violations=self.violations)

    async def __aenter__(self) -> Self:
        self._context.transport.handle(PROTOCOL, self._door.serve)
        if self.early is not None:
            self._context.transport.handle(EARLY_PROTOCOL, self.early.serve)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._door.close()

    async def exchange(self, update: Update, *, candidates: Sequence[PeerId], deadline_s: float) -> ExchangeResult:
        """Average with one of the candidates, or nobody.

        Args:
            update: our progress; its buffers must not change until this returns.
            candidates: whom we may pair with; ourselves among them is ignored.
            deadline_s: loop time at which we go on alone, whatever is under way.

        Returns:
            The result. Cancellation leaves no stream open, and the partner sees us as lost.
        """
        started_s = asyncio.get_running_loop().time()
        search: Search | None = None
        try:
            async with asyncio.timeout_at(deadline_s):
                progress = await self._describe(update)
                search = Search(
                    self._context,
                    update=update,
                    progress=progress,
                    candidates=candidates,
                    patience_s=_PATIENCE * (deadline_s - started_s),
                )
                self._door.attach(search, candidates=candidates)
                ending = await search.run()
        except TimeoutError:
            ending = Ending(outcome="timeout", partner=search.partner if search else None)
        finally:
            if search is not None:
                search.close()
                self._door.detach(next_round=update.round + 1)
        return _result(ending, started_s, attempts=search.num_attempts if search else 0)

    async def exchange_all(
        self, update: Update, *, candidates: Sequence[PeerId], deadline_s: float
    ) -> list[ExchangeResult]:
        """Swap updates with every candidate (DiLoCo's group round), each pair by the same two-phase exchange.

        Args:
            update: our progress; its buffers must not change until this returns.
            candidates: the whole group; ourselves among them is ignored.
            deadline_s: loop time at which we go on with what we have.

        Returns:
            One result per candidate, in no meaningful order.
        """
        started_s = asyncio.get_running_loop().time()
        progress = await self._describe(update)
        group = GroupSwap(
            self._context,
            update=update,
            progress=progress,
            candidates=candidates,
            patience_s=_PATIENCE * (deadline_s - started_s),
        )

        async def one(peer: PeerId) -> ExchangeResult:
            try:
                async with asyncio.timeout_at(deadline_s):
                    ending = await group.swap(peer)
            except TimeoutError:
                ending = Ending(outcome="timeout", partner=peer)
            return _result(ending, started_s, attempts=1)

        self._door.attach(group, candidates=candidates)
        try:
            async with asyncio.TaskGroup() as tasks:
                swaps = [tasks.create_task(one(peer)) for peer in group.order]
        finally:
            group.close()
            self._door.detach(next_round=update.round + 1)
        return [swap.result() for swap in swaps]

    async def _describe(self, update: Update) -> Progress:
        assert update.num_bytes == self._context.terms.payload_bytes(update.round)
        return await describe(update)


def _result(ending: Ending, started_s: float, *, attempts: int) -> ExchangeResult:
    return ExchangeResult(
        outcome=ending.outcome,
        partner=ending.partner,
        remote=ending.remote,
        seconds=asyncio.get_running_loop().time() - started_s,
        attempts=attempts,
    )
