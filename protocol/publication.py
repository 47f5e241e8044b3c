"""The signed manifest, and how peers hand it to a newcomer.

A signed manifest is 64 bytes of Ed25519 signature followed by the manifest's canonical bytes. The organiser's peer id stands in the
manifest, so nothing else is needed to check it, and any peer can serve it: whom it came from does not matter. A newcomer
opens `/llm-node/manifest/1` and reads one frame.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Self

from protocol.errors import DeadlineError, ProtocolError, UserError
from protocol.identity import SIGNATURE_BYTES, Identity, verify
from protocol.ids import PeerId
from protocol.manifest import Manifest
from protocol.transport import Stream, Transport
from protocol.wire import MAX_HEADER_BYTES, read_frame, write_frame

__all__ = ["MANIFEST_PROTOCOL", "SignedManifest", "fetch_manifest", "publish_manifest"]

MANIFEST_PROTOCOL = "/llm-node/manifest/1"
_DOMAIN = "manifest"


@dataclass(frozen=True, slots=True)
class SignedManifest:
    """A manifest with its organiser's signature. Make one with `sign` or `unpack`: both leave only sound ones."""

    manifest: Manifest
    signature: bytes

    @classmethod
    def sign(cls, manifest: Manifest, identity: Identity) -> Self:
        """Sign `manifest` with the organiser's key.

        Raises:
            UserError: `identity` is not the organiser that the manifest names.
        """
        if identity.peer_id != manifest.organiser:
            raise UserError(
                f"the manifest names {manifest.organiser} as organiser, but this identity is {identity.peer_id}; "
                "use the organiser's identity or change that line"
            )
        return cls(manifest, identity.sign(_DOMAIN, manifest.canonical()))

    def pack(self) -> bytes:
        """The bytes that `unpack` takes."""
        return self.signature + self.manifest.canonical()

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Check and read what `pack` made, from a file or from a peer.

        Raises:
            UserError: too long, not a valid manifest in canonical form, or a bad signature. One printable line.
        """
        if len(data) > MAX_HEADER_BYTES:
            raise UserError(f"manifest is longer than {MAX_HEADER_BYTES} bytes; get it from another peer")
        signature, canonical = data[:SIGNATURE_BYTES], data[SIGNATURE_BYTES:]
        manifest = Manifest.from_canonical(canonical)
        if not verify(manifest.organiser_peer, _DOMAIN, canonical, signature):
            raise UserError("manifest is not signed by the organiser it names; get it from another peer")
        return cls(manifest, signature)


def publish_manifest(transport: Transport, signed: SignedManifest) -> None:
    """Hand `signed` to whoever asks, from now on."""
    data = signed.pack()

    async def serve(stream: Stream) -> None:
        await write_frame(stream, data)

    transport.handle(MANIFEST_PROTOCOL, serve)


async def fetch_manifest(transport: Transport, peer: PeerId, *, timeout_s: float = 20.0) -> SignedManifest:
    """Get the manifest of the run that `peer` takes part in, with its signature checked.

    Raises:
        ProtocolError: what it sent is not a soundly signed manifest.
        PeerUnreachableError: it can not be reached, or serves no manifest.
        StreamClosedError: it went away in the middle.
        DeadlineError: it was not done within `timeout_s`.
    """
    try:
        async with asyncio.timeout(timeout_s):
            async with await transport.open(peer, MANIFEST_PROTOCOL, timeout_s=timeout_s) as stream:
                data = await read_frame(stream, max_bytes=MAX_HEADER_BYTES)
    except TimeoutError:
        raise DeadlineError(f"the peer did not send its manifest within {timeout_s:g} s") from None
    try:
        return SignedManifest.unpack(data)
    except UserError as error:
        raise ProtocolError(str(error), peer=peer) from None
