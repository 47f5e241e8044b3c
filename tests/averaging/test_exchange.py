"""The two-phase exchange without streams: the whole table, every lie, and every order a hostile network could produce."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from averaging.exchange import TERMINAL, TRANSITIONS, Event, Exchange, State
from averaging.exchange_messages import Answer, Offer
from protocol.errors import ProtocolError
from tests.averaging.duo import ALICE, BOB, MALLORY, TERMS, Duo, feed, progress_of


def drive(state: State) -> tuple[Exchange, Duo]:
    """Alice's machine in `state`, with a Duo that has every message at hand."""
    complete = Duo().to_acked()
    alice = Exchange(terms=TERMS, identity=ALICE, partner=BOB.peer_id)
    match state:
        case State.NEW:
            return alice, complete
        case State.PROPOSED:
            alice.propose(complete.progress_a, 5)
            return alice, complete
        case State.HELD | State.REJECTED:
            alice.receive_propose(complete.propose)
            if state is State.REJECTED:
                alice.reject("matched", 6)
            return alice, complete
        case State.LOST:
            alice.lose()
            return alice, complete
        case State.ACCEPTED:
            return Duo().alice, complete
        case State.OFFERED:
            duo = Duo().to_offered()
        case State.TRANSFER | State.VERIFIED:
            duo = Duo().to_transfer()
            if state is State.VERIFIED:
                feed(duo.alice, duo.PAYLOAD_B)
        case State.ACKED | State.COMMITTED:
            duo = Duo().to_acked()
            if state is State.COMMITTED:
                duo.alice.receive_ack(duo.ack_b)
    return duo.alice, duo if state not in (State.OFFERED, State.TRANSFER, State.VERIFIED) else complete


def act(exchange: Exchange, event: Event, duo: Duo) -> object:
    calls: dict[Event, Callable[[], object]] = {
        Event.SEND_PROPOSE: lambda: exchange.propose(duo.progress_a, 5),
        Event.RECEIVE_PROPOSE: lambda: exchange.receive_propose(duo.propose),
        Event.SEND_ACCEPT: lambda: exchange.accept(progress_of(b"12345678", round=exchange.partner_round)),
        Event.RECEIVE_ACCEPT: lambda: exchange.receive_answer(duo.answer),
        Event.SEND_REJECT: lambda: exchange.reject("busy", 6),
        Event.RECEIVE_REJECT: lambda: exchange.receive_answer(
            Answer(accepted=False, reason="busy", round=6, nonce=bytes(16))
        ),
        Event.SEND_OFFER: exchange.offer,
        Event.RECEIVE_OFFER: lambda: exchange.receive_offer(duo.offer_b),
        Event.RECEIVE_PAYLOAD: lambda: feed(exchange, duo.PAYLOAD_B),
        Event.SEND_ACK: exchange.ack,
        Event.RECEIVE_ACK: lambda: exchange.receive_ack(duo.ack_b),
        Event.LOSE: exchange.lose,
    }
    return calls[event]()


class TestTable:
    FORBIDDEN = sorted(
        frozenset(itertools.product(State, frozenset(Event) - {Event.LOSE})) - frozenset(TRANSITIONS), key=str
    )

    @pytest.mark.parametrize("state", State)
    def test_every_state_can_be_reached(self, state: State) -> None:
        assert drive(state)[0].state is state

    @pytest.mark.parametrize(("state", "event"), FORBIDDEN)
    def test_what_is_not_listed_is_refused(self, state: State, event: Event) -> None:
        exchange, duo = drive(state)
        is_remote = event.value.startswith("receive")
        with pytest.raises(ProtocolError if is_remote else AssertionError) as caught:
            act(exchange, event, duo)
        if isinstance(caught.value, ProtocolError):
            assert caught.value.peer == BOB.peer_id
        ends = is_remote and state not in TERMINAL
        assert exchange.state is (State.LOST if ends else state), "a late message never undoes a commit"

    @pytest.mark.parametrize(("state", "event"), sorted(TRANSITIONS, key=str))
    def test_what_is_listed_is_done(self, state: State, event: Event) -> None:
        exchange, duo = drive(state)
        if event is Event.RECEIVE_OFFER:
            duo = Duo().to_offered()
            exchange, duo.alice = duo.alice, exchange
        elif event in (Event.RECEIVE_PAYLOAD, Event.RECEIVE_ACK):
            duo = Duo().to_transfer() if event is Event.RECEIVE_PAYLOAD else Duo().to_acked()
            exchange = duo.alice
        assert exchange.state is state
        act(exchange, event, duo)
        assert exchange.state is TRANSITIONS[state, event]

    @pytest.mark.parametrize("state", State)
    def test_losing_ends_everything_but_what_has_ended(self, state: State) -> None:
        exchange, _ = drive(state)
        exchange.lose()
        assert exchange.state is (state if state in TERMINAL else State.LOST)

    def test_the_only_way_to_commit_is_the_partners_receipt_after_ours(self) -> None:
        ways = [key for key, target in TRANSITIONS.items() if target is State.COMMITTED]
        assert ways == [(State.ACKED, Event.RECEIVE_ACK)]
        assert [key for key, target in TRANSITIONS.items() if target is State.ACKED] == [
            (State.VERIFIED, Event.SEND_ACK)
        ]


