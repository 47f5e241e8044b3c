"""Hostile bytes against whatever reads streams here: huge claims, trickles and tiny bombs cost neither memory nor time."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given

from protocol import blob_server
from protocol.blob_exchange import BlobUnavailableError, fetch_blob
from protocol.blob_server import BLOB_PROTOCOL, BlobReply, BlobRequest, serve_blobs
from protocol.blobs import BlobStore
from protocol.directory import unpack_record, validate_entry
from protocol.errors import DeadlineError, LlmNodeError, ProtocolError, StreamClosedError
from protocol.ids import PeerId
from protocol.memory import MemoryNetwork, MemoryTransport, run_virtual
from protocol.merkle import LEAF_BYTES, MAX_BLOB_BYTES, LeafList
from protocol.publication import MANIFEST_PROTOCOL, SignedManifest, fetch_manifest
from protocol.transport import Handler, Stream
from protocol.wire import decode_message, encode_message, pack, write_frame, write_message
from tests.protocol.samples import damaged

ROOT = Path(__file__).parents[2]
BLOB = LeafList.of_leaves([b"x" * 100]).blob
VICTIM, ATTACKER = PeerId("victim"), PeerId("attacker")
OVERSIZE_HEADERS = [bytes([255] * 4), (65_537).to_bytes(4)]


@asynccontextmanager
async def two_peers() -> AsyncIterator[tuple[MemoryTransport, MemoryTransport]]:
    network = MemoryNetwork()
    async with MemoryTransport(network, VICTIM) as victim, MemoryTransport(network, ATTACKER) as attacker:
        yield victim, attacker


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def trickle(stream: Stream, data: bytes, *, interval_s: float) -> None:
    """Send one byte at a time, until the other side has had enough."""
    try:
        for byte in data:
            await stream.write(bytes([byte]))
            await asyncio.sleep(interval_s)
    except StreamClosedError:
        return


async def ended(stream: Stream) -> float:
    """Wait for the other side to end the stream; the time when it did."""
    with pytest.raises(StreamClosedError):
        await stream.read_exactly(1)
    return now_s()


# ---- a stranger opens a stream to us -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", OVERSIZE_HEADERS)
def test_an_oversize_frame_closes_the_stream_at_once_and_is_counted(tmp_path: Path, header: bytes) -> None:
    async def attack() -> None:
        async with two_peers() as (victim, attacker):
            serve_blobs(victim, BlobStore(tmp_path))
            async with await attacker.open(VICTIM, BLOB_PROTOCOL) as stream:
                await stream.write(header)
                assert await ended(stream) == 0.0
            assert victim.incoming.violations[ATTACKER] == 1

    tracemalloc.start()
    try:
        run_virtual(attack())
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_trickled_request_ends_at_the_deadline_of_the_whole(tmp_path: Path) -> None:
    async def attack() -> None:
        async with two_peers() as (victim, attacker):
            serve_blobs(victim, BlobStore(tmp_path))
            async with await attacker.open(VICTIM, BLOB_PROTOCOL) as stream, asyncio.TaskGroup() as group:
                request = encode_message(BlobRequest(blob=BLOB, leaf=None))
                group.create_task(trickle(stream, len(request).to_bytes(4) + request, interval_s=7.0))
                assert await ended(stream) <= blob_server.IDLE_TIMEOUT_S

    run_virtual(attack())


def test_garbage_is_counted_and_does_not_stop_the_service(tmp_path: Path) -> None:
    async def attack() -> None:
        async with two_peers() as (victim, attacker):
            store = BlobStore(tmp_path / "victim")
            assert store.put(b"x" * 100) == BLOB
            serve_blobs(victim, store)
            for index, bomb in enumerate(MSGPACK_BOMBS.values(), start=1):
                async with await attacker.open(VICTIM, BLOB_PROTOCOL) as stream:
                    await write_frame(stream, bomb)
                    assert await ended(stream) == 0.0
                assert victim.incoming.violations[ATTACKER] == index
            assert victim.incoming.num_bugs == 0
            other = BlobStore(tmp_path / "other")
            await fetch_blob(BLOB, transport=attacker, store=other, donors=[VICTIM], max_bytes=100)
            assert other.has(BLOB)

    run_virtual(attack())


# ---- we open a stream to a stranger ------------------------------------------------------------------------------------------


def fetch_manifest_from(handler: Handler, *, expect: type[LlmNodeError]) -> tuple[LlmNodeError, float]:
    """The error that fetching the manifest from an evil peer ends in, and the virtual time it took."""

    async def attack() -> tuple[LlmNodeError, float]:
        async with two_peers() as (victim, attacker):
            attacker.handle(MANIFEST_PROTOCOL, handler)
            with pytest.raises(expect) as caught:
                await fetch_manifest(victim, ATTACKER)
            return caught.value, now_s()

    return run_virtual(attack())


@pytest.mark.parametrize("header", OVERSIZE_HEADERS)
def test_a_manifest_that_claims_too_much_is_not_waited_for(header: bytes) -> None:
    async def serve(stream: Stream) -> None:
        await stream.write(header)
        await asyncio.Event().wait()

    error, took_s = fetch_manifest_from(serve, expect=ProtocolError)
    assert isinstance(error, ProtocolError)
    assert error.peer == ATTACKER
    assert took_s == 0.0


def test_a_trickled_manifest_ends_at_its_deadline() -> None:
    async def serve(stream: Stream) -> None:
        await trickle(stream, (60_000).to_bytes(4) + bytes(60_000), interval_s=1.0)

    _, took_s = fetch_manifest_from(serve, expect=DeadlineError)
    assert took_s == pytest.approx(20.0)


JSON_BOMBS = {
    "deep list": b"[" * 60_000,
    "deep object": b'{"a":' * 12_000,
    "deep inside a field": b'{"model":' + b"[" * 60_000,
    "long integer": b'{"format":' + b"9" * 60_000 + b"}",
    "large exponent": b'{"format":1e999999999}',
    "duplicate keys": b'{"format":1,"format":1}',
    "no text": bytes(range(256)) * 100,
    "nothing": b"",
}


@pytest.mark.parametrize("bomb", JSON_BOMBS.values(), ids=JSON_BOMBS.keys())
def test_a_manifest_of_bombs_is_one_printable_line(bomb: bytes) -> None:
    async def serve(stream: Stream) -> None:
        await write_frame(stream, bytes(64) + bomb)

    started_s = time.perf_counter()
    error, _ = fetch_manifest_from(serve, expect=ProtocolError)
    assert time.perf_counter() - started_s < 1.0
    assert str(error).isprintable()
    assert len(str(error)) < 1000


@pytest.mark.parametrize("header", OVERSIZE_HEADERS)
def test_a_donor_s_oversize_header_is_a_violation(tmp_path: Path, header: bytes) -> None:
    async def attack() -> None:
        async def serve(stream: Stream) -> None:
            await stream.write(header)
            await asyncio.Event().wait()

        async with two_peers() as (victim, attacker):
            attacker.handle(BLOB_PROTOCOL, serve)
            with pytest.raises(BlobUnavailableError) as caught:
                await fetch_blob(BLOB, transport=victim, store=BlobStore(tmp_path), donors=[ATTACKER], max_bytes=100)
            assert [error.peer for error in caught.value.report.violations] == [ATTACKER]
            assert now_s() < 1.0

    run_virtual(attack())


def test_a_few_bytes_that_claim_a_huge_blob_reserve_nothing(tmp_path: Path) -> None:
    async def attack() -> None:
        async def serve(stream: Stream) -> None:
            await write_message(stream, BlobReply(status="ok", size_bytes=MAX_BLOB_BYTES))
            await asyncio.Event().wait()

        async with two_peers() as (victim, attacker):
            attacker.handle(BLOB_PROTOCOL, serve)
            store = BlobStore(tmp_path)
            with pytest.raises(BlobUnavailableError):
                await fetch_blob(BLOB, transport=victim, store=store, donors=[ATTACKER], max_bytes=MAX_BLOB_BYTES)
            assert not list(store.root.iterdir())

    tracemalloc.start()
    try:
        run_virtual(attack())
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


# ---- tiny bombs against every decoder ------------------------------------------------------------------------------------------


MSGPACK_BOMBS = {
    "binary of 4 GiB": b"\xc6" + b"\xff" * 4,
    "text of 4 GiB": b"\xdb" + b"\xff" * 4,
    "list of 4 G": b"\xdd" + b"\xff" * 4,
    "map of 4 G": b"\xdf" + b"\xff" * 4,
    "extension of 4 GiB": b"\xc9" + b"\xff" * 4 + b"\x40",
    "list of 4 G in a field": b"\x82\xa4blob\xdd" + b"\xff" * 4 + b"\xa4leaf\xc0",
    "map of 4 G in a list": b"\x91" * 3 + b"\xdf" + b"\xff" * 4,
    "lists of 64 k in lists": b"\xdc\xff\xff" * 12,
    "300 nested extensions": b"".join(b"\xc8" + (4 * left).to_bytes(2) + b"\x50" for left in range(299, -1, -1)),
    "20,000 nested lists": b"\x91" * 20_000,
}

DECODERS: dict[str, Callable[[bytes], object]] = {
    "request": lambda data: decode_message(data, BlobRequest),
    "reply": lambda data: decode_message(data, BlobReply),
    "record": lambda data: unpack_record(bytes(64) + data, run=None),
    "manifest": lambda data: SignedManifest.unpack(bytes(64) + data),
    "leaf list of the largest blob": lambda data: LeafList.checked(BLOB, size_bytes=MAX_BLOB_BYTES, hashes=data),
    "leaf list of more than that": lambda data: LeafList.checked(BLOB, size_bytes=2**63, hashes=data),
}


def survive_bombs() -> None:
    """Feed every bomb to every decoder with 16 MiB of address space to spare; run in a process of its own."""
    vm_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (vm_bytes + (16 << 20), resource.RLIM_INFINITY))
    for decoder in DECODERS.values():
        for bomb in (MSGPACK_BOMBS | JSON_BOMBS).values():
            started_s = time.perf_counter()
            with pytest.raises(LlmNodeError):
                decoder(bomb)
            assert time.perf_counter() - started_s < 0.5
    run = "ab" * 32
    for bomb in MSGPACK_BOMBS.values():
        assert not validate_entry(f"{run}/peers/0/0", "12D3KooW" + "a" * 44, bytes(64) + bomb, 1e9 + 60, 1e9)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's address space limit")
def test_no_bomb_takes_memory_or_kills_the_process() -> None:
    script = "from tests.protocol.test_attacks_stream import survive_bombs; survive_bombs()"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@given(damaged(encode_message(BlobRequest(blob=BLOB, leaf=3))))
def test_a_damaged_request_is_a_request_or_a_protocol_error(data: bytes) -> None:
    try:
        request = decode_message(data, BlobRequest)
    except ProtocolError:
        return
    assert decode_message(encode_message(request), BlobRequest) == request
    assert set(request.blob) <= set("0123456789abcdef")


@given(damaged(encode_message(BlobReply(status="ok", size_bytes=LEAF_BYTES))))
def test_a_damaged_reply_is_a_reply_or_a_protocol_error(data: bytes) -> None:
    try:
        reply = decode_message(data, BlobReply)
    except ProtocolError:
        return
    assert reply.size_bytes is None or 0 <= reply.size_bytes <= MAX_BLOB_BYTES


@pytest.mark.parametrize("blob", ["../x", "/etc/passwd", BLOB.upper(), BLOB + "\n", BLOB[:-1], "\0" * 64, "１" * 64])
def test_no_request_names_anything_but_a_blob(blob: str) -> None:
    with pytest.raises(ProtocolError):
        decode_message(pack({"blob": blob, "leaf": None}), BlobRequest)
