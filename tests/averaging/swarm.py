"""A small swarm of averagers on the in-process network, for the tests here."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from averaging.averager import Averager, ExchangeResult
from averaging.update import Update
from protocol.identity import Identity
from protocol.ids import PeerId, RunId
from protocol.memory import MemoryNetwork, MemoryTransport

__all__ = ["DELTA_BYTES", "RUN", "SLOW_BYTES", "Swarm", "identities", "make_update", "open_swarm"]

RUN = RunId("5a" * 32)
DELTA_BYTES = 3000
SLOW_BYTES = 1000


def identities(num_peers: int) -> list[Identity]:
    """The same keys in every test run."""
    return [Identity.generate(hashlib.sha256(b"peer %d" % i).digest()) for i in range(num_peers)]


def make_update(peer: PeerId, *, round: int = 5, num_bytes: tuple[int, int] = (DELTA_BYTES, SLOW_BYTES)) -> Update:
    """An update whose every byte depends on the peer and the round."""
    payload = hashlib.shake_128(f"{peer} {round}".encode()).digest(sum(num_bytes))
    return Update(
        round=round,
        tokens=1000 + round,
        delta=memoryview(payload)[: num_bytes[0]],
        slow=memoryview(payload)[num_bytes[0] :],
    )


class Swarm:
    """Averagers by index."""

    def __init__(self, network: MemoryNetwork, num_peers: int) -> None:
        self.network = network
        self.identities = identities(num_peers)
        self.ids = [identity.peer_id for identity in self.identities]
        self.transports: list[MemoryTransport] = []
        self.averagers: list[Averager] = []
        self.num_bytes = (DELTA_BYTES, SLOW_BYTES)

    async def exchange(
        self, index: int, *, round: int = 5, deadline_s: float = 60.0, at_s: float = 0.0
    ) -> ExchangeResult:
        """One peer's exchange with everybody as candidates, begun after `at_s`, with `deadline_s` counted from then."""
        await asyncio.sleep(at_s)
        update = make_update(self.ids[index], round=round, num_bytes=self.num_bytes)
        deadline_s += asyncio.get_running_loop().time()
        return await self.averagers[index].exchange(update, candidates=self.ids, deadline_s=deadline_s)

    async def exchange_each(self, **options: float) -> list[ExchangeResult]:
        """The same for all peers at once."""
        tasks = []
        async with asyncio.TaskGroup() as group:
            for index in range(len(self.averagers)):
                tasks.append(group.create_task(self.exchange(index, **options)))  # type: ignore[arg-type]
        return [task.result() for task in tasks]

    def check(self, results: dict[int, ExchangeResult], *, rounds: dict[int, int] | None = None) -> set[frozenset[int]]:
        """Pairs are mutual and each side has exactly the other's bytes; returns the pairs."""
        pairs = set()
        for index, result in results.items():
            assert (result.remote is not None) == (result.outcome == "averaged")
            if result.remote is None:
                continue
            assert result.partner is not None
            partner = self.ids.index(result.partner)
            sent = make_update(result.partner, round=(rounds or {}).get(partner, 5), num_bytes=self.num_bytes)
            assert result.remote.peer == result.partner
            assert (result.remote.round, result.remote.tokens) == (sent.round, sent.tokens)
            assert result.remote.delta == sent.delta
            assert result.remote.slow == sent.slow
            assert results[partner].partner == self.ids[index]
            assert results[partner].outcome == "averaged"
            pairs.add(frozenset({index, partner}))
        return pairs


@asynccontextmanager
async def open_swarm(
    num_peers: int,
    *,
    network: MemoryNetwork | None = None,
    max_lag_rounds: int = 1,
    num_bytes: tuple[int, int] = (DELTA_BYTES, SLOW_BYTES),
    num_silent: int = 0,
    sends_early: bool = False,
) -> AsyncIterator[Swarm]:
    """Running averagers; the last `num_silent` peers have a transport only."""
    swarm = Swarm(network or MemoryNetwork(), num_peers)
    swarm.num_bytes = num_bytes
    async with AsyncExitStack() as stack:
        for index, identity in enumerate(swarm.identities):
            transport = await stack.enter_async_context(MemoryTransport(swarm.network, identity.peer_id))
            if index < num_peers - num_silent:
                averager = Averager(
                    transport=transport,
                    identity=identity,
                    run=RUN,
                    payload_bytes=sum(num_bytes),
                    max_lag_rounds=max_lag_rounds,
                    sends_early=sends_early,
                )
                swarm.averagers.append(await stack.enter_async_context(averager))
            swarm.transports.append(transport)
        yield swarm
        assert not any(transport.incoming.num_bugs for transport in swarm.transports)
