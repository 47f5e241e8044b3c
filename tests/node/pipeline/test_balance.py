"""Who leaves its stage for another, and when."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from node.pipeline.balance import LOOKS, LOOKS_IF_LOST, LOOKS_PER_PLACE, SETTLING_LOOKS, Balance, moves
from node.pipeline.rebuild import mean_of_neighbours
from node.pipeline.stage_choice import lacking_stage
from protocol.ids import PeerId
from protocol.manifest import Manifest
from protocol.records import PeerRecord
from tests.node.pipeline.records import peer_id, record
from tests.node.runs import tiny_run

Records = dict[PeerId, PeerRecord]


def swarm(*stages: int, **forward_s: float) -> Records:
    """Peer i holds the i-th stage named; `p2=0.5` makes peer 2 that slow, the others take 0.1 s."""
    speeds = [forward_s.get(f"p{number}", 0.1) for number in range(len(stages))]
    return {
        peer_id(number): record(number, stage, forward_s=speeds[number], iteration=3)
        for number, stage in enumerate(stages)
    }


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    settings = {"model__num_layers": 3, "pipeline__stages": 3, "pipeline__skip_ratio": 0.0, "sync__total_rounds": 100}
    return tiny_run(tmp_path, **settings)[0].manifest


def looks_until_moving(manifest: Manifest, number: int, records: Records, *, iteration: int = 3) -> int | None:
    """How often peer `number` looks before it goes, if it goes at all."""
    stage = records[peer_id(number)].stage
    assert stage is not None
    balance = Balance(manifest, peer=peer_id(number), stage=stage, fitting=[0, 1, 2])
    for look in range(1, 100):
        if balance.look(records, iteration=iteration) is not None:
            return look
    return None


def test_nobody_moves_while_stages_are_about_even(manifest: Manifest) -> None:
    for records in (swarm(0, 0, 1, 1, 2, 2), swarm(0, 0, 1, 1, 2), swarm(0, 1, 2)):
        assert all(looks_until_moving(manifest, number, records) is None for number in range(len(records)))


def test_one_of_a_crowded_stage_goes_to_the_slowest(manifest: Manifest) -> None:
    records = swarm(0, 0, 0, 0, 1, 1, 2)
    looks = {number: looks_until_moving(manifest, number, records) for number in range(7)}
    movers = sorted(look for look in looks.values() if look is not None)
    assert movers == [SETTLING_LOOKS + LOOKS + place * LOOKS_PER_PLACE for place in range(4)], looks
    assert all(looks[number] is None for number in (4, 5, 6)), "stages of two or one have nobody to spare"
    assert moves(records, num_stages=3, path_length=3)[0] == 2


def test_speed_counts_and_not_heads(manifest: Manifest) -> None:
    slow = swarm(0, 0, 1, 1, 2, 2, 2, p4=0.5, p5=0.5, p6=0.5)
    target, who, is_lost = moves(slow, num_stages=3, path_length=3)
    assert (target, is_lost) == (2, False)
    assert sorted(who) == sorted((peer_id(2), peer_id(3))), "stage 0 is not left to one peer, who could say anything"


def test_stages_that_are_often_skipped_need_less(manifest: Manifest) -> None:
    records = swarm(0, 0, 0, 0, 1, 1, 1, 2, 2)
    assert moves(records, num_stages=3, path_length=2)[1] == []
    assert moves(swarm(0, 0, 1, 1, 1, 1, 2, 2), num_stages=3, path_length=2)[0] == 0


def test_a_lost_stage_is_taken_over_at_once_by_one_peer(manifest: Manifest) -> None:
    records = swarm(0, 0, 0, 1, 1)
    looks = {number: looks_until_moving(manifest, number, records) for number in range(5)}
    assert sorted(look for look in looks.values() if look is not None) == [
        LOOKS_IF_LOST + place * LOOKS_PER_PLACE for place in range(5)
    ]
    first = min(looks, key=lambda number: looks[number] or 999)
    assert first in (0, 1, 2), "the stage with most to spare gives"


def test_a_newcomer_on_its_way_ends_the_need(manifest: Manifest) -> None:
    records = swarm(0, 0, 1, 1) | {peer_id(9): record(9, 2, state="joining")}
    assert all(looks_until_moving(manifest, number, records) is None for number in range(4))


def test_who_can_not_hold_it_stays_and_so_does_everybody_in_the_last_round(manifest: Manifest) -> None:
    records = swarm(0, 0, 1, 1)
    number = next(number for number in range(4) if looks_until_moving(manifest, number, records) == LOOKS_IF_LOST)
    small = Balance(manifest, peer=peer_id(number), stage=number // 2, fitting=[number // 2])
    assert all(small.look(records, iteration=3) is None for _ in range(50))
    last = manifest.sync.total_rounds * manifest.sync.inner_steps - 2
    assert looks_until_moving(manifest, number, records, iteration=last) is None


def test_neighbours_give_the_mean_of_their_layers() -> None:
    def weights(*layers: int) -> dict[str, torch.Tensor]:
        return {f"model.layers.{layer}.mlp.weight": torch.full((2,), float(layer)) for layer in layers}

    own = weights(2, 3) | {"model.norm.weight": torch.tensor([7.0])}
    found = mean_of_neighbours(own, [weights(0, 1) | {"model.norm.weight": torch.zeros(1)}, weights(4)], range(2, 4))
    assert found["model.layers.2.mlp.weight"].tolist() == [2.0, 2.0]
    assert found["model.layers.3.mlp.weight"].tolist() == [2.5, 2.5]
    assert found["model.norm.weight"].tolist() == [7.0]


def test_who_claims_to_be_fast_does_not_empty_its_stage() -> None:
    claims = {f"p{number}": 0.1 for number in range(12)} | {"p0": 1e-300}
    records = swarm(*(number // 3 for number in range(12)), **claims)
    target, who, _ = moves(records, num_stages=4, path_length=4)
    assert target != 0
    left = [number for number in range(1, 3) if peer_id(number) in who]
    after = {peer: r.model_copy(update={"next_stage": target}) if peer == who[0] else r for peer, r in records.items()}
    assert left
    assert not {peer_id(1), peer_id(2)} & set(moves(after, num_stages=4, path_length=4)[1]), "one at most goes"


def test_who_has_said_that_it_goes_is_counted_where_it_goes(manifest: Manifest) -> None:
    records = swarm(0, 0, 0, 1, 1)
    first = moves(records, num_stages=3, path_length=3)[1][0]
    records[first] = records[first].model_copy(update={"next_stage": 2})
    _, who, is_lost = moves(records, num_stages=3, path_length=3)
    assert not is_lost
    assert first not in who
    assert all(looks_until_moving(manifest, number, records) is None for number in range(5))


@pytest.mark.parametrize("forward_s", [5e-324, 1e-300, 1e6])
def test_nothing_in_a_record_breaks_the_sums(forward_s: float) -> None:
    records = swarm(0, 1, 2, 0, 1, 2, p1=forward_s)
    target, who, is_lost = moves(records, num_stages=3, path_length=2)
    assert target in range(3)
    assert set(who) <= set(records)
    assert not is_lost
    assert lacking_stage(records, stages=[0, 1, 2], peer=peer_id(9)) in range(3)
