"""The members of a group find each other: streams, Hellos, ballots.

Of two peers the smaller id opens the stream and the other waits for it, for as long as the gathering lasts; after a second it
knocks (opens a stream and closes it), so that a dead peer does not cost the whole gathering. Gathering ends when everybody has come
or is known to be gone, when half of those awaited are already voting, or at its cut-off. Who comes later is told so.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

from averaging.allreduce_mean import GroupLimits
from averaging.allreduce_messages import MAX_BALLOTS, Ballot, Hello, Part, Refusal, Vote
from averaging.allreduce_parts import Layout
from averaging.allreduce_roster import Ballots, Roster
from averaging.codec import Codec
from protocol.errors import LlmNodeError, ProtocolError, TransportError
from protocol.identity import Identity
from protocol.ids import PeerId, RunId
from protocol.transport import Stream, Transport
from protocol.violations import Violations
from protocol.wire import Message, read_message, write_bulk, write_message

__all__ = ["PROTOCOL", "AbsentError", "Assembly", "Caller", "GroupContext", "Link"]

PROTOCOL = "/llm-node/allreduce/1"

_GATHER_SHARE = 0.5
"""Share of the time to the deadline for which we wait for members, who may end their rounds most of a round after us."""
_BALLOT_SHARE = 0.05
"""The same for one ballot."""
_KNOCK_AFTER_S = 1.0
_DIAL_AGAIN_AFTER_S = 0.5
"""Who has just begun may not take this kind of stream yet, and a dial may fail by chance: that should not cost a round."""


class AbsentError(TransportError):
    """A candidate that is not (or no longer) part of the group; nobody is to blame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupContext:
    """What all rounds of this peer share."""

    transport: Transport
    identity: Identity
    run: RunId
    codec: Codec
    layout: Layout
    limits: GroupLimits
    violations: Violations


class Caller:
    """A stream opened to us, with the Hello it began with. The transport closes it after `release`."""

    def __init__(self, stream: Stream, hello: Hello) -> None:
        self.peer, self.stream, self.hello = stream.peer, stream, hello
        self.is_claimed = False
        self.refusal: Refusal | None = None
        self._released = asyncio.Event()

    def release(self, refusal: Refusal | None = None) -> None:
        """Done with it, or turn it away."""
        if not self._released.is_set():
            self.refusal = refusal
            self._released.set()

    async def released(self) -> None:
        """Wait for `release`."""
        await self._released.wait()


class Link:
    """The stream to one member. What we say goes through a queue, so that nobody who speaks waits for a slow listener."""

    def __init__(self, stream: Stream, hello: Hello) -> None:
        self.peer, self.stream, self.hello = stream.peer, stream, hello
        self.has_contributed = self.has_told_mean = self.has_echoed = self.has_finished = False
        self.is_late = False
        """Its Δ came too late for our part: nobody waits for it any more."""
        self._outbox: asyncio.Queue[Message | memoryview | None] = asyncio.Queue()

    def say(self, *items: Message | memoryview) -> None:
        """Queue messages and bulk data; bulk data must not change until it is written."""
        for item in items:
            self._outbox.put_nowait(item)

    def finish(self) -> None:
        """Nothing more will be said."""
        self._outbox.put_nowait(None)

    async def pump(self) -> None:
        """Write what is said until `finish`.

        Raises:
            TransportError: the stream broke, or the member stopped reading.
        """
        while (item := await self._outbox.get()) is not None:
            if isinstance(item, memoryview):
                await write_bulk(self.stream, item)
            else:
                await write_message(self.stream, item)


