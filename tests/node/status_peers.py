"""Peers for test_status.py, made with py-libp2p: one honest, the others not. Run as a program; it ends with its standard input.

Prints one JSON object: what each peer does → its address.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import libp2p
import trio
from libp2p.abc import INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from multiaddr import Multiaddr

from bootstrap.document import STATUS_PROTOCOL


def _frame(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def answers(document: bytes) -> dict[str, bytes]:
    """What each kind of peer writes before it closes the stream."""
    return {
        "honest": _frame(document),
        "garbage": _frame(b"\x00\xff" * 300),
        "foreign": _frame(b'{"hello": "world"}'),
        "huge": (2**32 - 1).to_bytes(4, "big") + b"x" * 1000,
        "short": _frame(document)[:-10],
        "empty": b"",
    }


def _handler(answer: bytes) -> Callable[[INetStream], Awaitable[None]]:
    async def handle(stream: INetStream) -> None:
        if answer:
            await stream.write(answer)
        await stream.close()

    return handle


async def _hang(_stream: INetStream) -> None:
    await trio.sleep_forever()


async def main() -> None:
    """Serve every kind until standard input ends."""
    handlers = {kind: _handler(answer) for kind, answer in answers(sys.stdin.buffer.readline().strip()).items()}
    async with AsyncExitStack() as stack:
        addresses = {}
        for kind, handler in {**handlers, "hanging": _hang, "other": None}.items():
            host = libp2p.new_host(key_pair=create_new_key_pair())
            await stack.enter_async_context(host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]))
            if handler is not None:
                host.set_stream_handler(TProtocol(STATUS_PROTOCOL), handler)
            port = host.get_addrs()[0].value_for_protocol("tcp")
            addresses[kind] = f"/ip4/127.0.0.1/tcp/{port}/p2p/{host.get_id()}"
        sys.stdout.write(json.dumps(addresses) + "\n")
        sys.stdout.flush()
        await trio.to_thread.run_sync(sys.stdin.buffer.read)
    # The hosts' own tasks may outlive a broken peer; the process ends here either way.


if __name__ == "__main__":
    trio.run(main)
