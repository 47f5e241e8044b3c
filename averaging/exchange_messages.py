"""The headers of `/llm-node/exchange/1`, in the order in which they travel. Each is one msgpack map in one frame.

    proposer                                   candidate
    Propose  ───────────────────────────────►            "my round is r, I believe yours is e"
             ◄───────────────────────────────  Answer    accepted, or not and why
    Offer    ◄──────────────────────────────►  Offer     signed: what I am about to send
    Holding  ◄──────────────────────────────►  Holding   only in runs with sync.early_slow: whether φ came ahead
    payload  ◄──────────────────────────────►  payload   raw bytes: Δ then φ, lengths known from the manifest
    Ack      ◄──────────────────────────────►  Ack       signed: I hold exactly what you offered

Shape only is checked here; meaning is checked by `averaging.exchange`, which alone knows what may come next.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

from blake3 import blake3
from pydantic import Field

from protocol.wire import Message, pack

__all__ = [
    "NONCE_BYTES",
    "Ack",
    "Answer",
    "Count",
    "Hash",
    "Holding",
    "Offer",
    "Propose",
    "RejectReason",
    "payload_hash",
]

NONCE_BYTES = 16

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PeerIdText = Annotated[str, Field(pattern=r"^12D3KooW[1-9A-HJ-NP-Za-km-z]{44}$")]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Nonce = Annotated[bytes, Field(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Digest = Annotated[bytes, Field(min_length=32, max_length=32)]
Signature = Annotated[bytes, Field(min_length=64, max_length=64)]

RejectReason = Literal["matched", "busy", "other-round", "passed", "too-far", "unknown", "wrong-run"]
"""matched: has a partner for this round. busy: its deadline passed, or it holds too many proposals. other-round: you expected
another round of me; think again. passed: your round is behind me. too-far: our rounds differ too much. unknown: you are not
among my candidates. wrong-run: I train another run."""


def payload_hash(data: bytes | memoryview = b"") -> blake3:
    """The hash of payloads, begun with `data`: BLAKE3, of which an Offer signs the first 32 bytes.

    Every byte is hashed on both sides, so its cost counts: 6.6 GB/s on one core, where SHA-256 in hardware does 1.2 and BLAKE2b
    0.9 (2-core x86 with AVX-512; with SHA-256 hashing took as long as half the encryption).
    """
    return blake3(data)


class Propose(Message):
    """Asks for this round's partnership; the proposer then waits for the Answer and may go away at any time."""

    kind: Literal["propose"] = "propose"
    run: Hash
    round: Count
    """The proposer's round."""
    expected_round: Count
    """The round in which the proposer believes the candidate to be: both must rank their tie alike (see pairing.py)."""
    nonce: Nonce


class Answer(Message):
    """The candidate's word."""

    kind: Literal["answer"] = "answer"
    accepted: bool
    reason: RejectReason | None
    """None exactly when accepted."""
    round: Count
    """The candidate's round if it can still pair in it, else the next one in which it can."""
    nonce: Nonce


class Offer(Message):
    """The signed description of one side's payload. Two offers of one peer for one round with different digests are a
    portable proof of equivocation; the two nonces make an old offer worthless in a new exchange."""

    kind: Literal["offer"] = "offer"
    run: Hash
    round: Count
    sender: PeerIdText
    receiver: PeerIdText
    sender_nonce: Nonce
    receiver_nonce: Nonce
    tokens: Count
    num_bytes: Count
    delta_digest: Digest
    """`payload_hash` of the encoded Δ."""
    base_digest: Digest
    """`payload_hash` of the encoded φ, the base to which Δ belongs."""
    signature: Signature

    def statement(self) -> bytes:
        """The bytes that are signed: every field but the signature, in the order above."""
        return pack(self.model_dump(exclude={"signature"}))

    def statement_hash(self) -> bytes:
        """SHA-256 of the statement: what the other side's Ack signs."""
        return hashlib.sha256(self.statement()).digest()


class Holding(Message):
    """What need not be sent any more."""

    kind: Literal["holding"] = "holding"
    slow: bool
    """Whether we hold bytes with the `base_digest` of your Offer."""


class Ack(Message):
    """The receipt: the signer holds, verified, the payload of the offer with this hash."""

    kind: Literal["ack"] = "ack"
    offer_hash: Digest
    signature: Signature
