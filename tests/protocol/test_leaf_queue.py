"""The work queue of a fetch."""

from __future__ import annotations

import random

import pytest

from protocol.ids import PeerId
from protocol.leaf_queue import LeafQueue
from tests.protocol.blob_swarm import (
    A,
    B,
    C,
)


def test_queue_gives_each_leaf_once_and_doubles_up_only_for_idle_donors() -> None:
    queue = LeafQueue([3, 1, 2])
    assert [queue.take(A, is_idle=False) for _ in range(4)] == [1, 2, 3, None]
    assert queue.take(A, is_idle=True) is None, "not from itself"
    assert queue.take(B, is_idle=False) is None
    assert queue.take(B, is_idle=True) == 3, "the newest is the furthest away"
    assert queue.take(C, is_idle=True) == 2
    assert queue.done(3)
    assert not queue.done(3), "the slower of the two"
    queue.give_back(A, [1, 2])
    assert queue.num_missing == 2
    assert queue.take(C, is_idle=False) == 1, "leaf 2 is still owed by C"
    queue.give_back(C, [1, 2])
    queue.give_back(B, [3])
    assert [queue.take(B, is_idle=False) for _ in range(3)] == [1, 2, None]
    assert queue.done(1)
    assert queue.done(2)
    assert queue.num_missing == 0


@pytest.mark.parametrize("seed", range(20))
def test_queue_never_loses_a_leaf(seed: int) -> None:
    rng = random.Random(seed)
    queue = LeafQueue(range(30))
    owed: dict[PeerId, list[int]] = {A: [], B: [], C: []}
    done: list[int] = []
    for _ in range(2000):
        donor = rng.choice([A, B, C])
        match rng.randrange(8):
            case 0:
                queue.give_back(donor, owed[donor])
                owed[donor] = []
            case 1 | 2 if owed[donor]:
                index = owed[donor].pop(0)
                if queue.done(index):
                    done.append(index)
            case _ if len(owed[donor]) < 4:
                index_or_none = queue.take(donor, is_idle=not owed[donor])
                owed[donor] += [] if index_or_none is None else [index_or_none]
            case _:
                pass
        assert queue.num_missing == 30 - len(done)
    assert sorted(done) == list(range(30))
