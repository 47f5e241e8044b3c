"""What an agreed group does: parts to their owners, means back, echoes, and a second chance for what got lost.

    until      what                                  who is late
    45 %       all Δ for our part are here           does not count in our part, and is not waited for again
    85 %       all means are here                    its part may still come
    90 %       all echoes are here                   is not asked for what we lack
    deadline   what we asked for is here             the part is our own Δ

in percent of the time from the agreement to the deadline. When nobody is late, nothing waits for a clock.

Memory beyond our own encoded Δ: one encoded vector for the others' Δ of our part, one for the mean, and the means on their way.
"""

from __future__ import annotations

import asyncio
import hashlib
import statistics
from collections.abc import Sequence

from averaging.allreduce_assembly import Assembly, GroupContext, Link
from averaging.allreduce_ledger import Ledger
from averaging.allreduce_mean import Contribution, ErrorCarry, PartMean, average_part, payload_norm
from averaging.allreduce_messages import Echo, Mean, Part, Share, Want
from averaging.allreduce_roster import Roster
from averaging.update import Update
from protocol.errors import ProtocolError
from protocol.ids import PeerId
from protocol.wire import read_bulk, read_message

__all__ = ["Transfer"]

_CONTRIBUTIONS_SHARE, _MEANS_SHARE, _ECHOES_SHARE = 0.45, 0.85, 0.9
_INLINE_BYTES = 1 << 18
"""Up to here hashing or decoding on the loop (under a millisecond) is cheaper than handing it to a thread."""


