"""What strangers can send to a node's DHT: the decoder, the storage and the guards, alone and on a live node."""

from __future__ import annotations

import asyncio
import math
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import psutil
import pytest

from protocol.errors import ProtocolError
from protocol.identity import Identity
from protocol.libp2p import Libp2pTransport
from protocol.libp2p_dht import MAX_ENTRIES_PER_KEY, MAX_KEYS, BoundedStorage
from protocol.libp2p_guard import check_response, node_id
from protocol.libp2p_hivemind import DHTID, PeerID, bounded_loads, dht_pb2
from tests.protocol.nodes import answers, transport_in, victim

PEER = Identity.generate(b"\1" * 32).peer_id
net = pytest.mark.net


def bomb(depth: int = 300) -> bytes:
    """A msgpack value of nested extension values, on which hivemind's own loader overflows the C stack."""
    value: Any = None
    for _ in range(depth):
        value = msgpack.ExtType(0x40, msgpack.packb([value]))
    packed: bytes = msgpack.packb(value)
    return packed


def test_the_bomb_is_real() -> None:
    code = "import sys; from hivemind.utils import MSGPackSerializer as s; s.loads(sys.stdin.buffer.read())"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, input=bomb(5000), capture_output=True, check=False)
    assert done.returncode == -signal.SIGSEGV


def test_the_bounded_loader_refuses_the_bomb() -> None:
    with pytest.raises(ProtocolError):
        bounded_loads(bomb())


@pytest.mark.parametrize("expiry_s", [math.inf, -math.inf, math.nan, 0.0, 1e300])
def test_storage_refuses_impossible_expiries(expiry_s: float) -> None:
    storage = BoundedStorage()
    assert not storage.store_subkey(DHTID(1), "s", b"v", expiry_s)
    assert storage.get(DHTID(1)) is None


def test_storage_keeps_dictionaries_only() -> None:
    assert not BoundedStorage().store(DHTID(1), b"v", time.time() + 60)


def test_an_older_record_neither_replaces_nor_shortens_a_newer_one() -> None:
    storage, now_s = BoundedStorage(), time.time()
    assert storage.store_subkey(DHTID(1), "s", b"new", now_s + 60)
    assert not storage.store_subkey(DHTID(1), "s", b"old", now_s + 30)
    found = storage.get(DHTID(1))
    assert found is not None
    assert found.value.get("s") == (b"new", now_s + 60)


def test_a_flood_fills_bounded_storage_and_honest_updates_go_on() -> None:
    storage, now_s = BoundedStorage(), time.time()
    honest = DHTID(7)
    assert storage.store_subkey(honest, "me", b"1", now_s + 60)
    kept = sum(storage.store_subkey(honest, f"sybil {n}", bytes(8), now_s + 60) for n in range(2000))
    assert kept == MAX_ENTRIES_PER_KEY - 1
    kept = sum(storage.store_subkey(DHTID(n), "x", bytes(4000), now_s + 60) for n in range(100, 5000))
    assert kept == MAX_KEYS - 1
    assert storage.store_subkey(honest, "me", b"2", now_s + 61)
    assert storage.total_bytes <= MAX_KEYS * 4000 + MAX_ENTRIES_PER_KEY * 8


def test_answers_that_would_stop_or_bend_a_search_are_refused() -> None:
    peer, other = PeerID.from_base58(PEER), PeerID.from_base58(Identity.generate(b"\2" * 32).peer_id)
    endless = dht_pb2.FindResult(type=dht_pb2.FOUND_DICTIONARY, value=b"", expiration_time=math.inf)
    forged = dht_pb2.FindResult(nearest_node_ids=[node_id(peer).to_bytes()], nearest_peer_ids=[other.to_bytes()])
    honest = dht_pb2.FindResult(nearest_node_ids=[node_id(other).to_bytes()], nearest_peer_ids=[other.to_bytes()])
    check_response(dht_pb2.FindResponse(results=[honest]), peer)
    for bad in (endless, forged):
        with pytest.raises(ProtocolError):
            check_response(dht_pb2.FindResponse(results=[bad]), peer)
    with pytest.raises(ProtocolError):
        check_response(dht_pb2.PingResponse(peer=dht_pb2.NodeInfo(node_id=node_id(other).to_bytes())), peer)


