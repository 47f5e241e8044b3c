"""A run of everybody with everybody, by whole peers over libp2p on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from node.compute import ThreadCompute
from node.events import EventLog
from node.peer import Peer, PeerOptions
from protocol.directory import validate_entry
from protocol.identity import Identity
from tests.node.memory_swarm import phi
from tests.node.runs import tiny_run
from tests.protocol.nodes import transport_in

pytestmark = pytest.mark.net


async def test_three_peers_take_one_mean_until_the_end(tmp_path: Path, measured: Callable[[str, float], None]) -> None:
    signed, store = tiny_run(
        tmp_path,
        sync__algorithm="diloco",
        sync__gamma=0.0,
        sync__overlap=False,
        sync__exchange_timeout_s=20.0,
        sync__consolidation_tolerance=0.0,
        sync__total_rounds=10,  # the first few may pass before all have found each other
    )
    rounds: list[dict[str, Any]] = []
    peers: list[Peer] = []
    async with AsyncExitStack() as stack:
        known: list[str] = []
        for number in range(3):
            home = tmp_path / f"peer{number}"
            home.mkdir()
            transport = await stack.enter_async_context(
                transport_in(home, initial_peers=known, validator=validate_entry)
            )
            known = known or await transport.addresses()
            events = EventLog()
            events.listen(lambda event, fields: rounds.append(fields) if event == "group_round" else None)
            compute = ThreadCompute()
            stack.callback(compute.close)
            peers.append(
                Peer(
                    signed,
                    identity=Identity.load(home / "key"),
                    transport=transport,
                    store=store,
                    compute=compute,
                    events=events,
                    folder=None,
                    options=PeerOptions(name=f"peer{number}", sequences=4, threads=1),
                )
            )
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(peer.run()) for peer in peers]
    assert all(task.result().finished for task in running)
    whole = [told for told in rounds if (told["outcome"], told["members"]) == ("averaged", 3)]
    assert whole, rounds
    measured("group round of three whole peers", max(told["seconds"] for told in whole))
    if len(whole) == len(rounds):  # else one came too late for the first round, and without a pull it stays apart
        assert all(torch.equal(phi(peer), phi(peers[0])) for peer in peers)
