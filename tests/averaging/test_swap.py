"""Memory and hashes of a swap; what it does over streams is tested with the averager."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from averaging.averager import Averager
from averaging.exchange_messages import payload_hash
from averaging.side_buffer import SideBuffer
from averaging.swap import describe
from averaging.update import Update
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.memory import MemoryNetwork, MemoryTransport
from protocol.virtual_time import run_virtual
from tests.averaging.swarm import RUN, make_update


class TestSideBuffer:
    @pytest.mark.parametrize("num_bytes", [10, 1 << 20])
    def test_memory_that_nobody_looks_at_is_used_again(self, num_bytes: int) -> None:
        side = SideBuffer()
        view = side.take(num_bytes)
        memory = id(view.obj)
        del view
        assert id(side.take(num_bytes // 2).obj) == memory

    def test_memory_that_somebody_looks_at_is_left_alone(self) -> None:
        side = SideBuffer()
        whole = side.take(1 << 20)
        part = whole[5:9]
        part[:] = b"keep"
        del whole
        side.take(1 << 20)[:] = bytes(1 << 20)
        assert bytes(part) == b"keep"

    def test_too_little_memory_is_replaced(self) -> None:
        side = SideBuffer()
        assert side.take(10).nbytes == 10
        assert side.take(1 << 20).nbytes == 1 << 20
        assert side.take(0).nbytes == 0


@pytest.mark.parametrize("num_bytes", [(0, 5), (7, 0), (3 << 20, 1)])
async def test_the_description_has_the_digest_of_each_part(num_bytes: tuple[int, int]) -> None:
    delta, slow = (hashlib.shake_128(b"%d" % size).digest(size) for size in num_bytes)
    progress = await describe(Update(round=3, tokens=9, delta=memoryview(delta), slow=memoryview(slow)))
    assert (progress.round, progress.tokens) == (3, 9)
    assert progress.delta_digest == payload_hash(delta).digest()
    assert progress.base_digest == payload_hash(slow).digest()
    assert len(progress.base_digest) == 32


def test_a_round_s_payload_has_the_length_of_that_round() -> None:
    """As with streaming fragments, which are not all of one length."""
    sizes = {5: (3000, 1000), 6: (200, 3 << 20), 7: (0, 0)}

    async def main() -> None:
        network = MemoryNetwork()
        identities = [Identity.generate(bytes([index]) * 32) for index in range(2)]
        ids = [identity.peer_id for identity in identities]
        async with asyncio.TaskGroup() as group:
            for index, identity in enumerate(identities):
                group.create_task(peer(network, identity, other=ids[1 - index]))

    async def peer(network: MemoryNetwork, identity: Identity, *, other: PeerId) -> None:
        async with (
            MemoryTransport(network, identity.peer_id) as transport,
            Averager(
                transport=transport,
                identity=identity,
                run=RUN,
                payload_bytes=lambda round: sum(sizes[round]),
                max_lag_rounds=0,
            ) as averager,
        ):
            for round, num_bytes in sizes.items():
                update = make_update(identity.peer_id, round=round, num_bytes=num_bytes)
                deadline_s = asyncio.get_running_loop().time() + 60.0
                result = await averager.exchange(update, candidates=[other], deadline_s=deadline_s)
                assert result.remote is not None
                theirs = make_update(other, round=round, num_bytes=num_bytes)
                assert (result.remote.delta, result.remote.slow) == (theirs.delta, theirs.slow)

    run_virtual(main())
