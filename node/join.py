"""`llm-node join`: from an address to a running peer.

The address leads to any live node of the run. It hands over the signed manifest; everything else follows from that. The
addresses of the peers met are cached, so that joining again works even when the first address is gone.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from node.compute import ThreadCompute
from node.events import EventLog
from node.home import Home, keep_manifest, kept_manifest
from node.peer import Peer, PeerOptions, Summary
from node.role import MEMORY_MARGIN, memory_needed
from protocol.blobs import BlobStore
from protocol.directory import validate_entry
from protocol.errors import LlmNodeError, TransportError, UserError
from protocol.identity import Identity, hold_identity
from protocol.ids import PeerId
from protocol.libp2p import Libp2pTransport
from protocol.publication import SignedManifest, fetch_manifest
from protocol.transport import Transport

__all__ = ["JoinOptions", "join"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinOptions:
    """Network side of joining.

    Attributes:
        peers: addresses to try, in order; empty to go on with the latest run of this home.
        listen: multiaddresses to listen on.
        announce: multiaddresses to tell others instead of the detected ones.
    """

    peers: tuple[str, ...]
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    announce: tuple[str, ...] = ()


async def join(
    home: Home,
    options: JoinOptions,
    peer_options: PeerOptions,
    *,
    events: EventLog,
    on_start: Callable[[Peer], Awaitable[None]],
) -> Summary:
    """Take part in a run until it ends or the peer is stopped.

    Args:
        on_start: awaited with the peer before it runs, to show it and to be able to stop it.

    Raises:
        UserError: no peer answers, the manifest is not acceptable, or this machine cannot take part.
    """
    with hold_identity(home.identity):
        identity = Identity.load_or_create(home.identity)
        known = _known_addresses(home, options.peers)
        transport = Libp2pTransport(
            identity=identity,
            listen=options.listen,
            announce=options.announce,
            initial_peers=known,
            runtime_dir=home.runtime,
            validator=validate_entry,
        )
        events.emit("connecting")
        async with transport:
            signed = await _find_manifest(transport, home, options.peers, known)
            folder = _remember_run(home, signed, options.peers)
            events.write_to(folder / "events.jsonl")
            events.emit("listening", addresses=await transport.addresses())  # others can join through any peer
            check_memory(signed, limit_bytes=peer_options.memory_bytes)
            check_device(peer_options.device)
            compute = ThreadCompute()
            try:
                peer = Peer(
                    signed,
                    identity=identity,
                    transport=transport,
                    store=BlobStore(home.blobs),
                    compute=compute,
                    events=events,
                    folder=folder,
                    options=replace(peer_options, age_s=time.time() - psutil.Process().create_time()),
                )
                await on_start(peer)
                return await peer.run()
            finally:
                compute.close()


def _known_addresses(home: Home, given: tuple[str, ...]) -> tuple[str, ...]:
    """The addresses given, then those of peers met in the run that was joined through them, or in the latest run."""
    folder = _remembered_run(home, given)
    cached = [] if folder is None else [*_read_list(folder / "peers.json"), *_read_list(folder / "via.json")]
    return tuple(dict.fromkeys([*given, *cached]))


def _remembered_run(home: Home, given: tuple[str, ...]) -> Path | None:
    """Folder of the run that was joined through one of these addresses; of the latest without any."""
    folders = reversed(home.runs())
    return next((f for f in folders if not given or set(_read_list(f / "via.json")) & set(given)), None)


async def _find_manifest(
    transport: Transport, home: Home, given: tuple[str, ...], known: tuple[str, ...]
) -> SignedManifest:
    """From the first address that gives one. Addresses given may lead to any run. A peer met in a run may be anybody: what it sends
    counts only if it is of that run."""
    remembered = _remembered_run(home, given)
    for address in known:
        try:
            peer: PeerId = await transport.connect(address)
            signed = await fetch_manifest(transport, peer)
        except TransportError:
            continue
        except UserError:
            if address in given:
                raise
        except LlmNodeError as error:
            if address in given:
                raise UserError(
                    f"{address} sent an unacceptable manifest: {error}; ask the organiser for an address"
                ) from None
        else:
            if address in given or (remembered is not None and signed.manifest.run_id == remembered.name):
                return signed
    if given:
        raise UserError(
            f"no peer answers at {given[0]}; check the address, that the node there runs, and that its port is open"
        )
    if not home.runs():
        raise UserError("name a peer of the run with --peer ADDRESS; this home has not joined any run yet")
    # The latest run, and nobody of it is reachable: go on alone, others may come back.
    return kept_manifest(home.runs()[-1])


def _remember_run(home: Home, signed: SignedManifest, via: tuple[str, ...]) -> Path:
    folder = home.run(signed.manifest.run_id)
    keep_manifest(folder, signed)
    known = _read_list(folder / "via.json")
    if not set(via) <= set(known):
        with contextlib.suppress(OSError):  # only a convenience: joining needs --peer again without it
            (folder / "via.json").write_text(json.dumps([*dict.fromkeys([*via, *known])][:32]))
    return folder


def _read_list(path: Path) -> list[str]:
    """A JSON list of strings, empty if there is none that can be read."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def check_memory(signed: SignedManifest, *, limit_bytes: int = 0) -> None:
    """Refuse a model that does not fit, before anything is downloaded.

    Args:
        limit_bytes: that training may take; 0 for what is free.

    Raises:
        UserError: training would need more memory than this machine has free.
    """
    if signed.manifest.pipeline.stages > 1:
        return  # a peer chooses among the stages that fit, see node/role.py
    needed = memory_needed(signed.manifest, None)
    free = min(psutil.virtual_memory().available, limit_bytes or 1 << 62)
    if needed * MEMORY_MARGIN > free:
        raise UserError(
            f"training {signed.manifest.name} needs about {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB "
            "are free; close other programs or join from a larger machine"
        )


def check_device(device: str) -> None:
    """Refuse a device that torch cannot use here.

    Raises:
        UserError: no such device.
    """
    try:
        torch.zeros(1, device=device).add_(1)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:100]
        raise UserError(f"cannot train on --device {device!r} ({reason}); use cpu, or a torch build for it") from None
