"""Two honest sides of one exchange, without a network, for the tests of the state machine."""

from __future__ import annotations

from averaging.exchange import Exchange, Progress, Terms
from averaging.exchange_messages import payload_hash
from protocol.identity import Identity
from protocol.ids import RunId

__all__ = ["ALICE", "BOB", "MALLORY", "TERMS", "Duo", "feed", "progress_of"]

TERMS = Terms(run=RunId("ab" * 32), payload_bytes=lambda round: 8, max_lag_rounds=1)
ALICE = Identity.generate(b"a" * 32)
BOB = Identity.generate(b"b" * 32)
MALLORY = Identity.generate(b"m" * 32)


def progress_of(payload: bytes, *, round: int = 5, tokens: int = 100) -> Progress:
    return Progress(
        round=round,
        tokens=tokens,
        delta_digest=payload_hash(payload[:6]).digest(),
        base_digest=payload_hash(payload[6:]).digest(),
    )


def feed(exchange: Exchange, payload: bytes) -> None:
    exchange.receive_payload(
        num_bytes=len(payload),
        delta_digest=payload_hash(payload[:6]).digest(),
        base_digest=payload_hash(payload[6:]).digest(),
    )


class Duo:
    """Alice proposes to Bob; helpers bring both to any state."""

    PAYLOAD_A, PAYLOAD_B = b"alice's1", b"bob's 22"

    def __init__(self) -> None:
        self.alice = Exchange(terms=TERMS, identity=ALICE, partner=BOB.peer_id)
        self.bob = Exchange(terms=TERMS, identity=BOB, partner=ALICE.peer_id)
        self.progress_a, self.progress_b = progress_of(self.PAYLOAD_A), progress_of(self.PAYLOAD_B)
        self.propose = self.alice.propose(self.progress_a, 5)
        self.bob.receive_propose(self.propose)
        self.answer = self.bob.accept(self.progress_b)
        self.alice.receive_answer(self.answer)

    def to_offered(self) -> Duo:
        self.offer_a, self.offer_b = self.alice.offer(), self.bob.offer()
        return self

    def to_transfer(self) -> Duo:
        self.to_offered()
        self.alice.receive_offer(self.offer_b)
        self.bob.receive_offer(self.offer_a)
        return self

    def to_acked(self) -> Duo:
        self.to_transfer()
        feed(self.alice, self.PAYLOAD_B)
        feed(self.bob, self.PAYLOAD_A)
        self.ack_a, self.ack_b = self.alice.ack(), self.bob.ack()
        return self