class Transfer:
    """One member's part in one agreed group.

    Args:
        context: this peer.
        assembly: the streams.
        roster: the group, ourselves among them.
        update: what we send.
        numel: elements of Δ.
        carry: what encoding lost of our last mean; None without error feedback.
    """

    def __init__(
        self,
        context: GroupContext,
        assembly: Assembly,
        roster: Roster,
        *,
        update: Update,
        numel: int,
        carry: ErrorCarry | None,
    ) -> None:
        self.ledger = Ledger(context.identity, run=context.run, round=update.round, roster=roster)
        self.parts = context.layout.cut(numel, len(roster))
        self.mean = bytearray(update.delta.nbytes)
        """The encoded mean, as far as parts are held."""
        self.carry = carry
        """What encoding lost of our newest mean."""
        self._context, self._assembly, self._roster = context, assembly, roster
        self._update, self._numel = update, numel
        self._own = self.ledger.own_part
        self._contributions: dict[PeerId, bytearray] = {}
        self._is_frozen = False
        self._asked: dict[PeerId, list[int]] = {}
        self._has_asked = asyncio.Event()
        claims = [assembly.own_hello.norm, *(hello.norm for hello in assembly.hellos.values())]
        self._largest_norm = context.limits.mean_factor * statistics.median_low(claims)

    # ---- the group ----

    async def drive(self, deadline_s: float) -> None:
        """Go through the phases; returns at `deadline_s` at the latest, with whatever is held then."""
        assembly, links = self._assembly, self._assembly.links
        began_s = asyncio.get_running_loop().time()
        span_s = deadline_s - began_s
        for link in links.values():
            link.say(Part(roster=self.ledger.roster_digest), *self._own_bytes(self._roster.index(link.peer)))
        await assembly.until(
            lambda: all(link.has_contributed for link in links.values()), began_s + _CONTRIBUTIONS_SHARE * span_s
        )
        await self._tell_mean()
        await assembly.until(
            lambda: all(link.has_told_mean or link.is_late for link in links.values()),
            began_s + _MEANS_SHARE * span_s,
        )
        echo = self.ledger.echo()
        for link in links.values():
            link.say(echo)
        await assembly.until(
            lambda: all(link.has_echoed or link.is_late for link in links.values()), began_s + _ECHOES_SHARE * span_s
        )
        self._ask(is_complete=len(echo.means) == len(self._roster))
        await assembly.until(lambda: all(link.has_finished or link.is_late for link in links.values()), deadline_s)

    def finish(self) -> dict[tuple[int, int], str]:
        """Put our own Δ where no mean is accepted.

        Returns:
            Those elements, and why.
        """
        own_parts = {}
        for index, part in enumerate(self.parts):
            if not self.ledger.accepts(index):
                self._scatter(index, b"".join(self._own_bytes(index)))
                own_parts[part.start, part.stop] = self.ledger.reason(index)
        return own_parts

    # ---- one member ----

    async def listen(self, link: Link) -> None:
        """Read all that a member says after its `Part`, and answer its wants.

        Raises:
            TransportError: the stream broke, or the member stalled.
            ProtocolError: it broke a rule.
        """
        contribution = await read_bulk(link.stream, self._part_bytes(self._own))
        if not self._is_frozen:
            self._contributions[link.peer] = contribution
        link.has_contributed = True
        self._assembly.notify()
        index = self._roster.index(link.peer)
        mean = await read_message(link.stream, Mean)
        if mean.part != index:
            raise ProtocolError("mean of another's part", peer=link.peer)
        self.ledger.hear(mean, teller=link.peer)
        await self._keep(index, await read_bulk(link.stream, self._part_bytes(index)), teller=link.peer)
        link.has_told_mean = True
        self._assembly.notify()
        echo = await read_message(link.stream, Echo)
        for owner in self.ledger.hear_echo(echo, teller=link.peer):
            self._context.violations.blame(owner)
        link.has_echoed = True
        self._assembly.notify()
        await self._has_asked.wait()
        if len(echo.means) < len(self._roster):
            self._give(link, await read_message(link.stream, Want))
        link.finish()
        for asked in self._asked.get(link.peer, ()):
            await self._keep(asked, await read_bulk(link.stream, self._part_bytes(asked)), teller=link.peer)
        link.has_finished = True
        self._assembly.notify()

    # ---- steps ----

    async def _tell_mean(self) -> None:
        """Close our part: average what is here, sign it, send it to everybody."""
        self._is_frozen = True
        for link in self._assembly.links.values():
            link.is_late = not link.has_contributed
        average, digest = await asyncio.to_thread(self._average)
        shares = [Share.ABSENT] * len(self._roster)
        for member, share in zip(self._present(), average.shares, strict=True):
            shares[self._roster.index(member)] = share
            if share == Share.NOT_FINITE:
                self._context.violations.blame(member)
        if self.carry is not None:
            self.carry = ErrorCarry(self.parts[self._own].start, average.error)
        self._scatter(self._own, average.payload)
        mean = self.ledger.sign(digest, shares)
        for link in self._assembly.links.values():
            link.say(mean, memoryview(average.payload))

    def _average(self) -> tuple[PartMean, bytes]:
        part, limits, hellos = self.parts[self._own], self._context.limits, self._assembly.hellos
        present = self._present()
        own = self._context.identity.peer_id
        claims = [self._update.tokens if member == own else hellos[member].tokens for member in present]
        contributions = [
            Contribution(
                payload=b"".join(self._own_bytes(self._own)) if member == own else self._contributions[member],
                tokens=tokens,
                is_own=member == own,
            )
            for member, tokens in zip(present, limits.capped_tokens(claims), strict=True)
        ]
        average = average_part(
            contributions,
            numel=part.stop - part.start,
            codec=self._context.codec,
            limits=limits,
            carried=None if self.carry is None else self.carry.within(part),
            largest_norm=self._largest_norm,
        )
        return average, hashlib.sha256(average.payload).digest()

    def _present(self) -> Sequence[PeerId]:
        own = self._context.identity.peer_id
        return [member for member in self._roster if member == own or member in self._contributions]

    async def _keep(self, index: int, payload: bytearray, *, teller: PeerId) -> None:
        """Check a received mean, and hold it if it is what its owner signed and plausible."""
        digest, norm = await self._inspect(index, payload)
        self.ledger.check(index, digest, teller=teller)
        if not norm <= self._largest_norm:  # also NaN
            self.ledger.spoil(index, "its mean is not finite or too large")
            self._context.violations.blame(self._roster[index])
            return
        self._scatter(index, payload)
        self.ledger.hold(index)

    async def _inspect(self, index: int, payload: bytearray) -> tuple[bytes, float]:
        part, codec = self.parts[index], self._context.codec

        def inspect() -> tuple[bytes, float]:
            return hashlib.sha256(payload).digest(), payload_norm(payload, part.stop - part.start, codec)

        return inspect() if len(payload) <= _INLINE_BYTES else await asyncio.to_thread(inspect)

    def _ask(self, *, is_complete: bool) -> None:
        """Decide whom to ask for what we lack; whoever saw our incomplete echo awaits a word, be it empty."""
        if not is_complete:
            links = self._assembly.links
            self._asked = self.ledger.wants({peer for peer, link in links.items() if link.has_echoed})
            for peer, link in links.items():
                link.say(Want(parts=self._asked.get(peer, [])))
        self._has_asked.set()

    def _give(self, link: Link, want: Want) -> None:
        if len(set(want.parts)) < len(want.parts) or not all(self.ledger.holds(index) for index in want.parts):
            raise ProtocolError("asks for parts that were not offered", peer=link.peer)
        for index in want.parts:
            link.say(*self._context.layout.gather(memoryview(self.mean), self._numel, self.parts[index]))

    def _part_bytes(self, index: int) -> int:
        part = self.parts[index]
        return self._context.codec.num_bytes(part.stop - part.start)

    def _own_bytes(self, index: int) -> list[memoryview]:
        return self._context.layout.gather(self._update.delta, self._numel, self.parts[index])

    def _scatter(self, index: int, payload: bytes | bytearray) -> None:
        self._context.layout.scatter(payload, memoryview(self.mean), self._numel, self.parts[index])
