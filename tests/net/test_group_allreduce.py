"""The group all-reduce over the real network on loopback: parts of many chunks, and a member whose network dies."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psutil
import pytest
import torch

from averaging.allreduce import GroupAverager, GroupResult
from averaging.codec import codec_named
from protocol.identity import Identity
from protocol.libp2p import Libp2pTransport
from tests.averaging.group_members import decoded, delta_of, encoded_update
from tests.averaging.swarm import RUN
from tests.protocol.eventually import eventually
from tests.protocol.nodes import transport_in

pytestmark = pytest.mark.net

NUMEL = 3_000_001
CODEC = codec_named("q8")


@asynccontextmanager
async def real_members(folder: Path, num_peers: int) -> AsyncIterator[list[tuple[Libp2pTransport, GroupAverager]]]:
    async with AsyncExitStack() as stack:
        peers: list[tuple[Libp2pTransport, GroupAverager]] = []
        for index in range(num_peers):
            home = folder / f"peer{index}"
            home.mkdir()
            known = await peers[0][0].addresses() if peers else []
            transport = await stack.enter_async_context(transport_in(home, initial_peers=known))
            averager = GroupAverager(
                transport=transport, identity=Identity.load(home / "key"), run=RUN, codec=CODEC, numel=NUMEL
            )
            peers.append((transport, await stack.enter_async_context(averager)))
        for transport, _ in peers:
            await transport.addresses()  # its p2pd knows the protocol now
        yield peers


async def reduce(peers: list[tuple[Libp2pTransport, GroupAverager]], index: int, *, deadline_s: float) -> GroupResult:
    return await peers[index][1].reduce(
        encoded_update(delta_of(index, numel=NUMEL), CODEC),
        candidates=[transport.peer_id for transport, _ in peers],
        deadline_s=asyncio.get_running_loop().time() + deadline_s,
    )


async def test_three_members_end_with_the_same_bytes(tmp_path: Path, measured: Callable[[str, float], None]) -> None:
    async with real_members(tmp_path, 3) as peers:
        before = [transport.traffic.sent_bytes for transport, _ in peers]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(reduce(peers, index, deadline_s=60.0)) for index in range(3)]
        results = [task.result() for task in tasks]
        assert [result.outcome for result in results] == ["averaged"] * 3
        assert len({bytes(result.mean or b"") for result in results}) == 1
        plain = sum((delta_of(index, numel=NUMEL) for index in range(3)), torch.zeros(NUMEL)) / 3
        mean = decoded(results[0].mean, CODEC, NUMEL)
        assert float((mean - plain).norm()) < 0.02 * float(plain.norm())
        for (transport, averager), sent in zip(peers, before, strict=True):
            vectors = (transport.traffic.sent_bytes - sent) / CODEC.num_bytes(NUMEL)
            assert vectors == pytest.approx(2 * 2 / 3, rel=0.01)
            assert not averager.violations
            assert not transport.incoming.num_bugs
        measured("group of three, 3 MB each", max(result.seconds for result in results))


async def test_a_member_whose_network_dies_costs_at_most_its_part(tmp_path: Path) -> None:
    async with real_members(tmp_path, 3) as peers:
        daemon = psutil.Process(int((tmp_path / "peer2" / "run" / "p2pd.pid").read_text().split()[0]))

        async def group_has_formed() -> bool:
            round = peers[2][1]._round
            return round is not None and round._has_formed.is_set()

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(reduce(peers, index, deadline_s=25.0)) for index in range(3)]
            await eventually(group_has_formed, timeout_s=10.0)
            daemon.send_signal(signal.SIGKILL)
        results = [task.result() for task in tasks[:2]]
        assert all(result.outcome in ("averaged", "partial") for result in results)
        assert all(len(result.own_parts) <= 1 for result in results)
        assert set(results[0].own_parts) == set(results[1].own_parts)
        shared = torch.ones(NUMEL, dtype=torch.bool)
        for start, stop in results[0].own_parts:
            shared[start:stop] = False
        means = [decoded(result.mean, CODEC, NUMEL) for result in results]
        assert torch.equal(means[0][shared], means[1][shared])
        assert max(result.seconds for result in results) <= 25.5