class Attacker:
    """Sends hand-made DHT calls to one node."""

    def __init__(self, transport: Libp2pTransport, target: str) -> None:
        self.transport = transport
        self.target = target

    async def store(self, key: str, subkey: bytes, value: bytes, expiry_s: float, **fields: Any) -> list[bool]:
        request = dht_pb2.StoreRequest(
            keys=[DHTID.generate(source=key).to_bytes()],
            subkeys=[subkey],
            values=[value],
            expiration_time=[expiry_s],
            in_cache=[fields.pop("in_cache", False)],
            **fields,
        )
        return list((await self.call("rpc_store", request, dht_pb2.StoreResponse)).store_ok)

    async def call(self, name: str, request: Any, response_type: Any) -> Any:
        return await asyncio.wait_for(
            self.transport.daemon.call_protobuf_handler(
                PeerID.from_base58(self.target), f"DHTProtocol.{name}", request, response_type
            ),
            10,
        )

    async def is_refused(self, *args: Any, **fields: Any) -> bool:
        try:
            return await self.store(*args, **fields) == [False]
        except Exception as error:  # hivemind's own type, and the remote's words in it
            return type(error).__name__ == "P2PHandlerError"


@asynccontextmanager
async def attack(tmp_path: Path) -> AsyncIterator[tuple[Attacker, psutil.Process]]:
    with victim(tmp_path / "victim") as (process, address, _):
        async with transport_in(tmp_path / "attacker") as transport:
            peer = await transport.connect(address)
            assert await answers(transport, peer)
            yield Attacker(transport, peer), psutil.Process(process.pid)
            assert process.poll() is None, "the node died"
            assert await answers(transport, peer)


@net
async def test_a_node_survives_the_nested_bomb(tmp_path: Path) -> None:
    async with attack(tmp_path) as (attacker, process):
        soon_s = time.time() + 60
        before = process.memory_info().rss
        for depth in (7, 300, 5000):
            assert await attacker.is_refused("run/x", bomb(depth), b"v", soon_s)
            assert await attacker.is_refused("run/x", msgpack.packb("me"), bomb(depth), soon_s)
            assert await attacker.is_refused("run/x", b"", bomb(depth), soon_s)  # as a whole dictionary
        wide = b"\xdd\x7f\xff\xff\xff" + bytes(100_000)
        assert await attacker.is_refused("run/x", wide, b"v", soon_s)
        assert process.memory_info().rss - before < 16 << 20
        assert await attacker.store("run/x", msgpack.packb("me"), msgpack.packb(["run/x", b"me"]), soon_s) == [True]


@net
async def test_poisoned_records_are_refused_and_honest_ones_kept(tmp_path: Path) -> None:
    async with attack(tmp_path) as (attacker, _):
        soon_s = time.time() + 60
        me, good = msgpack.packb("me"), msgpack.packb(["run/x", b"me: hello"])
        for expiry_s in (math.inf, math.nan, time.time() + 3600, time.time() - 1):
            assert await attacker.is_refused("run/x", me, good, expiry_s)
        assert await attacker.is_refused("run/other", me, good, soon_s)  # the key inside is another
        assert await attacker.is_refused("run/x", msgpack.packb("you"), good, soon_s)  # the validator's business
        assert await attacker.is_refused("run/x", msgpack.packb(None), good, soon_s)  # a plain value
        assert await attacker.is_refused("run/x", msgpack.packb(7), good, soon_s)
        assert await attacker.is_refused("run/x", me, good, soon_s, in_cache=True)
        assert await attacker.is_refused("run/x", me, msgpack.packb(["run/x", b"me" + bytes(5000)]), soon_s)
        forged = dht_pb2.NodeInfo(node_id=bytes(20))
        assert await attacker.is_refused("run/x", me, good, soon_s, peer=forged)
        assert await attacker.store("run/x", me, good, soon_s) == [True]
        assert [entry.value for entry in await attacker.transport.dht.get("run/x")] == [b"me: hello"]


@net
async def test_a_flood_is_bounded(tmp_path: Path) -> None:
    async with attack(tmp_path) as (attacker, process):
        soon_s = time.time() + 60
        before = process.memory_info().rss

        async def burst(start: int) -> None:
            numbers = range(start, start + 60)
            request = dht_pb2.StoreRequest(
                keys=[DHTID.generate(source="run/x").to_bytes() for _ in numbers],
                subkeys=[msgpack.packb(f"{number}") for number in numbers],
                values=[msgpack.packb(["run/x", b"%d" % number + bytes(4000)]) for number in numbers],
                expiration_time=[soon_s for _ in numbers],
                in_cache=[False for _ in numbers],
            )
            await attacker.call("rpc_store", request, dht_pb2.StoreResponse)

        for start in range(0, 3000, 300):
            await asyncio.gather(*(burst(start + offset) for offset in range(0, 300, 60)))
        assert process.memory_info().rss - before < 16 << 20
        assert len(await attacker.transport.dht.get("run/x")) <= MAX_ENTRIES_PER_KEY
