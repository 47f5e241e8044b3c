"""Real nodes for tests: in this process, or in a process of their own that can be attacked and killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.libp2p import Libp2pTransport
from tests.protocol.victim import ECHO, echo, validate

__all__ = ["answers", "transport_in", "victim"]

_ROOT = Path(__file__).parents[2]


def transport_in(folder: Path, **options: Any) -> Libp2pTransport:
    options.setdefault("listen", ["/ip4/127.0.0.1/tcp/0"])
    options.setdefault("validator", validate)
    transport = Libp2pTransport(identity=Identity.load_or_create(folder / "key"), runtime_dir=folder / "run", **options)
    transport.handle(ECHO, echo)
    return transport


async def answers(transport: Libp2pTransport, peer: PeerId) -> bool:
    async with await transport.open(peer, ECHO) as stream:
        await stream.write(b"x")
        return await stream.read_exactly(1) == b"x"


@contextmanager
def victim(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str, psutil.Process]]:
    """A node in a process of its own: (process, address, its p2pd)."""
    command = [sys.executable, "-m", "tests.protocol.victim", str(folder)]
    with subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address, pid = process.stdout.readline().split()
            yield process, address, psutil.Process(int(pid))
        finally:
            process.kill()
