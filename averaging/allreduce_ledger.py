"""Which means of which parts a member holds, who says what about them, and which count in the end. No I/O, no tensors.

An owner signs its mean once. Every member echoes all signed means it holds to all others; two different ones of one owner
convict that owner, and its part is dropped by everybody who heard both. Since only the owner's signature convicts, nobody can
have an honest owner's part dropped. A part that we lack but others hold is fetched from one of them.

What this can not do: an owner and a member who lie together can show the second story to some members only, and then those drop
the part and others do not. As with a lost last message, the pull on φ has to mend it.
"""

from __future__ import annotations

from averaging.allreduce_messages import Echo, Mean, Share
from averaging.allreduce_roster import Roster, roster_digest
from protocol.errors import ProtocolError
from protocol.identity import Identity, verify
from protocol.ids import PeerId, RunId

__all__ = ["MEAN_DOMAIN", "Ledger"]

MEAN_DOMAIN = "allreduce-mean"


class Ledger:
    """One member's account of one group round.

    Args:
        identity: ours.
        run, round, roster: which group.
    """

    def __init__(self, identity: Identity, *, run: RunId, round: int, roster: Roster) -> None:
        self._identity = identity
        self._run, self._round, self._roster = run, round, roster
        self.roster_digest = roster_digest(roster, run=run, round=round)
        self.own_part = roster.index(identity.peer_id)
        self._means: dict[int, Mean] = {}
        self._held: set[int] = set()
        self._spoilt: dict[int, str] = {}
        self._donors: dict[int, list[PeerId]] = {}

    # ---- what comes in ----

    def sign(self, digest: bytes, shares: list[int]) -> Mean:
        """Our own part's mean, by the SHA-256 of its bytes; we hold it from now on."""
        unsigned = Mean(
            run=self._run,
            round=self._round,
            roster=self.roster_digest,
            part=self.own_part,
            shares=bytes(shares),
            digest=digest,
            signature=bytes(64),
        )
        signature = self._identity.sign(MEAN_DOMAIN, unsigned.statement())
        self._means[self.own_part] = unsigned.model_copy(update={"signature": signature})
        self.hold(self.own_part)
        return self._means[self.own_part]

    def hear(self, mean: Mean, *, teller: PeerId) -> None:
        """Take a signed mean, from its owner or in an echo.

        Raises:
            ProtocolError: it is not of this group or not signed by the part's owner (blamed on the teller), or the owner has
                signed another one before (blamed on the owner, and the part is dropped).
        """
        if (mean.run, mean.round, mean.roster) != (self._run, self._round, self.roster_digest):
            raise ProtocolError("mean of another group", peer=teller)
        if mean.part >= len(self._roster) or len(mean.shares) != len(self._roster):
            raise ProtocolError("mean of an impossible part", peer=teller)
        if self._means.get(mean.part) == mean:
            return  # checked before; in an echo nearly all are
        owner = self._roster[mean.part]
        if not verify(owner, MEAN_DOMAIN, mean.statement(), mean.signature):
            raise ProtocolError("forged mean", peer=teller)
        known = self._means.setdefault(mean.part, mean)
        if known.statement() != mean.statement() and mean.part not in self._spoilt:
            self.spoil(mean.part, "its owner told two stories")
            raise ProtocolError("two different means for one part", peer=owner)

    def check(self, part: int, digest: bytes, *, teller: PeerId) -> None:
        """Compare the digest of received bytes with the signed one.

        Raises:
            ProtocolError: they differ.
        """
        if digest != self._means[part].digest:
            raise ProtocolError("mean does not match its digest", peer=teller)

    def hold(self, part: int) -> None:
        """The bytes of the part's mean are here and good."""
        self._held.add(part)

    def spoil(self, part: int, reason: str) -> None:
        """The part's mean is not to be used, whoever has it."""
        self._spoilt[part] = reason

    def hear_echo(self, echo: Echo, *, teller: PeerId) -> list[PeerId]:
        """Take a member's echo.

        Returns:
            Owners convicted by it.

        Raises:
            ProtocolError: the echo itself breaks a rule.
        """
        parts = [mean.part for mean in echo.means]
        if len(set(parts)) != len(parts):
            raise ProtocolError("echo names a part twice", peer=teller)
        convicted = []
        for mean in echo.means:
            try:
                self.hear(mean, teller=teller)
            except ProtocolError as error:
                if error.peer is None or error.peer == teller:
                    raise
                convicted.append(error.peer)
            self._donors.setdefault(mean.part, []).append(teller)
        return convicted

    # ---- what follows ----

    def holds(self, part: int) -> bool:
        """Whether the bytes of the part's mean are here."""
        return part in self._held

    @property
    def others(self) -> Roster:
        """The group without us."""
        return tuple(peer for peer in self._roster if peer != self._identity.peer_id)

    @property
    def is_complete(self) -> bool:
        """Whether every part is held."""
        return len(self._held) == len(self._roster)

    def echo(self) -> Echo:
        """Our echo."""
        return Echo(means=[self._means[part] for part in sorted(self._held)])

    def wants(self, donors: set[PeerId]) -> dict[PeerId, list[int]]:
        """Whom to ask for which parts that we lack; every part once, spread over those who hold it and are still here."""
        asked: dict[PeerId, list[int]] = {}
        for part in range(len(self._roster)):
            holders = [peer for peer in self._donors.get(part, ()) if peer in donors]
            if holders and part not in self._held and part not in self._spoilt:
                asked.setdefault(sorted(holders)[(self.own_part + part) % len(holders)], []).append(part)
        return asked

    def accepts(self, part: int) -> bool:
        """Whether the part's mean counts: held, not spoilt, and, if it is ours, held by somebody else too."""
        known = part != self.own_part or bool(self._donors.get(part))
        return part in self._held and part not in self._spoilt and known

    def reason(self, part: int) -> str:
        """Why the part does not count."""
        assert not self.accepts(part)
        if part in self._spoilt:
            return self._spoilt[part]
        return "nobody else holds it" if part in self._held else "its mean did not arrive"

    def contributors(self) -> set[PeerId]:
        """Members whose Δ is in at least one accepted part."""
        return self._with_share(Share.COUNTED, Share.CLIPPED)

    def not_finite(self) -> set[PeerId]:
        """Members of whose Δ at least one accepted part was not finite."""
        return self._with_share(Share.NOT_FINITE)

    def _with_share(self, *kinds: int) -> set[PeerId]:
        return {
            member
            for part, mean in self._means.items()
            if self.accepts(part)
            for member, share in zip(self._roster, mean.shares, strict=True)
            if share in kinds
        }
