"""A node of its own process, for tests that attack or kill it: prints its address and p2pd's pid, serves until stdin ends."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from protocol.identity import Identity
from protocol.libp2p import Libp2pTransport
from protocol.transport import Stream

ECHO = "/llm-node/echo/1"


def validate(key: str, subkey: str, value: bytes, expires_at_s: float, now_s: float) -> bool:
    return key.startswith("run/") and value.startswith(subkey.encode())


async def echo(stream: Stream) -> None:
    while True:
        await stream.write(await stream.read_exactly(1))


async def main(folder: Path) -> None:
    transport = Libp2pTransport(
        identity=Identity.load_or_create(folder / "key"),
        listen=["/ip4/127.0.0.1/tcp/0"],
        runtime_dir=folder / "run",
        validator=validate,
    )
    transport.handle(ECHO, echo)
    async with transport:
        pid = (folder / "run" / "p2pd.pid").read_text().split()[0]
        sys.stdout.write(f"{(await transport.addresses())[0]} {pid}\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
