"""A plan as peers pass it on: made by one peer, signed, and checked by everybody who follows it.

A document names its members once and then its paths by their places in that list, in the order of their priorities. 64 bytes of
Ed25519 signature stand before its msgpack bytes; the planner's id stands in it, so it can be checked whoever hands it on.

A plan is followed only if it is signed by a peer whose turn it was to plan, keeps the rules of paths, begins as many
microbatches at each origin as the run says, and is, by one's own view of the swarm, not slower than a plan made offhand.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import numpy as np
from pydantic import Field

from node.pipeline.case import Case
from node.pipeline.construct import construct
from node.pipeline.live_case import MAX_MEMBERS
from node.pipeline.plan import Dispatch, Microbatch, Plan
from node.pipeline.rules import is_order
from node.pipeline.variants import expected_s
from protocol.errors import ProtocolError, UserError
from protocol.identity import SIGNATURE_BYTES, Identity, verify
from protocol.ids import PeerId, RunId
from protocol.manifest_sections import PipelineSpec
from protocol.wire import MAX_HEADER_BYTES, Message, decode_message, encode_message

__all__ = [
    "DISPATCH",
    "MAX_MEMBERS",
    "MAX_PLAN_BYTES",
    "PLAN_ITERATIONS",
    "PLAN_PROTOCOL",
    "PlanDocument",
    "SignedPlan",
    "is_slower_than_none",
    "plan_number",
    "planners",
]

PLAN_PROTOCOL = "/llm-node/plan/1"
PLAN_ITERATIONS = 16
"""There is a new plan in every stretch of so many iterations: paths change from plan to plan, so that every replica meets all
origins and patterns of skipping."""

DISPATCH: Dispatch = "backward_first"
"""How stage peers choose among waiting tasks (node/pipeline/turnstile.py)."""
MAX_PLAN_BYTES = MAX_HEADER_BYTES
NUM_PLANNERS = 3
MAX_JUDGED = 512
"""Microbatches of the largest plan that is simulated to see whether it is any good."""
TOLERANCE = 1.1
"""A plan may be so much slower than one made offhand, since views of the swarm differ."""
_DOMAIN = "plan"

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PeerIdText = Annotated[str, Field(pattern=r"^12D3KooW[1-9A-HJ-NP-Za-km-z]{44}$")]


class PlanDocument(Message):
    """One plan of a live swarm."""

    run: Hash
    number: Annotated[int, Field(ge=1, le=10**9)]
    """Which one; see `plan_number`."""
    planner: PeerIdText
    members: Annotated[list[PeerIdText], Field(min_length=1, max_length=MAX_MEMBERS)]
    """The stage peers that it counts on, sorted."""
    stages: Annotated[list[Annotated[int, Field(ge=0, lt=64)]], Field(min_length=1, max_length=MAX_MEMBERS)]
    """What each of them holds."""
    path_length: Annotated[int, Field(ge=1, le=64)]
    paths: Annotated[bytes, Field(max_length=MAX_PLAN_BYTES)]
    """Places in `members`, 16 bits each, little-endian: microbatch by microbatch, the most urgent first."""
    iteration_s: Annotated[float, Field(ge=0.0, le=1e9)]
    """What the planner expects of an iteration."""

    @classmethod
    def of(
        cls, plan: Plan, *, members: Sequence[PeerId], run: RunId, number: int, planner: PeerId, iteration_s: float
    ) -> Self:
        """The document of a plan whose nodes are `members`."""
        stage_of = {node: stage for stage, nodes in enumerate(plan.partition) for node in nodes}
        ordered = sorted(plan.microbatches, key=lambda each: each.priority)
        return cls(
            run=run,
            number=number,
            planner=planner,
            members=list(members),
            stages=[stage_of[node] for node in range(len(members))],
            path_length=len(ordered[0].path),
            paths=np.array([each.path for each in ordered], dtype="<u2").tobytes(),
            iteration_s=iteration_s,
        )

    def table(self) -> list[list[int]]:
        """Paths as places in `members`, the most urgent first.

        Raises:
            ProtocolError: bytes are left over, or a place is outside of the list.
        """
        if len(self.paths) % (2 * self.path_length):
            raise ProtocolError("plan with half a path", peer=PeerId(self.planner))
        table = np.frombuffer(self.paths, dtype="<u2").reshape(-1, self.path_length)
        if table.size and int(table.max()) >= len(self.members):
            raise ProtocolError("plan with a path to nobody", peer=PeerId(self.planner))
        return [[int(place) for place in row] for row in table]

    def check(self, spec: PipelineSpec) -> None:
        """Whether it keeps the rules by itself, whatever the swarm looks like.

        Raises:
            ProtocolError: which rule it breaks.
        """
        offender = PeerId(self.planner)
        if self.members != sorted(set(self.members)) or len(self.stages) != len(self.members):
            raise ProtocolError("plan whose members are not in order", peer=offender)
        if max(self.stages) >= spec.stages or self.path_length != spec.path_length:
            raise ProtocolError("plan for another number of stages", peer=offender)
        starts: Counter[int] = Counter()
        for path in self.table():
            stages = [self.stages[place] for place in path]
            if not is_order(stages) or (len(stages) == spec.stages and stages != sorted(stages)):
                raise ProtocolError("plan with a path against the rules", peer=offender)
            starts[path[0]] += 1
        origins = [place for place, stage in enumerate(self.stages) if stage == 0]
        if not origins or any(starts[place] != spec.microbatches for place in origins):
            raise ProtocolError("plan that starts too many microbatches somewhere, or too few", peer=offender)

    def paths_from(self, peer: PeerId) -> list[tuple[list[PeerId], list[int], int]]:
        """Of the microbatches that `peer` starts: peers, stages and priority."""
        return [
            ([PeerId(self.members[place]) for place in path], [self.stages[place] for place in path], priority)
            for priority, path in enumerate(self.table())
            if self.members[path[0]] == peer
        ]

    def restricted(self, members: Sequence[PeerId], case: Case) -> Plan | None:
        """The plan in terms of a case with these members; None unless they are the same and hold the same stages."""
        is_same = self.members == list(members) and self.stages == _stages(case)
        return self.mended(members, case) if is_same else None

    def mended(self, members: Sequence[PeerId], case: Case) -> Plan:
        """What is left of the plan in a case with these members: whoever is not there, or holds another stage, is replaced by the
        first who holds the planned one. Microbatches of an origin that is not there are left out."""
        partition, stage_of = case.partition, _stages(case)
        assert partition is not None
        node_of = {peer: node for node, peer in enumerate(members)}

        def stand_in(place: int) -> int:
            node, stage = node_of.get(PeerId(self.members[place])), self.stages[place]
            return node if node is not None and stage_of[node] == stage else partition[stage][0]

        microbatches = tuple(
            Microbatch(path=(origin, *map(stand_in, path[1:])), priority=float(priority))
            for priority, path in enumerate(self.table())
            if (origin := node_of.get(PeerId(self.members[path[0]]))) is not None and stage_of[origin] == 0
        )
        return Plan(partition=partition, microbatches=microbatches, dispatch=DISPATCH)


def _stages(case: Case) -> list[int]:
    """What each node of a case with a partition holds."""
    assert case.partition is not None
    stage_of = {node: stage for stage, nodes in enumerate(case.partition) for node in nodes}
    return [stage_of[node] for node in range(case.num_nodes)]


@dataclass(frozen=True, slots=True)
class SignedPlan:
    """A document and its planner's signature. Make one with `sign` or `unpack`: both leave only sound ones."""

    document: PlanDocument
    signature: bytes

    @classmethod
    def sign(cls, document: PlanDocument, identity: Identity) -> Self:
        """Sign one's own plan."""
        assert document.planner == identity.peer_id
        return cls(document, identity.sign(_DOMAIN, encode_message(document)))

    def pack(self) -> bytes:
        """The bytes that `unpack` takes."""
        return self.signature + encode_message(self.document)

    @classmethod
    def unpack(cls, data: bytes, *, run: RunId, spec: PipelineSpec) -> Self:
        """Check what `pack` made, from whomever it came.

        Raises:
            ProtocolError: malformed, of another run, against the rules, or not signed by the planner that it names.
        """
        signature, body = data[:SIGNATURE_BYTES], data[SIGNATURE_BYTES:]
        document = decode_message(body, PlanDocument)
        if document.run != run:
            raise ProtocolError("plan of another run")
        if not verify(PeerId(document.planner), _DOMAIN, body, signature):
            raise ProtocolError("plan not signed by the planner it names")
        document.check(spec)
        return cls(document, signature)


def plan_number(iteration: int) -> int:
    """Of the plan whose turn it is in an iteration; the first is 1."""
    return iteration // PLAN_ITERATIONS + 1


def planners(members: Iterable[PeerId], *, run: RunId, number: int) -> list[PeerId]:
    """Whose turn it is to make plan `number`: the first by a lot that nobody can choose; the others, should it not come."""

    def lot(peer: PeerId) -> bytes:
        return hashlib.sha256(f"llm-node:plan\0{run}\0{number}\0{peer}".encode()).digest()

    return sorted(members, key=lot)[:NUM_PLANNERS]


def is_slower_than_none(document: PlanDocument, case: Case, members: Sequence[PeerId]) -> bool:
    """Whether, for a peer that sees this case, the plan costs more time than a plan made offhand would."""
    plan = document.mended(members, case)
    if len(plan.microbatches) > MAX_JUDGED:
        return False
    try:
        offhand = construct(case)
    except UserError:
        return False
    return expected_s(case, plan) > TOLERANCE * expected_s(case, offhand)
