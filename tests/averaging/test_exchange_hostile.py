"""The exchange under every order of delivery, replay, loss and crash that hypothesis can think of."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pydantic import BaseModel

from averaging.exchange import TERMINAL, Exchange
from averaging.exchange_messages import Ack, Answer, Offer, Propose
from protocol.errors import ProtocolError
from tests.averaging.duo import ALICE, BOB, TERMS, Duo, feed, progress_of


class HostileNetwork(RuleBasedStateMachine):
    """Two honest peers, one network that reorders, replays, drops and cuts, and peers that crash.

    Whatever it does, each peer is wholly before (its own φ) or wholly after (averaged with exactly the partner's payload), and
    nobody is after unless the other one holds its payload, verified.
    """

    def __init__(self) -> None:
        super().__init__()
        self.payload = {"alice": Duo.PAYLOAD_A, "bob": Duo.PAYLOAD_B}
        self.machines: dict[str, Exchange] = {}
        self.side_buffer: dict[str, bytes] = {}
        self.averaged_with: dict[str, bytes] = {}
        self.has_verified: set[str] = set()
        self.wire: dict[str, list[BaseModel | bytes]] = {"alice": [], "bob": []}
        self.history: list[BaseModel | bytes] = []

    @initialize(round_a=st.integers(4, 6))
    def begin(self, round_a: int) -> None:
        self.machines = {
            "alice": Exchange(terms=TERMS, identity=ALICE, partner=BOB.peer_id),
            "bob": Exchange(terms=TERMS, identity=BOB, partner=ALICE.peer_id),
        }
        self.progress = {
            "alice": progress_of(self.payload["alice"], round=round_a),
            "bob": progress_of(self.payload["bob"]),
        }
        self.send("bob", self.machines["alice"].propose(self.progress["alice"], 5))

    def send(self, to: str, message: BaseModel | bytes) -> None:
        self.wire[to].append(message)
        self.history.append(message)

    def deliver(self, to: str, message: BaseModel | bytes) -> None:
        machine, other = self.machines[to], "bob" if to == "alice" else "alice"
        try:
            match message:
                case Propose():
                    machine.receive_propose(message)
                    self.send(other, machine.accept(self.progress[to]))
                    self.send(other, machine.offer())
                case Answer():
                    machine.receive_answer(message)
                    self.send(other, machine.offer())
                case Offer():
                    machine.receive_offer(message)
                    self.send(other, self.payload[to])
                case bytes():
                    feed(machine, message)
                    self.side_buffer[to] = message
                    self.has_verified.add(to)
                    self.send(other, machine.ack())
                case Ack():
                    machine.receive_ack(message)
                    self.averaged_with[to] = self.side_buffer[to]
        except ProtocolError:
            assert machine.state in TERMINAL

    @precondition(lambda self: any(self.wire.values()))
    @rule(data=st.data(), num_messages=st.integers(1, 12))
    def deliver_in_order(self, data: st.DataObject, num_messages: int) -> None:
        for _ in range(num_messages):
            if queues := [name for name, queue in self.wire.items() if queue]:
                to = data.draw(st.sampled_from(queues))
                self.deliver(to, self.wire[to].pop(0))
                self.before_or_after_never_mixed()

    @precondition(lambda self: any(len(queue) > 1 for queue in self.wire.values()))
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        to = data.draw(st.sampled_from([name for name, queue in self.wire.items() if len(queue) > 1]))
        self.wire[to].append(self.wire[to].pop(0))

    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        self.deliver(data.draw(st.sampled_from(["alice", "bob"])), data.draw(st.sampled_from(self.history)))

    @precondition(lambda self: len(self.history) > 5 and any(self.wire.values()))
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        to = data.draw(st.sampled_from([name for name, queue in self.wire.items() if queue]))
        self.wire[to].pop(0)

    @precondition(lambda self: len(self.history) > 5)
    @rule(name=st.sampled_from(["alice", "bob"]))
    def crash(self, name: str) -> None:
        other = "bob" if name == "alice" else "alice"
        self.machines[name].lose()
        self.side_buffer.pop(name, None)
        self.wire[name].clear()
        if not self.wire[other]:
            self.machines[other].lose()

    @invariant()
    def before_or_after_never_mixed(self) -> None:
        for name, machine in self.machines.items():
            other = "bob" if name == "alice" else "alice"
            assert machine.committed == (name in self.averaged_with)
            if machine.committed:
                assert self.averaged_with[name] == self.payload[other]
                assert {name, other} <= self.has_verified, "one-sided: the partner does not hold our payload"


TestHostileNetwork = HostileNetwork.TestCase
TestHostileNetwork.settings = settings(
    max_examples=150, stateful_step_count=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
