"""A swarm in one process: the same peers, the same code, on the memory transport in virtual time.

Each peer has its own trainer, store and identity; only time and the network are simulated, so the outcome is exactly
repeatable and does not depend on this machine's speed. Every peer takes the same number of sequences per step.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from pathlib import Path
from typing import Any

import torch

from model.export import export_huggingface
from node.compute import VirtualCompute
from node.demo_check import relative_spread
from node.demo_settings import DEMO_HELDOUT_TOKENS, DEMO_MAX_CHARS, DEMO_MODEL, DemoOptions, settings_for
from node.events import EventLog
from node.peer import Peer, PeerOptions, Summary
from node.publish import RunRequest, make_run
from node.training_state import model_config
from protocol.blobs import BlobStore
from protocol.directory import validate_entry
from protocol.identity import Identity
from protocol.manifest import Manifest
from protocol.memory import LinkSpec, MemoryNetwork, MemoryTransport
from protocol.publication import SignedManifest
from protocol.virtual_time import run_virtual

__all__ = ["SEQUENCES", "run_simulated_demo", "run_swarm"]

SEQUENCES = 8
SECONDS_PER_CALL = 0.3
LINK = LinkSpec(latency_s=0.02, bytes_per_s=10e6)


def run_simulated_demo(options: DemoOptions, folder: Path) -> dict[str, Any]:
    """The demo on the memory transport; the same fields as with real processes."""
    started = time.monotonic()
    torch.set_num_threads(1)  # matrices this small are slower on several threads, and runs stay comparable
    organiser = Identity.generate(_seed(options.seed, "organiser"))
    store = BlobStore(folder / "organiser")
    request = RunRequest(
        name="demo",
        organiser=organiser.peer_id,
        model=DEMO_MODEL,
        data="stdlib",
        heldout_tokens=DEMO_HELDOUT_TOKENS,
        seed=options.seed,
        max_chars=DEMO_MAX_CHARS,
        overrides=settings_for(options),
    )
    manifest = make_run(request, store)
    peers, summaries = run_virtual(
        run_swarm(SignedManifest.sign(manifest, organiser), store, options.peers, options.seed)
    )
    exported = _export(peers[0], manifest, store, folder / "exported")
    return {
        "val_loss_start": _mean([s.val_loss_start for s in summaries]),
        "val_loss_end": _mean([s.val_loss_end for s in summaries]),
        "peers": len(peers),
        "rounds": min(s.rounds for s in summaries),
        "exchanges_ok": sum(s.exchanges_ok for s in summaries),
        "exchanges_failed": sum(s.exchanges_failed for s in summaries),
        "exchanges_ok_min_peer": min(s.exchanges_ok for s in summaries),
        "bytes_sent": sum(s.sent_bytes for s in summaries),
        "tokens": sum(s.tokens for s in summaries),
        "seconds": round(time.monotonic() - started, 1),
        "time_to_first_step_s": max(s.time_to_first_step_s or 0.0 for s in summaries),
        "replica_spread": relative_spread([peer.trainer.replica.phi for peer in peers if peer.trainer is not None]),
        "checkpoint": str(exported),
    }


async def run_swarm(
    signed: SignedManifest, store: BlobStore, num_peers: int, seed: int
) -> tuple[list[Peer], list[Summary]]:
    """Train `num_peers` peers to the end of the run on the running (virtual) loop. They share one blob store."""
    network = MemoryNetwork(seed=seed, link=LINK)
    peers: list[Peer] = []

    async def live(number: int) -> Summary:
        identity = Identity.generate(_seed(seed, f"peer {number}"))
        async with MemoryTransport(network, identity.peer_id, validator=validate_entry) as transport:
            peer = Peer(
                signed,
                identity=identity,
                transport=transport,
                store=store,
                compute=VirtualCompute(seconds_per_call=SECONDS_PER_CALL),
                events=EventLog(),
                folder=None,
                options=PeerOptions(name=f"peer-{number}", sequences=SEQUENCES),
            )
            peers.append(peer)
            return await peer.run()

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(live(number)) for number in range(1, num_peers + 1)]
    return peers, [task.result() for task in running]


def _export(peer: Peer, manifest: Manifest, store: BlobStore, folder: Path) -> Path:
    assert peer.trainer is not None
    weights = peer.trainer.flat.views(peer.trainer.replica.phi)
    tokenizer = store.read(manifest.tokenizer_blob)
    export_huggingface(folder, config=model_config(manifest), weights=weights, tokenizer=tokenizer)
    return folder


def _seed(seed: int, what: str) -> bytes:
    return hashlib.sha256(f"{seed}/{what}".encode()).digest()


def _mean(values: list[float | None]) -> float:
    numbers = [value for value in values if value is not None]
    return round(sum(numbers) / len(numbers), 4)
