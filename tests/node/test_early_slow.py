"""A swarm whose peers send φ ahead of its exchange."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from averaging.early import EarlySlow
from protocol.ids import PeerId
from protocol.virtual_time import run_virtual
from tests.node.memory_swarm import MemorySwarm
from tests.node.runs import tiny_run

NAMES = ("one", "two", "three", "four")
ROUNDS = 8


@pytest.mark.parametrize("overlap", [True, False])
def test_most_slow_weights_come_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    found: list[bool] = []
    held = EarlySlow.held

    def counted(early: EarlySlow, peer: PeerId, digest: bytes) -> memoryview | None:
        data = held(early, peer, digest)
        found.append(data is not None)
        return data

    monkeypatch.setattr(EarlySlow, "held", counted)
    signed, store = tiny_run(tmp_path, sync__early_slow=True, sync__overlap=overlap, sync__total_rounds=ROUNDS)
    swarm = MemorySwarm(signed, store, tmp_path)

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            for name in NAMES:
                tasks.create_task(swarm.live(name))

    run_virtual(main())
    outcomes = [note["outcome"] for name in NAMES for note in swarm.named(name, "exchange")]
    assert outcomes.count("averaged") >= len(NAMES) * (ROUNDS - 2)
    # Not in the first round; and whoever is late by then may meet somebody else.
    assert sum(found) >= 0.7 * len(found), f"{sum(found)} of {len(found)}"
