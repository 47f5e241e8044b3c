"""Transports of either kind, for what every transport promises."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from protocol.dht_rules import Validator
from protocol.identity import Identity
from protocol.memory import MemoryNetwork, MemoryTransport
from protocol.transport import Stream, Transport

__all__ = ["ECHO", "World", "ask", "echo", "serve", "write_until_it_fails"]

ECHO = "/llm-node/echo/1"


class World:
    """Makes transports of one kind, each joined to the first."""

    def __init__(self, kind: str, folder: Path, stack: AsyncExitStack) -> None:
        self.kind = kind
        self.transports: list[Transport] = []
        self._folder = folder
        self._stack = stack
        self._network = MemoryNetwork()

    async def peer(self, *, validator: Validator | None = None, alone: bool = False) -> Transport:
        index = len(self.transports)
        invitations = [] if alone or not self.transports else await self.transports[0].addresses()
        transport: Transport
        if self.kind == "memory":
            identity = Identity.generate(bytes([index]) * 32)
            transport = MemoryTransport(self._network, identity.peer_id, validator=validator)
        else:
            from protocol.libp2p import Libp2pTransport

            transport = Libp2pTransport(
                identity=Identity.load_or_create(self._folder / f"{index}" / "key"),
                listen=["/ip4/127.0.0.1/tcp/0"],
                initial_peers=invitations,
                runtime_dir=self._folder / f"{index}" / "run",
                validator=validator,
            )
        await self._stack.enter_async_context(transport)
        self.transports.append(transport)
        return transport

    async def pair(self) -> tuple[Transport, Transport]:
        return await self.peer(), await self.peer()


async def serve(transport: Transport, protocol: str, handler: object) -> None:
    transport.handle(protocol, handler)  # type: ignore[arg-type]
    await transport.addresses()  # any call to a transport settles its registrations


async def echo(stream: Stream) -> None:
    while True:
        num_bytes = int.from_bytes(await stream.read_exactly(4), "big")
        await stream.write(await stream.read_exactly(num_bytes))


async def ask(stream: Stream, data: bytes) -> bytes:
    async with asyncio.TaskGroup() as group:
        answer = group.create_task(stream.read_exactly(len(data)))
        await stream.write(len(data).to_bytes(4, "big"))
        await stream.write(data)
    return answer.result()


async def write_until_it_fails(stream: Stream) -> None:
    async with asyncio.timeout(10):
        while True:
            await stream.write(bytes(65_536))
