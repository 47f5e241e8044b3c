"""The group all-reduce: give it an update and candidates, get back the group's mean Δ, or none.

For runs whose group is everybody (DiLoCo). See `averaging.allreduce_round` for how a round goes. Nothing that a member or the
network does comes out of here as an exception, and nothing outlasts the deadline: a member that dies, stalls or lies costs at
most its own part, where our own Δ stands in. Broken rules are counted in `violations`.

Between rounds, members that are ahead are held at the door, at most one stream each; who is behind is told so.

What encoding lost of our last mean is carried into the next one, in memory only; a checkpoint does without. A restart loses one
round's rounding error of one part, half a code's step per element at most, once: as much as a round of a codec without feedback
loses every time. To keep it would cost a checkpoint a vector whose place depends on the group of that round.

Why not all-reduce over a ring: with one broken link it stalls everybody, and every member would forward sums that nobody can check.
Here every number has one author, who signs it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

import torch

from averaging.allreduce_assembly import PROTOCOL, Caller, GroupContext
from averaging.allreduce_mean import ErrorCarry, GroupLimits
from averaging.allreduce_messages import MAX_MEMBERS, Hello, Refusal
from averaging.allreduce_parts import Layout
from averaging.allreduce_roster import group_of
from averaging.allreduce_round import GroupResult, Round
from averaging.codec import Codec
from averaging.update import Update
from protocol.errors import DeadlineError, ProtocolError, TransportError
from protocol.identity import Identity
from protocol.ids import PeerId, RunId
from protocol.transport import Stream, Transport
from protocol.violations import Violations
from protocol.wire import read_message, write_message

__all__ = ["PROTOCOL", "GroupAverager", "GroupLimits", "GroupResult"]

_HELLO_TIMEOUT_S = 10.0
"""Time for a stranger's first message, and for it to take our refusal."""
_MAX_HELD = 2 * MAX_MEMBERS
"""Streams held at once, one per peer; beyond it strangers give way to candidates."""


_WITHOUT_CARRY = frozenset({"topk"})
"""Codecs whose loss on means is not carried over: of a sparse mean most is lost, comes back many rounds late, and oversteps."""


class GroupAverager:
    """Serves and takes part in group rounds, one after the other. An async context manager: leaving it turns callers away.

    Args:
        transport: the network; its peer id must be the identity's.
        identity: signs our means.
        run: the run.
        codec: of Δ and of its mean.
        numel: elements of Δ; a function of the round where fragments travel (then without error feedback on means, since the
            elements change from round to round).
        limits: bounds on members.
    """

    def __init__(
        self,
        *,
        transport: Transport,
        identity: Identity,
        run: RunId,
        codec: Codec,
        numel: int | Callable[[int], int],
        limits: GroupLimits | None = None,
    ) -> None:
        assert transport.peer_id == identity.peer_id
        self.violations = Violations()
        """Broken rules per peer since the start."""
        self._context = GroupContext(
            transport=transport,
            identity=identity,
            run=run,
            codec=codec,
            layout=Layout.of(codec),
            limits=limits or GroupLimits(),
            violations=self.violations,
        )
        self._numel = numel
        carries = codec.lossy and codec.name not in _WITHOUT_CARRY and isinstance(numel, int)
        self._carry = ErrorCarry(0, torch.zeros(0)) if carries else None
        self._callers: dict[PeerId, Caller] = {}
        self._known: frozenset[PeerId] = frozenset()
        self._round: Round | None = None
        self._newest_round = -1  # of those begun
        self._is_closed = False

    async def __aenter__(self) -> Self:
        self._context.transport.handle(PROTOCOL, self._serve)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._is_closed = True
        for caller in self._callers.values():
            caller.release("late")

    async def reduce(self, update: Update, *, candidates: Sequence[PeerId], deadline_s: float) -> GroupResult:
        """Average Δ with all candidates that take part in the same round.

        Args:
            update: our progress; its Δ must not change until this returns. φ does not travel here.
            candidates: the live trainers; ourselves among them is ignored. More than `MAX_MEMBERS` are dealt into groups that
                change every round.
            deadline_s: loop time at which we go on with what we have.

        Returns:
            The result. Cancellation leaves no stream open, and the others see us as lost.

        Raises:
            FloatingPointError: our own Δ is not finite.
        """
        assert self._round is None, "one group round at a time"
        context = self._context
        numel = self._numel if isinstance(self._numel, int) else self._numel(update.round)
        assert update.delta.nbytes == context.codec.num_bytes(numel)
        group = group_of(context.identity.peer_id, candidates, run=context.run, round=update.round)
        self._known = frozenset(candidates)
        self._round = Round(
            context, update=update, numel=numel, candidates=group, deadline_s=deadline_s, carry=self._carry
        )
        self._newest_round = update.round
        try:
            for caller in list(self._callers.values()):
                self._consider(caller)
            return await self._round.run()
        finally:
            self._carry = self._round.carry
            self._round = None
            for caller in list(self._callers.values()):
                self._consider(caller)

    # ---- the door ----

    async def _serve(self, stream: Stream) -> None:
        """Handler of one incoming stream; see protocol.transport.Handler."""
        caller = await self._greet(stream)
        try:
            self._admit(caller)
            await caller.released()
        finally:
            if self._callers.get(caller.peer) is caller:
                del self._callers[caller.peer]
        if caller.refusal is not None:
            hello = caller.hello.model_copy(update={"refusal": caller.refusal, "tokens": 0, "norm": 0.0})
            with suppress(TransportError, TimeoutError):
                async with asyncio.timeout(_HELLO_TIMEOUT_S):
                    await write_message(stream, hello)

    async def _greet(self, stream: Stream) -> Caller:
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                hello = await read_message(stream, Hello)
        except TimeoutError:
            raise DeadlineError("stream opened without a hello") from None
        except ProtocolError:
            self.violations.blame(stream.peer)
            raise
        return Caller(stream, hello)

    def _admit(self, caller: Caller) -> None:
        refusal = self._refusal(caller)
        if refusal is not None:
            return caller.release(refusal)
        older = self._callers.pop(caller.peer, None)
        if older is not None:
            older.release("late")
        self._callers[caller.peer] = caller
        return self._consider(caller)

    def _refusal(self, caller: Caller) -> Refusal | None:
        """Why the caller can not even wait."""
        older = self._callers.get(caller.peer)
        if caller.hello.run != self._context.run:
            return "wrong-run"
        if self._is_closed or (older is not None and older.is_claimed):
            return "late"
        if older is not None or len(self._callers) < _MAX_HELD:
            return None
        strangers = [held for held in self._callers.values() if held.peer not in self._known and not held.is_claimed]
        if caller.peer not in self._known or not strangers:
            return "full"
        strangers[0].release("full")
        return None

    def _consider(self, caller: Caller) -> None:
        """Pass a held caller on to the round under way, tell it that it is late, or let it wait."""
        if caller.is_claimed:
            return
        if caller.hello.round < self._newest_round:
            caller.release("passed")
        elif caller.hello.round == self._newest_round:
            if self._round is not None:
                self._round.arrived(caller)
            else:
                caller.release("late")
