"""One two-phase exchange between two peers, as a state machine without I/O.

Neither side may use the other's update before both are known to hold both: a one-sided average would shift the swarm's mean.
So each side first verifies the whole payload against the partner's signed Offer, says so in a signed Ack, and only the
partner's own Ack turns the exchange COMMITTED. Until then the payload is a candidate in a side buffer, thrown away on any
failure. What no protocol over a failing link can rule out is that the very last Ack is lost: then one side has committed and
the other goes on alone. That window is one message long, and each single peer is still wholly before or wholly after.

The driver (averaging/swap.py, or a test) moves bytes; every message in or out is one call here and one row of TRANSITIONS.
A remote message that has no row, or that lies, raises ProtocolError and ends the exchange; a local call out of order is a
bug and raises AssertionError.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from averaging.exchange_messages import NONCE_BYTES, Ack, Answer, Offer, Propose, RejectReason
from protocol.errors import ProtocolError
from protocol.identity import Identity, verify
from protocol.ids import PeerId, RunId

__all__ = ["TERMINAL", "TRANSITIONS", "Event", "Exchange", "Progress", "State", "Terms"]

_OFFER_DOMAIN = "exchange-offer"
_ACK_DOMAIN = "exchange-ack"


class State(Enum):
    """Where one side stands."""

    NEW = "new"
    PROPOSED = "proposed"  # our Propose is out
    HELD = "held"  # their Propose is in, not answered yet
    ACCEPTED = "accepted"  # the pair stands
    OFFERED = "offered"  # our Offer is out
    TRANSFER = "transfer"  # both Offers are known and valid
    VERIFIED = "verified"  # we hold their payload, and it is what they signed
    ACKED = "acked"  # our Ack is out: they may commit now
    COMMITTED = "committed"  # their Ack is in: we may use the payload
    REJECTED = "rejected"
    LOST = "lost"  # stream, deadline or a violation


class Event(Enum):
    """What can happen."""

    SEND_PROPOSE = "send propose"
    RECEIVE_PROPOSE = "receive propose"
    SEND_ACCEPT = "send accept"
    RECEIVE_ACCEPT = "receive accept"
    SEND_REJECT = "send reject"
    RECEIVE_REJECT = "receive reject"
    SEND_OFFER = "send offer"
    RECEIVE_OFFER = "receive offer"
    RECEIVE_PAYLOAD = "receive payload"
    SEND_ACK = "send ack"
    RECEIVE_ACK = "receive ack"
    LOSE = "lose"


TERMINAL = frozenset({State.COMMITTED, State.REJECTED, State.LOST})

TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.NEW, Event.SEND_PROPOSE): State.PROPOSED,
    (State.NEW, Event.RECEIVE_PROPOSE): State.HELD,
    (State.PROPOSED, Event.RECEIVE_ACCEPT): State.ACCEPTED,
    (State.PROPOSED, Event.RECEIVE_REJECT): State.REJECTED,
    (State.HELD, Event.SEND_ACCEPT): State.ACCEPTED,
    (State.HELD, Event.SEND_REJECT): State.REJECTED,
    (State.ACCEPTED, Event.SEND_OFFER): State.OFFERED,
    (State.OFFERED, Event.RECEIVE_OFFER): State.TRANSFER,
    (State.TRANSFER, Event.RECEIVE_PAYLOAD): State.VERIFIED,
    (State.VERIFIED, Event.SEND_ACK): State.ACKED,
    (State.ACKED, Event.RECEIVE_ACK): State.COMMITTED,
    **{(state, Event.LOSE): State.LOST for state in State if state not in TERMINAL},
}
"""Everything that is allowed. A pair that is missing here is a violation (remote) or a bug (local)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What both sides know beforehand, from the run's manifest.

    Args:
        run: the run.
        payload_bytes: round → exact length of its payload (Δ and φ together); the same for all rounds that may meet.
        max_lag_rounds: largest difference of the two rounds.
    """

    run: RunId
    payload_bytes: Callable[[int], int]
    max_lag_rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Our update as the Offer describes it; the same for every partner of the round, or we would equivocate."""

    round: int
    tokens: int
    delta_digest: bytes
    base_digest: bytes