class Assembly:
    """The forming of one group.

    Args:
        context: this peer.
        hello: what we say to everybody.
        candidates: who may be in it, ourselves not counted.
        deadline_s: loop time at which the whole round ends.
    """

    def __init__(self, context: GroupContext, *, hello: Hello, candidates: Sequence[PeerId], deadline_s: float) -> None:
        loop = asyncio.get_running_loop()
        self.links: dict[PeerId, Link] = {}
        """Live streams; all have said Hello."""
        self.missing: dict[PeerId, str] = {}
        """Who is not with us any more, and why."""
        self.own_hello = hello
        self.hellos: dict[PeerId, Hello] = {}
        """What all who ever were in `links` said."""
        self._context = context
        self._me = context.transport.peer_id
        self._candidates = candidates
        self._calls: dict[PeerId, asyncio.Future[Caller]] = {
            peer: loop.create_future() for peer in candidates if peer < self._me
        }
        self._unreachable: set[PeerId] = set()
        self._ballots = Ballots(self._me, candidates)
        self._is_closed = False
        self._changed = asyncio.Event()
        span_s = deadline_s - loop.time()
        self._gather_until_s = loop.time() + _GATHER_SHARE * span_s
        self._patience_s = _BALLOT_SHARE * span_s

    # ---- conditions ----

    def notify(self) -> None:
        """Something that somebody may wait for has changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(self, holds: Callable[[], bool], cutoff_s: float) -> None:
        """Wait until the condition holds, or for loop time `cutoff_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(cutoff_s):
                while not holds():
                    await self._changed.wait()

    # ---- one member ----

    def arrived(self, caller: Caller) -> None:
        """A stream for our round has come in: claim it, or turn it away."""
        call = self._calls.get(caller.peer)
        if call is None:
            caller.release("unknown")
        elif call.done() or self._is_closed:
            caller.release("late")
        else:
            caller.is_claimed = True
            call.set_result(caller)

    @asynccontextmanager
    async def link(self, peer: PeerId) -> AsyncIterator[Link]:
        """The stream to a candidate, Hellos exchanged.

        Raises:
            TransportError: it can not be reached, went away or turned us down.
            ProtocolError: its Hello breaks a rule.
        """
        if self._me < peer:
            async with await self._dial(peer) as stream:
                await write_message(stream, self.own_hello)
                yield self._linked(stream, await read_message(stream, Hello))
            return
        caller = await self._called(peer)
        try:
            await write_message(caller.stream, self.own_hello)
            yield self._linked(caller.stream, caller.hello)
        finally:
            caller.release()

    async def hear_votes(self, link: Link) -> Part:
        """Read a member's ballots up to the end of its voting.

        Raises:
            TransportError: the stream broke.
            ProtocolError: a ballot breaks a rule.
        """
        while True:
            vote = (await read_message(link.stream, Vote)).root
            if isinstance(vote, Part):
                self._ballots.settle(link.peer)
                self.notify()
                return vote
            self._ballots.hear(link.peer, vote)
            self.notify()

    def lose(self, peer: PeerId, error: LlmNodeError) -> None:
        """The candidate is out, for the rest of the round."""
        if isinstance(error, ProtocolError):
            self._context.violations.blame(error.peer or peer)
        self.links.pop(peer, None)
        self._ballots.forget(peer)
        self.missing.setdefault(peer, str(error))
        self.notify()

    # ---- the group ----

    async def agree(self) -> Roster | None:
        """Gather, then vote.

        Returns:
            The group; None if there is none.
        """
        await self._gather()
        roster: Roster = tuple(sorted({self._me, *self.links}))
        for number in range(MAX_BALLOTS):
            if roster == (self._me,):
                return None
            for link in self.links.values():
                link.say(Ballot(number=number, members=list(roster)))
            now_s = asyncio.get_running_loop().time()
            began_s = now_s if number else max(now_s, self._gather_until_s)  # others may still gather
            await self.until(partial(self._have_voted, number), began_s + self._patience_s)
            tally = self._ballots.count(number, roster)
            if tally.kind != "again":
                return tally.roster if tally.kind == "agreed" else None
            roster = tally.roster
        return None

    def _have_voted(self, number: int) -> bool:
        return all(self._ballots.has(peer, number) for peer in self.links)

    async def _gather(self) -> None:
        def awaited() -> list[PeerId]:
            return [peer for peer in self._candidates if peer not in self.missing and peer not in self._unreachable]

        def is_complete() -> bool:
            return all(peer in self.links for peer in awaited())

        def is_half_voting() -> bool:
            return 2 * sum(self._ballots.has(peer, 0) for peer in awaited()) >= len(awaited())

        await self.until(lambda: is_complete() or is_half_voting(), self._gather_until_s)
        loop = asyncio.get_running_loop()
        await self.until(is_complete, min(self._gather_until_s, loop.time() + self._patience_s))
        self._is_closed = True
        for peer in self._candidates:
            if peer not in self.links:
                reason = "unreachable" if peer in self._unreachable else "did not come in time"
                self.missing.setdefault(peer, reason)

    async def _dial(self, peer: PeerId) -> Stream:
        """Open a stream, at the second attempt if need be."""
        try:
            return await self._context.transport.open(peer, PROTOCOL)
        except TransportError:
            await asyncio.sleep(_DIAL_AGAIN_AFTER_S)
            return await self._context.transport.open(peer, PROTOCOL)

    async def _called(self, peer: PeerId) -> Caller:
        call = self._calls[peer]
        done, _ = await asyncio.wait({call}, timeout=_KNOCK_AFTER_S)
        if not done:
            try:
                await (await self._context.transport.open(peer, PROTOCOL)).close()
            except TransportError:
                self._unreachable.add(peer)
                self.notify()
        return await call

    def _linked(self, stream: Stream, hello: Hello) -> Link:
        if hello.refusal is not None:
            raise AbsentError(f"turned us down: {hello.refusal}")
        ours = self.own_hello
        if (hello.run, hello.round, hello.num_bytes) != (ours.run, ours.round, ours.num_bytes):
            raise ProtocolError("hello of another run, round or length", peer=stream.peer)
        if self._is_closed:
            raise AbsentError("did not come in time")
        link = Link(stream, hello)
        self.links[stream.peer], self.hellos[stream.peer] = link, hello
        self.notify()
        return link
