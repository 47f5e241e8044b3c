"""Donors and a joiner on the in-process network, honest and otherwise, for the tests of blobs."""

from __future__ import annotations

import asyncio
import functools
import inspect
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from protocol.blob_exchange import fetch_blob
from protocol.blob_server import BLOB_PROTOCOL, BlobReply, BlobRequest, serve_blobs
from protocol.blobs import BlobStore
from protocol.ids import PeerId
from protocol.memory import LinkSpec, MemoryNetwork, MemoryTransport, run_virtual
from protocol.merkle import LEAF_BYTES, LeafList
from protocol.transport import Handler, Stream
from protocol.wire import read_message, write_bulk, write_message

NUM_LEAVES = 6
DATA = random.Random(7).randbytes((NUM_LEAVES - 1) * LEAF_BYTES + 1234)
LEAVES = LeafList.of_leaves(DATA[start : start + LEAF_BYTES] for start in range(0, len(DATA), LEAF_BYTES))
BLOB = LEAVES.blob
A, B, C, JOINER = (PeerId(name) for name in ("donor-a", "donor-b", "donor-c", "joiner"))


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on a virtual clock."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        run_virtual(test(*args, **kwargs))

    vars(run)["__signature__"] = inspect.signature(test)
    return run


class Swarm:
    """Donors and one joiner on a network of 10 ms and 10 MB/s."""

    def __init__(self, root: Path, stack: AsyncExitStack) -> None:
        self.root = root
        self.network = MemoryNetwork(link=LinkSpec(latency_s=0.01, bytes_per_s=1e7))
        self.stack = stack
        self.store = BlobStore(root / "joiner")
        self.joiner = MemoryTransport(self.network, JOINER)

    async def donor(
        self, name: PeerId, *, handler: Handler | None = None, data: bytes | None = DATA
    ) -> MemoryTransport:
        transport = await self.stack.enter_async_context(MemoryTransport(self.network, name))
        if handler is not None:
            transport.handle(BLOB_PROTOCOL, handler)
            return transport
        store = BlobStore(self.root / name)
        if data is not None:
            store.put(data)
        serve_blobs(transport, store)
        return transport

    def fetch(self, *donors: PeerId, **options: Any) -> Awaitable[Any]:
        options = {"donors": donors, "max_bytes": len(DATA), **options}
        return fetch_blob(BLOB, transport=self.joiner, store=self.store, **options)


@asynccontextmanager
async def swarm(root: Path) -> AsyncIterator[Swarm]:
    async with AsyncExitStack() as stack:
        made = Swarm(root, stack)
        await stack.enter_async_context(made.joiner)
        yield made


def scripted(
    *, on_list: Callable[[Stream], Awaitable[None]] | None = None, on_leaf: Callable[[Stream, int], Awaitable[None]]
) -> Handler:
    """A donor that answers as scripted, honestly where nothing is scripted."""

    async def handler(stream: Stream) -> None:
        while True:
            request = await read_message(stream, BlobRequest)
            if request.leaf is not None:
                await on_leaf(stream, request.leaf)
            elif on_list is not None:
                await on_list(stream)
            else:
                await write_message(stream, BlobReply(status="ok", size_bytes=LEAVES.size_bytes))
                await stream.write(LEAVES.hashes)

    return handler


async def honest_leaf(stream: Stream, index: int) -> None:
    await write_message(stream, BlobReply(status="ok"))
    await write_bulk(stream, DATA[index * LEAF_BYTES : (index + 1) * LEAF_BYTES])


async def lying_leaf(stream: Stream, index: int) -> None:
    await write_message(stream, BlobReply(status="ok"))
    await write_bulk(stream, bytes(LEAVES.leaf_bytes(index)))


async def stalling_leaf(stream: Stream, index: int) -> None:
    await asyncio.Event().wait()


def listing(size_bytes: int | None, hashes: bytes) -> Callable[[Stream], Awaitable[None]]:
    async def on_list(stream: Stream) -> None:
        await write_message(stream, BlobReply(status="ok", size_bytes=size_bytes))
        await stream.write(hashes)

    return on_list


def now_s() -> float:
    return asyncio.get_running_loop().time()