class Exchange:
    """One side of one exchange.

    Args:
        terms: what the manifest fixes.
        identity: signs our Offer and Ack.
        partner: the authenticated other end of the stream.
    """

    def __init__(self, *, terms: Terms, identity: Identity, partner: PeerId) -> None:
        self.state = State.NEW
        self.partner = partner
        self._terms = terms
        self._identity = identity
        self._nonce = os.urandom(NONCE_BYTES)
        self._partner_nonce = b""
        self._progress: Progress | None = None
        self._partner_round = 0
        self._expected_round = 0
        self._our_offer: Offer | None = None
        self._their_offer: Offer | None = None

    # ---- phase 0: becoming a pair ----

    def propose(self, progress: Progress, expected_round: int) -> Propose:
        """Open the exchange as proposer, with the round in which we believe the partner to be."""
        self._step(Event.SEND_PROPOSE)
        self._progress, self._expected_round = progress, expected_round
        return Propose(run=self._terms.run, round=progress.round, expected_round=expected_round, nonce=self._nonce)

    def receive_propose(self, message: Propose) -> None:
        """Take the partner's proposal; it may stay unanswered for as long as both like.

        A proposal of another run is not a violation (a stale address book makes them): the driver answers "wrong-run".
        """
        self._allow(Event.RECEIVE_PROPOSE)
        self._partner_nonce, self._partner_round = message.nonce, message.round
        self._step(Event.RECEIVE_PROPOSE)

    def accept(self, progress: Progress) -> Answer:
        """Agree to the held proposal."""
        assert abs(progress.round - self._partner_round) <= self._terms.max_lag_rounds
        self._step(Event.SEND_ACCEPT)
        self._progress = progress
        return Answer(accepted=True, reason=None, round=progress.round, nonce=self._nonce)

    def reject(self, reason: RejectReason, round: int) -> Answer:
        """Turn the held proposal down; `round` is the one in which we could next pair."""
        self._step(Event.SEND_REJECT)
        return Answer(accepted=False, reason=reason, round=round, nonce=self._nonce)

    def receive_answer(self, message: Answer) -> bool:
        """Take the answer to our proposal.

        Returns:
            Whether the partner accepted.

        Raises:
            ProtocolError: out of order, contradictory, or an acceptance in a round that we did not propose.
        """
        event = Event.RECEIVE_ACCEPT if message.accepted else Event.RECEIVE_REJECT
        self._allow(event)
        self._demand(message.accepted == (message.reason is None), "answer with a reason that contradicts it")
        if message.accepted:
            self._demand(message.round == self._expected_round, "accepted in another round than proposed")
            self._partner_nonce, self._partner_round = message.nonce, message.round
        self._step(event)
        return message.accepted

    # ---- phase 1: offer, payload, receipt ----

    def offer(self) -> Offer:
        """Our signed description of what we are about to send."""
        self._step(Event.SEND_OFFER)
        assert self._progress is not None
        unsigned = Offer(
            run=self._terms.run,
            round=self._progress.round,
            sender=self._identity.peer_id,
            receiver=self.partner,
            sender_nonce=self._nonce,
            receiver_nonce=self._partner_nonce,
            tokens=self._progress.tokens,
            num_bytes=self._num_bytes(),
            delta_digest=self._progress.delta_digest,
            base_digest=self._progress.base_digest,
            signature=bytes(64),
        )
        signature = self._identity.sign(_OFFER_DOMAIN, unsigned.statement())
        self._our_offer = unsigned.model_copy(update={"signature": signature})
        return self._our_offer

    def receive_offer(self, message: Offer) -> None:
        """Check everything the partner claims before the first byte of its payload is read.

        Raises:
            ProtocolError: out of order, replayed, for somebody else, of another run, round or size, or badly signed.
        """
        self._allow(Event.RECEIVE_OFFER)
        assert self._progress is not None
        lag = abs(message.round - self._progress.round)
        self._demand(message.run == self._terms.run, "offer of another run")
        self._demand(message.sender == self.partner, "offer in another peer's name")
        self._demand(message.receiver == self._identity.peer_id, "offer made out to another peer")
        self._demand(message.sender_nonce == self._partner_nonce, "offer from another exchange")
        self._demand(message.receiver_nonce == self._nonce, "replayed offer")
        self._demand(message.round == self._partner_round, "offer of another round than agreed")
        self._demand(lag <= self._terms.max_lag_rounds, "offer outside the window of rounds")
        self._demand(message.num_bytes == self._num_bytes(), "offer of a wrong length")
        signed = verify(self.partner, _OFFER_DOMAIN, message.statement(), message.signature)
        self._demand(signed, "offer with a bad signature")
        self._their_offer = message
        self._step(Event.RECEIVE_OFFER)

    def receive_payload(self, *, num_bytes: int, delta_digest: bytes, base_digest: bytes) -> None:
        """Check what arrived, by its length and digests, against the partner's offer.

        Raises:
            ProtocolError: it is not what was signed.
        """
        self._allow(Event.RECEIVE_PAYLOAD)
        assert self._their_offer is not None
        self._demand(num_bytes == self._num_bytes(), "payload of a wrong length")
        self._demand(delta_digest == self._their_offer.delta_digest, "delta does not match its offer")
        self._demand(base_digest == self._their_offer.base_digest, "slow weights do not match their offer")
        self._step(Event.RECEIVE_PAYLOAD)

    def ack(self) -> Ack:
        """Our receipt. From here on the partner may commit, so only a failure may still stop us."""
        self._step(Event.SEND_ACK)
        assert self._their_offer is not None
        offer_hash = self._their_offer.statement_hash()
        return Ack(offer_hash=offer_hash, signature=self._identity.sign(_ACK_DOMAIN, offer_hash))

    def receive_ack(self, message: Ack) -> None:
        """The partner's receipt: the exchange is committed.

        Raises:
            ProtocolError: out of order, a receipt for something else, or badly signed.
        """
        self._allow(Event.RECEIVE_ACK)
        assert self._our_offer is not None
        self._demand(message.offer_hash == self._our_offer.statement_hash(), "receipt for something else")
        self._demand(verify(self.partner, _ACK_DOMAIN, message.offer_hash, message.signature), "forged receipt")
        self._step(Event.RECEIVE_ACK)

    # ---- endings ----

    def lose(self) -> None:
        """Stream gone, deadline passed or the driver gave up. Does nothing once the exchange has ended."""
        if self.state not in TERMINAL:
            self._step(Event.LOSE)

    @property
    def committed(self) -> bool:
        """Whether the partner's payload may be used. Never true before both sides hold both payloads."""
        return self.state is State.COMMITTED

    @property
    def partner_round(self) -> int:
        """The partner's round, as agreed on."""
        return self._partner_round

    @property
    def partner_tokens(self) -> int:
        """The partner's claim of tokens behind its Δ."""
        assert self._their_offer is not None
        return self._their_offer.tokens

    @property
    def partner_base_digest(self) -> bytes:
        """Of the partner's φ, as its Offer says."""
        assert self._their_offer is not None
        return self._their_offer.base_digest

    def _num_bytes(self) -> int:
        assert self._progress is not None
        return self._terms.payload_bytes(self._progress.round)

    def _step(self, event: Event) -> None:
        assert (self.state, event) in TRANSITIONS, f"local bug: {event.value} in state {self.state.value}"
        self.state = TRANSITIONS[self.state, event]

    def _allow(self, event: Event) -> None:
        self._demand((self.state, event) in TRANSITIONS, f"{event.value} in state {self.state.value}")

    def _demand(self, holds: bool, violation: str) -> None:
        if not holds:
            self.lose()
            raise ProtocolError(violation, peer=self.partner)
