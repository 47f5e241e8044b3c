"""One group all-reduce of one peer, from the first stream to the result.

The encoded Δ is cut into one part per member. Everybody sends everybody the part that the other owns; the owner takes the mean of
its part, encodes it once and sends the same bytes to all; then signed digests are compared and what got lost is fetched from
others. Per peer 2·(N−1)/N encoded vectors are sent, whatever N, where swapping with everybody sends N−1.

A part without an accepted mean holds our own encoded Δ: there we take the solo step, as after a lost pair exchange.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from averaging.allreduce_assembly import AbsentError, Assembly, Caller, GroupContext
from averaging.allreduce_mean import ErrorCarry, payload_norm
from averaging.allreduce_messages import Hello
from averaging.allreduce_transfer import Transfer
from averaging.update import Update
from protocol.errors import LlmNodeError, ProtocolError
from protocol.ids import PeerId

__all__ = ["GroupResult", "Round"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupResult:
    """How one group round ended.

    Args:
        outcome: averaged: every part has its mean. partial: some parts hold our own Δ instead. alone: there is no mean.
        mean: the encoded mean Δ of the group, same codec and length as the Δ we sent, and the same bytes at every member whose
            outcome is "averaged"; None exactly when alone.
        peers: the others whose Δ is in it, sorted.
        tokens: tokens behind it, as claimed, ours included.
        missing: candidates that are not in it, or were lost on the way, and why.
        own_parts: elements [start, stop) that hold our own Δ, and why; empty unless partial.
        members: the others of the group that was agreed on, sorted; empty if there was none.
        seconds: how long it took.
    """

    outcome: Literal["averaged", "partial", "alone"]
    mean: memoryview | None
    peers: tuple[PeerId, ...]
    tokens: int
    missing: Mapping[PeerId, str]
    own_parts: Mapping[tuple[int, int], str]
    members: tuple[PeerId, ...]
    seconds: float


class Round:
    """Takes part in one round; `run` once.

    Args:
        context: this peer.
        update: what we send; only Δ travels.
        numel: elements of Δ.
        candidates: the group as the directory shows it, ourselves not counted.
        deadline_s: loop time at which `run` has returned.
        carry: what encoding lost of our last mean; None without error feedback.
    """

    def __init__(
        self,
        context: GroupContext,
        *,
        update: Update,
        numel: int,
        candidates: Sequence[PeerId],
        deadline_s: float,
        carry: ErrorCarry | None,
    ) -> None:
        self.carry = carry
        """After `run`: what encoding lost of our newest mean that counts."""
        self._context, self._update, self._numel = context, update, numel
        self._candidates, self._deadline_s = candidates, deadline_s
        self._started_s = asyncio.get_running_loop().time()
        self._assembly: Assembly | None = None
        self._transfer: Transfer | None = None
        self._has_formed = asyncio.Event()
        self._early_callers: list[Caller] = []
        self._tasks: dict[PeerId, asyncio.Task[None]] = {}

    def arrived(self, caller: Caller) -> None:
        """A stream for this round has come in."""
        if self._assembly is None:
            self._early_callers.append(caller)
        else:
            self._assembly.arrived(caller)

    async def run(self) -> GroupResult:
        """Take part. Cancellation leaves no stream open; the others see us as lost.

        Raises:
            FloatingPointError: our own Δ is not finite.
        """
        assembly = Assembly(
            self._context, hello=await self._hello(), candidates=self._candidates, deadline_s=self._deadline_s
        )
        self._assembly = assembly
        for caller in self._early_callers:
            assembly.arrived(caller)
        async with asyncio.TaskGroup() as tasks:
            self._tasks = {peer: tasks.create_task(self._attend(assembly, peer)) for peer in self._candidates}
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(self._deadline_s):
                        await self._drive(assembly)
            finally:
                for task in self._tasks.values():
                    task.cancel()
        return self._result(assembly, self._transfer)

    async def _hello(self) -> Hello:
        update = self._update
        norm = await asyncio.to_thread(payload_norm, update.delta, self._numel, self._context.codec)
        if not math.isfinite(norm):
            raise FloatingPointError("the group was asked to average a delta that is not finite")
        return Hello(
            run=self._context.run, round=update.round, tokens=update.tokens, num_bytes=update.delta.nbytes, norm=norm
        )

    async def _drive(self, assembly: Assembly) -> None:
        """The group's side: form it, then let it work."""
        roster = await assembly.agree()
        for peer in self._candidates:
            if peer not in assembly.links or roster is None or peer not in roster:
                assembly.lose(peer, AbsentError("no agreement on the group"))
                self._tasks[peer].cancel()
        if roster is None:
            return
        transfer = Transfer(self._context, assembly, roster, update=self._update, numel=self._numel, carry=self.carry)
        self._transfer = transfer
        self._has_formed.set()
        await transfer.drive(self._deadline_s)

    async def _attend(self, assembly: Assembly, peer: PeerId) -> None:
        """One candidate's side: connect, and converse until the end."""
        try:
            async with assembly.link(peer) as link, asyncio.TaskGroup() as tasks:
                tasks.create_task(link.pump())
                part = await assembly.hear_votes(link)
                await self._has_formed.wait()
                assert self._transfer is not None
                if part.roster != self._transfer.ledger.roster_digest:
                    raise AbsentError("settled on another group")
                await self._transfer.listen(link)
        except* LlmNodeError as group:
            errors = [error for error in group.exceptions if isinstance(error, LlmNodeError)]
            violations = [error for error in errors if isinstance(error, ProtocolError)]
            assembly.lose(peer, (violations or errors)[0])

    def _result(self, assembly: Assembly, transfer: Transfer | None) -> GroupResult:
        peers: tuple[PeerId, ...] = ()
        members: tuple[PeerId, ...] = ()
        own_parts: dict[tuple[int, int], str] = {}
        if transfer is not None:
            peers = tuple(sorted(transfer.ledger.contributors() - {self._context.identity.peer_id}))
            members = transfer.ledger.others
            own_parts = transfer.finish()
            if transfer.ledger.accepts(transfer.ledger.own_part):
                self.carry = transfer.carry
            for peer in transfer.ledger.not_finite():
                assembly.missing.setdefault(peer, "its values are not finite")
        is_alone = transfer is None or not peers
        claims = [assembly.hellos[peer].tokens for peer in peers if peer in assembly.hellos]
        return GroupResult(
            outcome="alone" if is_alone else "partial" if own_parts else "averaged",
            mean=None if is_alone or transfer is None else memoryview(transfer.mean),
            peers=peers,
            tokens=self._update.tokens + sum(claims),
            missing=assembly.missing,
            own_parts={} if is_alone else own_parts,
            members=members,
            seconds=asyncio.get_running_loop().time() - self._started_s,
        )
