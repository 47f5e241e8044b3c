"""The messages of `/llm-node/allreduce/1`. One stream per pair of members, opened by the smaller id; both say the same things.

    Hello    ◄──►    "my round, my tokens, my bytes"; instead of it, the opened side may refuse
    Ballot   ◄──►    one or more: "the group that I see"
    Part     ◄──►    the agreed group's digest, then as bulk: my Δ's part that you own
    Mean     ◄──►    signed: the mean of my part, then as bulk: that mean
    Echo     ◄──►    every signed Mean that I hold, so that an owner who told two stories is found out
    Want      ──►    only from a side whose Echo was incomplete: parts that you hold and I lack; you answer with them as bulk

Frames and bulk are those of `protocol.wire`. All lengths follow from the manifest, the codec and the agreed group. Shape only is
checked here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, RootModel

from protocol.wire import Message, pack

__all__ = [
    "MAX_BALLOTS",
    "MAX_MEMBERS",
    "Ballot",
    "Echo",
    "Hello",
    "Mean",
    "Part",
    "Refusal",
    "Share",
    "Vote",
    "Want",
]

MAX_MEMBERS = 64
"""Largest group: a stream and a part per member, and an Echo must fit a message."""
MAX_BALLOTS = 3
"""Attempts to agree on the group."""

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PeerIdText = Annotated[str, Field(pattern=r"^12D3KooW[1-9A-HJ-NP-Za-km-z]{44}$")]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Digest = Annotated[bytes, Field(min_length=32, max_length=32)]
Signature = Annotated[bytes, Field(min_length=64, max_length=64)]
PartIndex = Annotated[int, Field(ge=0, lt=MAX_MEMBERS)]

Refusal = Literal["wrong-run", "passed", "late", "unknown", "full"]
"""wrong-run: I train another run. passed: your round is behind me. late: my group of this round has formed without you. unknown:
you are not among my candidates. full: I hold too many callers."""


class Hello(Message):
    """Who calls, and with what."""

    kind: Literal["hello"] = "hello"
    run: Hash
    round: Count
    tokens: Count
    num_bytes: Count
    """Length of the whole encoded Δ."""
    norm: Annotated[float, Field(ge=0.0)]
    """‖Δ‖ as encoded. A claim; only the median of all claims is used."""
    refusal: Refusal | None = None


class Ballot(Message):
    """The group as its sender would have it."""

    kind: Literal["ballot"] = "ballot"
    number: Annotated[int, Field(ge=0, lt=MAX_BALLOTS)]
    members: Annotated[list[PeerIdText], Field(min_length=1, max_length=MAX_MEMBERS)]
    """Sorted, the sender among them."""


class Part(Message):
    """The sender has settled on a group; its Δ for the receiver's part follows."""

    kind: Literal["part"] = "part"
    roster: Digest


class Vote(RootModel[Annotated[Ballot | Part, Field(discriminator="kind")]]):
    """What may come while the group forms: one more Ballot, or the end of voting."""


class Share:
    """What a part owner did with one member's Δ: a byte of `Mean.shares`."""

    ABSENT = 0
    COUNTED = 1
    CLIPPED = 2
    NOT_FINITE = 3


class Mean(Message):
    """A part owner's signed word on its part. Two of one owner and round with different digests are a portable proof of
    equivocation."""

    kind: Literal["mean"] = "mean"
    run: Hash
    round: Count
    roster: Digest
    part: PartIndex
    """Index in the roster of the part and of its owner."""
    shares: Annotated[bytes, Field(min_length=1, max_length=MAX_MEMBERS)]
    """One byte per member, see `Share`."""
    digest: Digest
    """SHA-256 of the encoded mean."""
    signature: Signature

    def statement(self) -> bytes:
        """The bytes that are signed: every field but the signature, in the order above."""
        return pack(self.model_dump(exclude={"signature"}))


class Echo(Message):
    """All Means whose bytes the sender holds, its own among them."""

    kind: Literal["echo"] = "echo"
    means: Annotated[list[Mean], Field(max_length=MAX_MEMBERS)]


class Want(Message):
    """Parts that the sender lacks and the receiver's Echo names; may be empty."""

    kind: Literal["want"] = "want"
    parts: Annotated[list[PartIndex], Field(max_length=MAX_MEMBERS)]
