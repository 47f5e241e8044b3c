"""Who takes which stage, and which way microbatches go without a plan."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from node.pipeline.routing import Replica, StageMap
from node.pipeline.rules import is_order
from node.pipeline.stage_choice import StageView, choose_stage, lacking_stage, should_think_again
from protocol.ids import PeerId
from protocol.records import PeerRecord
from protocol.virtual_time import run_virtual
from tests.node.pipeline.records import FixedView, peer_id, record


def view(*records: PeerRecord) -> dict[PeerId, PeerRecord]:
    return dict(FixedView(*records).peers)


def test_the_slowest_stage_is_the_one_that_lacks_most() -> None:
    records = view(record(1, 0), record(2, 1), record(3, 2), record(4, 2))
    assert lacking_stage(records, stages=range(4), peer=peer_id(9)) == 3
    records |= view(record(5, 3))
    assert lacking_stage(records, stages=range(4), peer=peer_id(9)) in (0, 1, 3)
    # Two slow ones are less than a fast one; who is leaving counts nothing.
    speeds = view(
        record(1, 0, forward_s=1.0),
        record(2, 1, forward_s=4.0),
        record(3, 1, forward_s=4.0),
        record(4, 1, state="leaving"),
    )
    assert lacking_stage(speeds, stages=range(2), peer=peer_id(9)) == 1


@pytest.mark.parametrize("num_peers", [1, 3, 6, 7, 12])
def test_peers_that_join_at_once_spread_evenly(num_peers: int) -> None:
    """Everybody sees everybody's choice a second later."""
    num_stages = 3
    shown: dict[PeerId, PeerRecord] = {}

    async def live(number: int) -> int:
        peer = peer_id(number)

        class Seen(FixedView):
            @property
            def peers(self) -> Any:
                return {other: each for other, each in shown.items() if other != peer}

            neighbours = peers

        async def announce(stage: int) -> None:
            async def show() -> None:
                await asyncio.sleep(1.0)
                shown[peer] = record(number, stage, state="joining")

            background.append(asyncio.create_task(show()))

        background: list[asyncio.Task[None]] = []
        directory: Any = Seen()
        return await choose_stage(directory, stages=range(num_stages), peer=peer, announce=announce)

    async def story() -> list[int]:
        return await asyncio.gather(*(live(number) for number in range(1, num_peers + 1)))

    chosen = run_virtual(story())
    counts = [chosen.count(stage) for stage in range(num_stages)]
    assert max(counts) - min(counts) <= 1


def test_only_one_of_several_rivals_thinks_again() -> None:
    joining = [record(number, 1, state="joining") for number in (1, 2, 3)]
    wavering = [
        should_think_again(view(*(r for r in joining if r is not own)), stage=1, stages=range(3), peer=PeerId(own.peer))
        for own in joining
    ]
    assert wavering.count(True) == 1


def test_a_stages_view_shows_its_replicas_only() -> None:
    directory: Any = FixedView(record(1, 0), record(2, 1), record(3, 1))
    assert set(StageView(directory, 1).peers) == {peer_id(2), peer_id(3)}
    assert len(StageView(directory, None).peers) == 3


def stages(*replicas: tuple[int, int, float], path_length: int = 3) -> StageMap:
    """(peer, stage, forward_s)…"""
    made = StageMap(num_stages=4, path_length=path_length)
    made.update({peer_id(peer): Replica(stage=stage, forward_s=forward_s) for peer, stage, forward_s in replicas})
    return made


def test_paths_keep_the_rules_and_rotate() -> None:
    known = stages(*((number, number % 4, 0.1) for number in range(8)))
    paths = [known.path(peer_id(0), lot=f"{iteration}") for iteration in range(60)]
    orders = [tuple(known.stage_of(peer) or 0 for peer in path) for path in paths]
    assert all(
        path[0] == peer_id(0) and len(path) == 3 and is_order(order) for path, order in zip(paths, orders, strict=True)
    )
    assert len(set(orders)) > 3
    assert {peer for path in paths for peer in path[1:]} == {peer_id(number) for number in (1, 2, 3, 5, 6, 7)}
    again = []
    for _ in range(2):
        known.begin_iteration()
        again.append(known.path(peer_id(0), lot="x"))
    assert again[0] == again[1]


def test_long_pipelines_have_paths_at_once() -> None:
    long = StageMap(num_stages=64, path_length=48)
    long.update({peer_id(number): Replica(stage=number) for number in range(64)})
    for number in range(20):
        assert is_order([long.stage_of(peer) or 0 for peer in long.path(peer_id(0), lot=str(number))])


def test_nobody_is_believed_to_be_absurdly_fast() -> None:
    known = stages((1, 0, 1.0), (2, 1, 1e-300), (3, 1, 1.0), path_length=2)
    given = [known.path(peer_id(1), lot=f"{number}")[1] for number in range(34)]
    assert given.count(peer_id(3)) == 2


def test_work_goes_to_the_faster_replica_in_proportion() -> None:
    known = stages((1, 0, 1.0), (2, 1, 1.0), (3, 1, 3.0), path_length=2)
    given = [known.path(peer_id(1), lot=f"{number}")[1] for number in range(8)]
    assert given.count(peer_id(2)) == 6
    known.begin_iteration()
    assert known.replicas(peer_id(3)) == [peer_id(2)]


def test_stages_that_nobody_holds_are_left_out() -> None:
    known = stages((1, 0, 0.0), (2, 3, 0.0))
    assert known.path(peer_id(1), lot="") == [peer_id(1), peer_id(2)]
    assert not known.has_paths
    assert stages((1, 0, 0.0), (2, 3, 0.0), (3, 1, 0.0)).has_paths


def test_a_path_that_skips_nothing_is_an_ordinary_pipeline() -> None:
    made = StageMap(num_stages=4, path_length=4)
    made.update({peer_id(number): Replica(stage=number % 4) for number in range(8)})
    for lot in range(100):
        path = made.path(peer_id(0), lot=str(lot))
        assert [made.stage_of(peer) for peer in path] == [0, 1, 2, 3]


def test_a_newcomer_is_chosen_when_nobody_else_is_there() -> None:
    made = StageMap(num_stages=2, path_length=2)
    known, new = Replica(stage=1, forward_s=9.0), Replica(stage=1, forward_s=0.1, is_new=True)
    made.update({peer_id(0): Replica(stage=0), peer_id(1): known, peer_id(2): new})
    assert made.path(peer_id(0), lot="a") == [peer_id(0), peer_id(1)]
    made.update({peer_id(0): Replica(stage=0), peer_id(2): new})
    assert made.path(peer_id(0), lot="a") == [peer_id(0), peer_id(2)]