class TestHonestPair:
    def test_both_commit_and_know_the_partner(self) -> None:
        duo = Duo().to_acked()
        assert duo.alice.state is State.ACKED
        duo.alice.receive_ack(duo.ack_b)
        duo.bob.receive_ack(duo.ack_a)
        assert duo.alice.committed
        assert duo.bob.committed
        assert (duo.alice.partner_round, duo.alice.partner_tokens) == (5, 100)

    def test_rejection_carries_reason_and_round(self) -> None:
        duo = Duo()
        alice = Exchange(terms=TERMS, identity=ALICE, partner=BOB.peer_id)
        bob = Exchange(terms=TERMS, identity=BOB, partner=ALICE.peer_id)
        bob.receive_propose(alice.propose(duo.progress_a, 5))
        answer = bob.reject("matched", 6)
        assert alice.receive_answer(answer) is False
        assert (answer.reason, answer.round) == ("matched", 6)
        assert alice.state is bob.state is State.REJECTED


def resigned(offer: Offer, **changes: object) -> Offer:
    """Bob signs whatever he likes."""
    changed = offer.model_copy(update=changes)
    return changed.model_copy(update={"signature": BOB.sign("exchange-offer", changed.statement())})


class TestLies:
    @pytest.mark.parametrize(
        "changes",
        [
            {"run": "cd" * 32},
            {"sender": MALLORY.peer_id},
            {"receiver": MALLORY.peer_id},
            {"sender_nonce": bytes(16)},
            {"receiver_nonce": bytes(16)},
            {"round": 6},
            {"round": 1},
            {"num_bytes": 7},
        ],
        ids=str,
    )
    def test_a_well_signed_offer_that_does_not_fit_is_refused(self, changes: dict[str, object]) -> None:
        duo = Duo().to_offered()
        with pytest.raises(ProtocolError):
            duo.alice.receive_offer(resigned(duo.offer_b, **changes))
        assert duo.alice.state is State.LOST

    @pytest.mark.parametrize("field", sorted(set(Offer.model_fields) - {"kind"}))
    def test_any_change_after_signing_is_refused(self, field: str) -> None:
        duo = Duo().to_offered()
        value = getattr(duo.offer_b, field)
        match value:
            case bytes():
                changed: object = value[:-1] + bytes([value[-1] ^ 1])
            case int():
                changed = value + 1
            case _:
                changed = MALLORY.peer_id if field != "run" else "cd" * 32
        with pytest.raises(ProtocolError):
            duo.alice.receive_offer(duo.offer_b.model_copy(update={field: changed}))

    def test_an_offer_signed_by_somebody_else_is_refused(self) -> None:
        duo = Duo().to_offered()
        forged = duo.offer_b.model_copy(update={"signature": MALLORY.sign("exchange-offer", duo.offer_b.statement())})
        with pytest.raises(ProtocolError, match="signature"):
            duo.alice.receive_offer(forged)

    def test_an_offer_of_an_earlier_exchange_is_worthless(self) -> None:
        earlier, now = Duo().to_offered(), Duo().to_offered()
        with pytest.raises(ProtocolError, match="another exchange"):
            now.alice.receive_offer(earlier.offer_b)

    def test_our_own_offer_sent_back_is_refused(self) -> None:
        duo = Duo().to_offered()
        with pytest.raises(ProtocolError):
            duo.alice.receive_offer(duo.offer_a)

    @pytest.mark.parametrize("payload", [b"bob's 23", b"xob's 22", b"bob's 2", b"bob's 222", b""])
    def test_another_payload_than_signed_is_refused(self, payload: bytes) -> None:
        duo = Duo().to_transfer()
        with pytest.raises(ProtocolError):
            feed(duo.alice, payload)
        assert not duo.alice.committed

    def test_receipts_must_be_for_our_offer_and_signed_by_the_partner(self) -> None:
        for forge in (
            lambda duo: duo.ack_a,
            lambda duo: Duo().to_acked().ack_b,
            lambda duo: duo.ack_b.model_copy(update={"signature": bytes(64)}),
            lambda duo: duo.ack_b.model_copy(update={"signature": MALLORY.sign("exchange-ack", duo.ack_b.offer_hash)}),
            lambda duo: duo.ack_b.model_copy(update={"signature": BOB.sign("exchange-offer", duo.ack_b.offer_hash)}),
        ):
            duo = Duo().to_acked()
            with pytest.raises(ProtocolError):
                duo.alice.receive_ack(forge(duo))
            assert duo.alice.state is State.LOST

    def test_acceptance_for_another_round_or_with_a_reason_is_refused(self) -> None:
        for update in ({"round": 6}, {"reason": "busy"}, {"accepted": False}):
            duo = Duo()
            alice = Exchange(terms=TERMS, identity=ALICE, partner=BOB.peer_id)
            alice.propose(duo.progress_a, 5)
            with pytest.raises(ProtocolError):
                alice.receive_answer(duo.answer.model_copy(update=update))

    def test_equivocation_leaves_two_signed_statements(self) -> None:
        first, second = Duo().to_offered(), Duo()
        second.progress_b = progress_of(b"bob's 33")
        second.bob._progress = second.progress_b
        second.to_offered()
        assert first.offer_b.round == second.offer_b.round
        assert first.offer_b.delta_digest != second.offer_b.delta_digest or (
            first.offer_b.base_digest != second.offer_b.base_digest
        )
