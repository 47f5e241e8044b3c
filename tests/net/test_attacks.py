"""A stranger with a libp2p node of its own sends bombs to live nodes: they live, stay small, and go on answering."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgpack
import pytest

from averaging.exchange_messages import Offer, Propose
from averaging.search import PROTOCOL
from protocol.directory import bucket_key, validate_entry
from protocol.errors import StreamClosedError, TransportError
from protocol.identity import Identity
from protocol.ids import PeerId, RunId
from protocol.libp2p import Libp2pTransport
from protocol.transport import Stream
from protocol.wire import write_frame, write_message
from tests.net.process import NodeProcess
from tests.net.swarm import Swarm
from tests.protocol.test_libp2p_attacks import Attacker, bomb

pytestmark = [pytest.mark.net, pytest.mark.timeout(240)]

MAX_GROWTH_BYTES = 16 << 20
SOON_S = 60.0


@asynccontextmanager
async def stranger(folder: Path, swarm: Swarm, victim: NodeProcess) -> AsyncIterator[Attacker]:
    """A transport connected to `victim`; afterwards the victim must live, be small, and answer `status`."""
    transport = Libp2pTransport(
        identity=Identity.load_or_create(folder / "key"),
        listen=["/ip4/127.0.0.1/tcp/0"],
        runtime_dir=swarm.temporary / "stranger",
        validator=validate_entry,
    )
    async with transport:
        peer = await transport.connect(victim.address)
        before = victim.rss_bytes
        yield Attacker(transport, peer)
        assert victim.is_alive, victim.errors
        growth = victim.rss_bytes - before
        assert growth < MAX_GROWTH_BYTES, f"{victim.name} grew by {growth / 2**20:.1f} MiB"
    done = await asyncio.to_thread(swarm.command, "status", "--peer", victim.address, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"]["name"] == "my-run"


@pytest.mark.parametrize("role", ["bootstrap", "trainer"])
async def test_nested_messages_to_the_directory(swarm: Swarm, tmp_path: Path, role: str) -> None:
    bootstrap = await asyncio.to_thread(swarm.bootstrap)
    trainers = await asyncio.to_thread(swarm.only, 2)
    victim = bootstrap if role == "bootstrap" else trainers[0]
    run = RunId(bootstrap.wait_for("serving")["run"])
    async with stranger(tmp_path, swarm, victim) as attacker:
        soon_s = time.time() + SOON_S
        for key in ("anything", bucket_key(run, 0, bytes(32))):
            for depth in (7, 300, 5000):
                assert await attacker.is_refused(key, bomb(depth), b"v", soon_s)
                assert await attacker.is_refused(key, msgpack.packb(victim.peer_id), bomb(depth), soon_s)
                assert await attacker.is_refused(key, b"", bomb(depth), soon_s)
    mark = trainers[0].mark()
    await asyncio.to_thread(trainers[0].wait_for_averaging, since=mark)


def frame(payload: bytes) -> bytes:
    return len(payload).to_bytes(4) + payload


BOMBS = {
    "frame of 4 GiB": b"\xff\xff\xff\xff",
    "frame just beyond the limit": ((1 << 16) + 1).to_bytes(4),
    "38 bytes that claim 10 GB": frame(b"\x81\xa7payload\xc6" + b"\xff" * 4 + bytes(20)),
    "map of 4 G": frame(b"\xdf" + b"\xff" * 4 + bytes(30)),
    "300 nested extensions": frame(bomb(300)),
}


async def ends(stream: Stream) -> bool:
    """Whether the other side closes the stream, having sent a short answer at most."""
    try:
        async with asyncio.timeout(10):
            await stream.read_exactly(1024)
    except TransportError:
        return True
    return False


async def test_bombs_in_the_exchange(swarm: Swarm, tmp_path: Path) -> None:
    assert len(BOMBS["38 bytes that claim 10 GB"]) == 38
    bootstrap = await asyncio.to_thread(swarm.bootstrap)
    victim, partner = await asyncio.to_thread(swarm.only, 2)
    run = RunId(bootstrap.wait_for("serving")["run"])
    async with stranger(tmp_path, swarm, victim) as attacker:
        peer, transport = PeerId(attacker.target), attacker.transport
        for data in BOMBS.values():
            async with await transport.open(peer, PROTOCOL) as stream:
                await stream.write(data)
                assert await ends(stream)
        # A proposal as it should be, then an offer of 8 EiB that nobody asked for.
        round = (await asyncio.to_thread(victim.wait_for, "step", since=victim.mark()))["round"]
        async with await transport.open(peer, PROTOCOL) as stream:
            propose = Propose(run=run, round=round + 2, expected_round=round + 2, nonce=bytes(16))
            await write_message(stream, propose)
            with contextlib.suppress(StreamClosedError):  # it may have turned the proposal down by then
                await write_message(stream, huge_offer(run, round + 2, transport.peer_id, peer))
            assert await ends(stream)
        async with await transport.open(peer, PROTOCOL) as stream:
            await write_frame(stream, b"")
            assert await ends(stream)
    for node in (victim, partner):
        await asyncio.to_thread(node.wait_for_averaging, since=node.mark())


def huge_offer(run: RunId, round: int, sender: PeerId, receiver: PeerId) -> Offer:
    return Offer(
        run=run,
        round=round,
        sender=sender,
        receiver=receiver,
        sender_nonce=bytes(16),
        receiver_nonce=bytes(16),
        tokens=2**62,
        num_bytes=2**63 - 1,
        delta_digest=bytes(32),
        base_digest=bytes(32),
        signature=bytes(64),
    )
