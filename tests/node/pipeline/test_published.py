"""Plans that peers pass on: what is followed, and what is not, whoever says it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from node.pipeline.case import Case
from node.pipeline.links import tail_of
from node.pipeline.live_case import live_case
from node.pipeline.published import DISPATCH, PlanDocument, SignedPlan, is_slower_than_none, planners
from node.pipeline.replay import replay
from node.pipeline.rules import violations
from node.pipeline.solver import replan
from protocol.errors import ProtocolError
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.manifest_sections import PipelineSpec
from protocol.records import LinkNote, PeerRecord
from tests.node.pipeline.records import peer_id, record
from tests.node.pipeline.stages import RUN

SPEC = PipelineSpec(stages=4, skip_ratio=0.25, microbatches=3, slots=3)
PAYLOAD = 100_000
STAGES = [0, 0, 1, 1, 2, 2, 3, 3]


def records(**changes: dict[str, Any]) -> dict[PeerId, PeerRecord]:
    """Eight peers in four stages; peers 1, 3, 5 and 7 are far from the others."""
    found = {}
    for number, stage in enumerate(STAGES):
        links = [
            LinkNote(
                peer=tail_of(peer_id(other)),
                latency_s=0.01 if other % 2 == number % 2 else 0.2,
                bytes_per_s=1e7 if other % 2 == number % 2 else 1e5,
            )
            for other in range(8)
            if other != number
        ]
        fields = {"forward_s": 0.1, "backward_s": 0.3, "loss_s": 0.05, "links": links} | changes.get(f"p{number}", {})
        found[peer_id(number)] = record(number, stage, **fields)
    return found


def problem(**changes: dict[str, Any]) -> tuple[Case, list[PeerId]]:
    found = live_case(records(**changes), spec=SPEC, payload_bytes=PAYLOAD)
    assert found is not None
    return found


def document(planner: int = 0, **changes: Any) -> PlanDocument:
    case, members = problem()
    plan = replan(case, None, dispatch=DISPATCH, seed=1, seconds=60.0, max_evaluations=400)
    made = PlanDocument.of(
        plan, members=members, run=RUN, number=3, planner=peer_id(planner), iteration_s=replay(case, plan)[0]
    )
    return made.model_copy(update=changes)


def identity(number: int) -> Identity:
    return Identity.generate(bytes([number]) * 32)


def test_the_case_is_what_the_records_say() -> None:
    case, members = problem()
    near, far = members.index(peer_id(2)), members.index(peer_id(3))
    origin = members.index(peer_id(0))
    assert case.link_s[origin][near] == pytest.approx(0.01 + PAYLOAD / 1e7)
    assert case.link_s[origin][far] == case.link_s[far][origin] == pytest.approx(0.2 + PAYLOAD / 1e5)
    assert case.uplink_s[origin] == pytest.approx(PAYLOAD / 1e7)
    assert case.backward_multiplier == pytest.approx(3.0)
    assert case.loss_multiplier == pytest.approx(0.5)
    assert case.partition is not None
    assert [sorted(members[node] for node in stage) for stage in case.partition] == [
        sorted((peer_id(2 * stage), peer_id(2 * stage + 1))) for stage in range(4)
    ]


def test_what_no_record_tells_is_taken_for_usual() -> None:
    silent: dict[str, Any] = {"forward_s": 0.0, "backward_s": 0.0, "links": []}
    case, members = problem(**{f"p{number}": silent for number in range(8) if number != 2})
    node, told = members.index(peer_id(5)), members.index(peer_id(2))
    assert case.forward_s[node] == case.forward_s[told] == pytest.approx(0.1)
    assert all(case.link_s[a][b] > 0.0 for a in range(8) for b in range(8) if a != b)
    nobody = {peer: each.model_copy(update={"links": [], "forward_s": 0.0}) for peer, each in records().items()}
    assert live_case(nobody, spec=SPEC, payload_bytes=PAYLOAD) is not None
    lost = {peer: each for peer, each in records().items() if each.stage != 2}
    assert live_case(lost, spec=SPEC, payload_bytes=PAYLOAD) is None


def test_a_live_plan_keeps_the_rules_and_avoids_slow_links() -> None:
    case, members = problem()
    plan = replan(case, None, dispatch=DISPATCH, seed=1, seconds=60.0, max_evaluations=2000)
    assert violations(case, plan) == []
    crossings = sum(
        members.index(peer_id(n)) == a
        for each in plan.microbatches
        for a, b in zip(each.path, each.path[1:], strict=False)
        for n in range(8)
        if (n % 2) != next(m for m in range(8) if members.index(peer_id(m)) == b) % 2
    )
    assert crossings == 0, "three stages are at hand on either side"


def test_a_signed_plan_survives_the_journey() -> None:
    made = document()
    back = SignedPlan.unpack(SignedPlan.sign(made, identity(0)).pack(), run=RUN, spec=SPEC)
    assert back.document == made
    own = [way for number in (0, 1) for way in back.document.paths_from(peer_id(number))]
    assert len(own) == 6
    assert sorted(priority for _, _, priority in own) == list(range(6))
    assert all(len(path) == 3 and stages[0] == 0 for path, stages, _ in own)
    case, members = problem()
    again = made.restricted(members, case)
    assert again is not None
    assert replay(case, again)[0] == pytest.approx(made.iteration_s)
    assert made.restricted(members[:-1], case) is None


def paths(change: Callable[[list[list[int]]], object]) -> dict[str, Any]:
    """The paths of a plan, changed."""
    table = document().table()
    change(table)
    return {"paths": np.array(table, dtype="<u2").tobytes()}


def repeat(table: list[list[int]]) -> None:
    table[0][2] = table[0][1]


def start_twice(table: list[list[int]]) -> None:
    table[0] = next(row for row in table if row[0] != table[0][0])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (lambda: paths(repeat), "against the rules"),
        (lambda: paths(start_twice), "too many microbatches"),
        (lambda: paths(lambda table: table.pop()), "too few"),
        (lambda: paths(lambda table: table[0].__setitem__(1, 99)), "to nobody"),
        (lambda: {"paths": document().paths[:-1]}, "half a path"),
        (lambda: {"stages": [0] * 8}, "against the rules"),
        (lambda: {"stages": [*document().stages, 1]}, "not in order"),
        (lambda: {"members": document().members[::-1]}, "not in order"),
        (lambda: {"path_length": 4}, "another number of stages"),
        (lambda: {"stages": [1] * 8, "paths": b""}, "too few"),
        (lambda: {"run": "0" * 64}, "another run"),
    ],
)
def test_a_plan_against_the_rules_is_refused_though_it_is_signed(
    changes: Callable[[], dict[str, Any]], reason: str
) -> None:
    signed = SignedPlan.sign(document(**changes()), identity(0))
    with pytest.raises(ProtocolError, match=reason):
        SignedPlan.unpack(signed.pack(), run=RUN, spec=SPEC)


def test_where_nothing_is_skipped_nothing_is_swapped() -> None:
    full = SPEC.model_copy(update={"skip_ratio": 0.0})
    found = live_case(records(), spec=full, payload_bytes=PAYLOAD)
    assert found is not None
    case, members = found
    plan = replan(case, None, dispatch=DISPATCH, seed=1, seconds=60.0, max_evaluations=400)
    made = PlanDocument.of(plan, members=members, run=RUN, number=3, planner=peer_id(0), iteration_s=1.0)
    made.check(full)
    table = made.table()
    table[0][1], table[0][2] = table[0][2], table[0][1]
    with pytest.raises(ProtocolError, match="against the rules"):
        made.model_copy(update={"paths": np.array(table, dtype="<u2").tobytes()}).check(full)


def test_a_plan_that_somebody_else_signed_or_changed_is_refused() -> None:
    signed = SignedPlan.sign(document(planner=1), identity(1))
    forged = SignedPlan(document(planner=2), signed.signature)
    changed = bytearray(signed.pack())
    changed[-1] ^= 1
    for data in (forged.pack(), bytes(changed), signed.pack()[:40], b""):
        with pytest.raises(ProtocolError):
            SignedPlan.unpack(data, run=RUN, spec=SPEC)


def test_whose_turn_it_is_nobody_can_choose() -> None:
    members = [peer_id(number) for number in range(20)]
    turns = [planners(members, run=RUN, number=number)[0] for number in range(200)]
    assert len(set(turns)) > 15
    assert planners(members, run=RUN, number=7) == planners(members[::-1], run=RUN, number=7)


def test_a_bad_plan_is_found_out_by_whoever_sees_the_links() -> None:
    case, members = problem()
    good = document()
    assert not is_slower_than_none(good, case, members)
    # Every microbatch crosses between the near and the far half at each step.
    place = {number: members.index(peer_id(number)) for number in range(8)}
    table = [[place[0], place[3], place[4]]] * 3 + [[place[1], place[2], place[5]]] * 3
    bad = good.model_copy(update={"paths": np.array(table, dtype="<u2").tobytes()})
    bad.check(SPEC)
    assert is_slower_than_none(bad, case, members)
    # The same with a stranger among its members, so that it does not fit the swarm.
    stranger = peer_id(200)
    swollen = sorted([*bad.members, stranger])
    moved = [[swollen.index(bad.members[node]) for node in path] for path in table]
    stages = {**dict(zip(bad.members, bad.stages, strict=True)), stranger: 3}
    hidden = bad.model_copy(
        update={
            "members": swollen,
            "stages": [stages[peer] for peer in swollen],
            "paths": np.array(moved, dtype="<u2").tobytes(),
        }
    )
    hidden.check(SPEC)
    assert is_slower_than_none(hidden, case, members)


def far_away(peer: int) -> dict[str, Any]:
    """What a peer tells that claims to be a minute away from that one, who measures nothing of it."""
    return {"links": [LinkNote(peer=tail_of(peer_id(peer)), latency_s=60.0, bytes_per_s=1e5)]}


def test_a_false_latency_does_not_hide_a_bad_plan() -> None:
    """By it alone the end of the iteration would take a minute, beside which no plan looks slow."""
    honest = records()
    silent = [note for note in honest[peer_id(7)].links if note.peer != tail_of(peer_id(6))]
    case, members = problem(p6=far_away(7), p7={"links": silent})
    assert case.closing_s < 2.0
    place = {number: members.index(peer_id(number)) for number in range(8)}
    table = [[place[0], place[3], place[4]]] * 3 + [[place[1], place[2], place[5]]] * 3
    bad = document().model_copy(update={"paths": np.array(table, dtype="<u2").tobytes()})
    assert is_slower_than_none(bad, case, members)


def test_one_receiver_s_boast_does_not_make_every_uplink_endless() -> None:
    boast = [
        LinkNote(peer=tail_of(peer_id(other)), latency_s=0.01, bytes_per_s=1e12) for other in range(8) if other != 6
    ]
    honest, _ = problem()
    misled, members = problem(p6={"links": boast})
    for peer in range(8):
        if peer != 6:
            node = members.index(peer_id(peer))
            assert misled.uplink_s[node] > 0.2 * honest.uplink_s[node]


def test_a_fast_uplink_is_believed_though_all_but_one_receiver_are_slow() -> None:
    slow = {
        f"p{n}": {"links": [LinkNote(peer=tail_of(peer_id(0)), latency_s=0.01, bytes_per_s=4e5)]} for n in range(1, 8)
    }
    slow["p2"] = {"links": [LinkNote(peer=tail_of(peer_id(0)), latency_s=0.01, bytes_per_s=1.5e6)]}
    case, members = problem(**slow)
    assert case.uplink_s[members.index(peer_id(0))] == pytest.approx(PAYLOAD / 1.5e6)


@pytest.mark.parametrize("lie", [{"forward_s": 5e-324}, {"forward_s": 1e6, "backward_s": 5e-324}, "links"])
def test_nothing_in_a_record_breaks_the_case(lie: Any) -> None:
    if lie == "links":
        lie = {"links": [LinkNote(peer=tail_of(peer_id(0)), latency_s=5e-324, bytes_per_s=1e-303)]}
    case, _ = problem(p2=lie)
    plan = replan(case, None, dispatch=DISPATCH, seed=1, seconds=60.0, max_evaluations=50)
    assert violations(case, plan) == []
