"""A node on the real transport that serves one status document; prints its address, serves until standard input ends."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from bootstrap.status_stream import serve_status
from protocol.identity import Identity
from protocol.libp2p import Libp2pTransport
from tests.bootstrap.samples import document_of, record


async def main(folder: Path) -> None:
    """Serve."""
    transport = Libp2pTransport(
        identity=Identity.load_or_create(folder / "key"),
        listen=["/ip4/127.0.0.1/tcp/0"],
        runtime_dir=folder / "run",
        validator=None,
    )
    document = document_of(*(record(i, name=f"Zoë {i}") for i in range(400)))
    serve_status(transport, lambda: document)
    async with transport:
        sys.stdout.write((await transport.addresses())[0] + "\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
