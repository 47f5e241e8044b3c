"""Peers with a Δ each and a `GroupAverager`, on the in-process network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import torch
from torch import Tensor

from averaging.allreduce import GroupAverager, GroupResult
from averaging.codec import Codec, codec_named, payload_tensor
from averaging.update import Update
from protocol.identity import Identity
from protocol.memory import LinkSpec, MemoryNetwork, MemoryTransport
from tests.averaging.swarm import RUN, identities

__all__ = ["Members", "decoded", "delta_of", "encoded_update", "open_members"]

NUMEL = 5 * 4096 + 100


def delta_of(index: int, round: int = 5, numel: int = NUMEL) -> Tensor:
    """Δ of one peer: a part that all share, and one of its own."""
    shared = torch.randn(numel, generator=torch.Generator().manual_seed(1000 + round))
    own = torch.randn(numel, generator=torch.Generator().manual_seed(10 * index + round))
    return 0.01 * (shared + 0.5 * own)


def encoded_update(delta: Tensor, codec: Codec, *, round: int = 5, tokens: int = 1000) -> Update:
    payload = bytearray(codec.num_bytes(delta.numel()))
    if payload:
        codec.encode(delta, torch.frombuffer(payload, dtype=torch.uint8))
    return Update(round=round, tokens=tokens, delta=memoryview(payload), slow=memoryview(b""))


def decoded(payload: memoryview | None, codec: Codec, numel: int = NUMEL) -> Tensor:
    assert payload is not None
    out = torch.empty(numel)
    codec.decode(payload_tensor(payload, num_bytes=codec.num_bytes(numel), device=out.device), out)
    return out


class Members:
    """By index; the last `num_silent` have a transport only."""

    def __init__(self, network: MemoryNetwork, num_peers: int, codec: Codec, numel: int) -> None:
        self.network, self.codec, self.numel = network, codec, numel
        self.identities: list[Identity] = sorted(identities(num_peers), key=lambda identity: identity.peer_id)
        self.ids = [identity.peer_id for identity in self.identities]
        self.transports: list[MemoryTransport] = []
        self.averagers: list[GroupAverager] = []

    async def reduce(
        self,
        index: int,
        *,
        round: int = 5,
        tokens: int = 1000,
        deadline_s: float = 60.0,
        at_s: float = 0.0,
        delta: Tensor | None = None,
        candidates: Sequence[int] | None = None,
    ) -> GroupResult:
        """One peer's round, begun after `at_s`, with `deadline_s` counted from then."""
        await asyncio.sleep(at_s)
        values = delta_of(index, round, self.numel) if delta is None else delta
        return await self.averagers[index].reduce(
            encoded_update(values, self.codec, round=round, tokens=tokens),
            candidates=self.ids if candidates is None else [self.ids[other] for other in candidates],
            deadline_s=asyncio.get_running_loop().time() + deadline_s,
        )

    async def reduce_each(self, **options: float) -> list[GroupResult]:
        """The same for all peers at once."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self.reduce(index, **options))  # type: ignore[arg-type]
                for index in range(len(self.averagers))
            ]
        return [task.result() for task in tasks]

    def sent(self, index: int, round: int = 5) -> Tensor:
        """What a peer's encoded Δ stands for."""
        return decoded(encoded_update(delta_of(index, round, self.numel), self.codec).delta, self.codec, self.numel)


@asynccontextmanager
async def open_members(
    num_peers: int,
    *,
    codec: str = "q8",
    numel: int = NUMEL,
    network: MemoryNetwork | None = None,
    num_silent: int = 0,
) -> AsyncIterator[Members]:
    """Running averagers; nothing may have been a bug when it ends."""
    members = Members(network or MemoryNetwork(link=LinkSpec(latency_s=0.01)), num_peers, codec_named(codec), numel)
    async with AsyncExitStack() as stack:
        for index, identity in enumerate(members.identities):
            transport = await stack.enter_async_context(MemoryTransport(members.network, identity.peer_id))
            members.transports.append(transport)
            if index < num_peers - num_silent:
                averager = GroupAverager(
                    transport=transport, identity=identity, run=RUN, codec=members.codec, numel=numel
                )
                members.averagers.append(await stack.enter_async_context(averager))
        yield members
        assert not any(transport.incoming.num_bugs for transport in members.transports)
