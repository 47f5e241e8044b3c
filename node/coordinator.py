"""`llm-node bootstrap`: the first address of a run.

It publishes the signed manifest, seeds the tokenizer and the data shards, relays for peers that cannot be dialled, collects
status records and shows the page. It trains nothing and decides nothing: kill it and the swarm goes on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low

from node.events import EventLog
from node.home import Home, keep_manifest
from node.progress import software_version
from node.publish import with_initial_state
from node.service import Service
from protocol.blobs import BlobStore
from protocol.directory import validate_entry
from protocol.errors import UserError
from protocol.identity import Identity, hold_identity
from protocol.ids import BlobId
from protocol.libp2p import Libp2pTransport
from protocol.manifest import Manifest
from protocol.publication import SignedManifest
from protocol.records import PeerRecord
from protocol.violations import Violations

__all__ = ["CoordinatorOptions", "coordinate"]

CHECKED_PARAMETERS = 200_000_000
"""Up to this size the initial weights are made and hashed before publishing, which takes a few seconds at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorOptions:
    """Network side of a bootstrap node.

    Attributes:
        listen: multiaddresses to listen on.
        announce: multiaddresses to tell others instead of the detected ones.
        peers: addresses of other bootstrap nodes of the run.
        http: host and port of the status page, or None.
        name: shown on the status page.
    """

    listen: tuple[str, ...]
    announce: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    http: tuple[str, int] | None = None
    name: str = ""


async def coordinate(
    home: Home, manifest_path: Path, options: CoordinatorOptions, *, events: EventLog, stopping: asyncio.Event
) -> None:
    """Serve a run until `stopping` is set.

    Raises:
        UserError: the manifest is unacceptable, its blobs are not here, or the port is taken.
    """
    with hold_identity(home.identity):
        identity = Identity.load_or_create(home.identity)
        store = BlobStore(home.blobs)
        manifest = read_manifest(manifest_path)
        _check_complete(manifest, store)
        signed = SignedManifest.sign(manifest, identity)
        folder = home.run(manifest.run_id)
        keep_manifest(folder, signed)
        events.write_to(folder / "events.jsonl")
        transport = Libp2pTransport(
            identity=identity,
            listen=options.listen,
            announce=options.announce,
            initial_peers=options.peers,
            runtime_dir=home.runtime,
            validator=validate_entry,
            relay_service=True,
        )
        async with transport:
            record = _Record(manifest, identity, transport, options.name)
            service = Service(
                signed,
                identity=identity,
                transport=transport,
                store=store,
                events=events,
                record=record,
                folder=folder,
                http=options.http,
            )
            watch = _SwarmWatch(service)
            service.on_heartbeat(watch.look)
            if manifest.pipeline.stages > 1:
                from node.pipeline.archive import StageArchive  # torch, which other runs' bootstrap nodes do without

                archive = StageArchive(
                    manifest,
                    directory=service.directory,
                    transport=transport,
                    store=store,
                    folder=folder,
                    events=events,
                )
                service.on_heartbeat(archive.look)
                service.on_heartbeat(_PlanWatch(manifest, service).look)
            async with service.running():
                events.emit("serving", run=manifest.run_id, name=manifest.name, addresses=await transport.addresses())
                await stopping.wait()
                record.leaving = True


class _SwarmWatch:
    """Tells how the swarm does, whenever somebody has come, gone or reached another round."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._last: tuple[int, ...] = ()

    async def look(self) -> None:
        """One look at the status document."""
        swarm = self._service.status()["swarm"]
        state = (swarm["peers"], swarm["training"], swarm["round"])
        if state != self._last:
            self._last = state
            keys = ("peers", "training", "round", "val_loss", "tokens_per_s")
            self._service.events.emit("swarm", **{key: swarm[key] for key in keys})


class _PlanWatch:
    """Keeps the newest plan, for whoever asks for it here."""

    def __init__(self, manifest: Manifest, service: Service) -> None:
        from node.pipeline.plan_book import PlanBook

        self._directory = service.directory
        self._book = PlanBook(
            manifest, payload_bytes=0, transport=service.transport, events=service.events, violations=Violations()
        )

    async def look(self) -> None:
        """One look at the directory."""
        from node.pipeline.published import plan_number

        peers = self._directory.peers
        at_work = {peer: r for peer, r in peers.items() if r.stage is not None and r.state == "training"}
        iterations = [record.iteration for record in at_work.values()]
        if iterations:
            await self._book.fetch(at_work, at_most=plan_number(median_low(iterations)) + 1)


class _Record:
    """Makes the bootstrap node's own record."""

    def __init__(self, manifest: Manifest, identity: Identity, transport: Libp2pTransport, name: str) -> None:
        self._run, self._peer, self._traffic, self._name = manifest.run_id, identity.peer_id, transport.traffic, name
        self._started_at_s = time.time()
        self._sequence = 0
        self.leaving = False

    def __call__(self, addresses: Sequence[str]) -> PeerRecord:
        self._sequence = max(self._sequence + 1, time.time_ns() // 1_000_000)
        return PeerRecord(
            run=self._run,
            peer=self._peer,
            sequence=self._sequence,
            role="bootstrap",
            state="leaving" if self.leaving else "serving",
            name=self._name[:32],
            version=software_version(),
            addresses=list(addresses)[:8],
            started_at_s=self._started_at_s,
            sent_at_s=time.time(),
            sent_bytes=self._traffic.sent_bytes,
            received_bytes=self._traffic.received_bytes,
        )


def read_manifest(path: Path) -> Manifest:
    """Read and validate a manifest file.

    Raises:
        UserError: it cannot be read, or is not a valid manifest.
    """
    try:
        return Manifest.from_toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make one with `llm-node init {path}`") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; make a manifest with `llm-node init`") from None


def _check_complete(manifest: Manifest, store: BlobStore) -> None:
    blobs = [manifest.tokenizer.blob, manifest.data.heldout, manifest.data.index]
    missing = [blob for blob in blobs if blob is not None and not store.has(BlobId(blob))]
    if missing:
        raise UserError(
            f"blob {missing[0][:12]}… of this run is not in {store.root}; run `llm-node init` with the same --home, "
            "or copy its blobs folder here"
        )
    if manifest.model.num_parameters <= CHECKED_PARAMETERS:
        expected = with_initial_state(manifest).initial_state.sha256
        if expected != manifest.initial_state.sha256:
            raise UserError(
                f'initial_state.sha256 does not fit the model and seed (they give "{expected}"); '
                "put that value into the manifest"
            )
