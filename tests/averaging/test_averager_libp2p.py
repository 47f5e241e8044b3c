"""The same exchange over the real network on loopback: an odd swarm, a payload of many chunks, and a killed candidate."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psutil
import pytest

from averaging.averager import Averager
from protocol.identity import Identity
from protocol.libp2p import Libp2pTransport
from tests.averaging.swarm import RUN, make_update
from tests.protocol.eventually import eventually
from tests.protocol.nodes import transport_in

pytestmark = pytest.mark.net

NUM_BYTES = (5 << 20, 3 << 20)


@asynccontextmanager
async def real_swarm(folder: Path, num_peers: int) -> AsyncIterator[list[tuple[Libp2pTransport, Averager]]]:
    async with AsyncExitStack() as stack:
        peers: list[tuple[Libp2pTransport, Averager]] = []
        for index in range(num_peers):
            home = folder / f"peer{index}"
            home.mkdir()
            known = await peers[0][0].addresses() if peers else []
            transport = await stack.enter_async_context(transport_in(home, initial_peers=known))
            averager = Averager(
                transport=transport,
                identity=Identity.load(home / "key"),
                run=RUN,
                payload_bytes=sum(NUM_BYTES),
                max_lag_rounds=1,
            )
            peers.append((transport, await stack.enter_async_context(averager)))
        for transport, _ in peers:
            await transport.addresses()  # its p2pd knows the protocol now
        yield peers


async def test_three_peers_pair_two_and_leave_one(tmp_path: Path) -> None:
    async with real_swarm(tmp_path, 3) as peers:
        ids = [transport.peer_id for transport, _ in peers]
        deadline_s = asyncio.get_running_loop().time() + 30.0
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(
                    averager.exchange(
                        make_update(transport.peer_id, num_bytes=NUM_BYTES), candidates=ids, deadline_s=deadline_s
                    )
                )
                for transport, averager in peers
            ]
        results = [task.result() for task in tasks]
        assert Counter(result.outcome for result in results) == Counter(averaged=2, alone=1)
        for result in results:
            if result.remote is not None:
                sent = make_update(result.remote.peer, num_bytes=NUM_BYTES)
                assert result.remote.delta == sent.delta
                assert result.remote.slow == sent.slow
        assert not any(averager.violations for _, averager in peers)
        assert not any(transport.incoming.num_bugs for transport, _ in peers)


async def test_a_candidate_whose_network_dies_does_not_hold_us_up(tmp_path: Path) -> None:
    async with real_swarm(tmp_path, 2) as peers:
        ids = [transport.peer_id for transport, _ in peers]
        loop = asyncio.get_running_loop()

        async def proposal_is_held() -> bool:
            return bool(peers[1][1]._door._suitors)

        async with asyncio.TaskGroup() as group:
            survivor = group.create_task(
                peers[0][1].exchange(
                    make_update(ids[0], num_bytes=NUM_BYTES), candidates=ids, deadline_s=loop.time() + 20.0
                )
            )
            await eventually(proposal_is_held, timeout_s=10.0)
            daemon = psutil.Process(int((tmp_path / "peer1" / "run" / "p2pd.pid").read_text().split()[0]))
            killed_s = loop.time()
            daemon.send_signal(signal.SIGKILL)
        assert survivor.result().outcome in ("alone", "timeout")
        assert loop.time() - killed_s < 15.0
        assert not peers[0][1].violations
