"""The signed manifest: only the organiser's signature over exactly these bytes is taken, from a file or from a peer."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings

from protocol.errors import DeadlineError, PeerUnreachableError, ProtocolError, StreamClosedError, UserError
from protocol.memory import LinkSpec, MemoryNetwork, MemoryTransport, run_virtual
from protocol.publication import MANIFEST_PROTOCOL, SignedManifest, fetch_manifest, publish_manifest
from protocol.transport import Handler, Stream
from protocol.wire import MAX_HEADER_BYTES, write_frame
from tests.protocol.samples import damaged, identity, manifest

ORGANISER, PEER, NEWCOMER = identity(0), identity(1), identity(2)
SIGNED = SignedManifest.sign(manifest(ORGANISER), ORGANISER)


def test_pack_and_unpack() -> None:
    assert SignedManifest.unpack(SIGNED.pack()) == SIGNED
    assert SIGNED.pack()[64:] == SIGNED.manifest.canonical()


def test_only_the_organiser_signs() -> None:
    with pytest.raises(UserError, match="use the organiser's identity"):
        SignedManifest.sign(manifest(ORGANISER), PEER)


def test_somebody_else_s_signature_is_refused() -> None:
    canonical = SIGNED.manifest.canonical()
    with pytest.raises(UserError, match="not signed by the organiser"):
        SignedManifest.unpack(PEER.sign("manifest", canonical) + canonical)


def test_a_signature_for_another_purpose_is_refused() -> None:
    canonical = SIGNED.manifest.canonical()
    with pytest.raises(UserError, match="not signed by the organiser"):
        SignedManifest.unpack(ORGANISER.sign("record", canonical) + canonical)


def test_signed_nonsense_is_still_refused() -> None:
    for canonical in (b"", b"null", b"[]", b"{}", b"[" * 60_000, SIGNED.manifest.canonical().replace(b":0.7", b":9.7")):
        with pytest.raises(UserError) as error:
            SignedManifest.unpack(ORGANISER.sign("manifest", canonical) + canonical)
        assert str(error.value).isprintable()


def test_the_sender_s_words_are_escaped() -> None:
    canonical = SIGNED.manifest.canonical().replace(b'"name":', b'"\\u001b[2J\\u202e":0,"name":')
    with pytest.raises(UserError, match="unknown key") as error:
        SignedManifest.unpack(ORGANISER.sign("manifest", canonical) + canonical)
    assert str(error.value).isprintable()


def test_too_long_is_refused_unread() -> None:
    with pytest.raises(UserError, match="longer than"):
        SignedManifest.unpack(SIGNED.pack() + bytes(MAX_HEADER_BYTES))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=damaged(SIGNED.pack()))
def test_any_damage_is_a_user_error_in_one_line(data: bytes) -> None:
    if data == SIGNED.pack():
        return
    with pytest.raises(UserError) as error:
        SignedManifest.unpack(data)
    assert str(error.value).isprintable()


def fetch_from(handler: Handler | None, link: LinkSpec | None = None) -> SignedManifest:
    """What a newcomer gets from a peer that runs `handler` (or publishes properly)."""

    async def scenario() -> SignedManifest:
        network = MemoryNetwork(link=link)
        async with (
            MemoryTransport(network, PEER.peer_id) as peer,
            MemoryTransport(network, NEWCOMER.peer_id) as newcomer,
        ):
            if handler is None:
                publish_manifest(peer, SIGNED)
            else:
                peer.handle(MANIFEST_PROTOCOL, handler)
            return await fetch_manifest(newcomer, PEER.peer_id)

    return run_virtual(scenario())


def test_any_peer_hands_it_to_a_newcomer() -> None:
    assert fetch_from(None, LinkSpec(latency_s=0.2, bytes_per_s=10_000)) == SIGNED


def test_a_bad_manifest_is_blamed_on_the_peer() -> None:
    async def lie(stream: Stream) -> None:
        await write_frame(stream, SIGNED.pack().replace(b"a-test", b"b-test"))

    with pytest.raises(ProtocolError, match="not signed") as error:
        fetch_from(lie)
    assert error.value.peer == PEER.peer_id


def test_a_terabyte_manifest_is_refused_at_once() -> None:
    async def bomb(stream: Stream) -> None:
        await stream.write(b"\xff\xff\xff\xff" + bytes(1000))

    with pytest.raises(ProtocolError, match="allowed") as error:
        fetch_from(bomb)
    assert error.value.peer == PEER.peer_id


def test_a_silent_peer_costs_the_deadline() -> None:
    async def stall(stream: Stream) -> None:
        await asyncio.Event().wait()

    with pytest.raises(DeadlineError, match="within 20 s"):
        fetch_from(stall)


def test_a_peer_that_goes_away() -> None:
    async def leave(stream: Stream) -> None:
        await stream.write(b"\0\0\1")

    with pytest.raises(StreamClosedError):
        fetch_from(leave)


def test_a_peer_without_a_manifest() -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        async with MemoryTransport(network, PEER.peer_id), MemoryTransport(network, NEWCOMER.peer_id) as newcomer:
            with pytest.raises(PeerUnreachableError):
                await fetch_manifest(newcomer, PEER.peer_id)

    run_virtual(scenario())
