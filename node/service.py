"""What every node runs, trainer or bootstrap: it tells the swarm about itself, watches the swarm, and serves what it has.

    /llm-node/manifest/1   the signed manifest
    /llm-node/blob/1       tokenizer, shards, snapshots
    /llm-node/status/1     the status document, also behind `--http` as a page

So the bootstrap node has no privilege: any peer can be joined through, asked for data or for the status of the swarm.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bootstrap.collector import Collector
from bootstrap.status_stream import serve_status
from bootstrap.store import StatusStore
from bootstrap.summary import swarm_status
from bootstrap.web import serve_web
from node.contact import Contact
from node.events import EventLog
from protocol.blob_exchange import serve_blobs
from protocol.blobs import BlobStore
from protocol.directory import Directory
from protocol.errors import LlmNodeError, UserError
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.publication import SignedManifest, publish_manifest
from protocol.records import PeerRecord
from protocol.transport import Transport

logger = logging.getLogger(__name__)

__all__ = ["HEARTBEAT_S", "Service", "Watcher"]

Watcher = Callable[[], Coroutine[Any, Any, None]]
"""Something to be done after every look at the directory."""

HEARTBEAT_S = 3.0
"""Seconds between two records of a node, and between two looks at the directory."""
NUM_CACHED_ADDRESSES = 64
STATUS_AGE_S = 1.0
"""A status document is made at most this often, however many ask for it."""


class Service:
    """Heartbeat, directory, blobs, manifest and status of one node.

    Args:
        record: makes this node's current record from its dialable addresses.
        folder: where cached peer addresses and the status history are kept; None keeps them in memory.
        http: address of the status page, or None for no page.
    """

    def __init__(
        self,
        signed: SignedManifest,
        *,
        identity: Identity,
        transport: Transport,
        store: BlobStore,
        events: EventLog,
        record: Callable[[Sequence[str]], PeerRecord],
        folder: Path | None,
        http: tuple[str, int] | None = None,
    ) -> None:
        self.transport, self.store, self.events = transport, store, events
        self._signed, self._record, self._folder, self._http = signed, record, folder, http
        self.directory = Directory(dht=transport.dht, identity=identity, run=signed.manifest.run_id)
        self._history = self._open_history()
        self._collector = Collector(self.directory, self._history)
        self._watchers: dict[Watcher, asyncio.Task[None] | None] = {}
        self._status: dict[str, Any] | None = None
        self._closed = False
        self._cached: list[str] = []
        self._disk_problems: dict[str, str] = {}
        self._contact = Contact(events)
        self._beating = asyncio.Lock()

    def on_heartbeat(self, watcher: Watcher) -> None:
        """Run `watcher` after every look at the directory, but never twice at once. It may take as long as it likes: the
        heart goes on beating, and the node stays in the directory."""
        self._watchers[watcher] = None

    @contextlib.contextmanager
    def watching(self, watchers: Iterable[Watcher]) -> Iterator[None]:
        """The same for as long as the block lasts."""
        added = list(watchers)
        for watcher in added:
            self.on_heartbeat(watcher)
        try:
            yield
        finally:
            for watcher in added:
                task = self._watchers.pop(watcher)
                if task is not None:
                    task.cancel()

    def status(self) -> dict[str, Any]:
        """The status document, as shown by the page and the status stream."""
        now_s = time.time()
        fresh = self._status is not None and now_s - self._status["generated_at_s"] <= STATUS_AGE_S
        if self._status is None or not (fresh or self._closed):  # once the history is closed, a stream may still ask
            self._status = swarm_status(self._history, self._signed.manifest, now_s=now_s)
        return self._status

    def donors(self) -> list[PeerId]:
        """Live peers to ask for blobs, bootstrap nodes last, since trainers share the load; in an order of each asker's own."""
        records, own = self.directory.peers, self.transport.peer_id
        order = {peer: hashlib.sha256(f"{own}/{peer}".encode()).digest() for peer in records}
        return sorted(records, key=lambda peer: (records[peer].role == "bootstrap", order[peer]))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve until the block is left; on leaving, the last record is published once more (it may say goodbye)."""
        publish_manifest(self.transport, self._signed)
        serve_blobs(self.transport, self.store)
        serve_status(self.transport, self.status)
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._close_history)
            if self._http is not None:
                address = await stack.enter_async_context(serve_web(*self._http, self.status))
                self.events.emit("web_page", url=address)
            await self.beat()
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            heart = tasks.create_task(self._heartbeat(tasks))
            try:
                yield
            finally:
                for task in [heart, *self._watchers.values()]:
                    if task is not None:
                        task.cancel()
                with contextlib.suppress(LlmNodeError, TimeoutError):
                    async with asyncio.timeout(1.5):
                        await self.directory.publish(self._record(await self.transport.addresses()))

    def _open_history(self) -> StatusStore:
        """The history on disk, or one in memory when there is no room or the file is damaged: nobody trains for a page."""
        if self._folder is None:
            return StatusStore(":memory:")
        try:
            return StatusStore(self._folder / "status.db")
        except UserError as error:
            self.events.emit("history_unusable", reason=str(error))
            return StatusStore(":memory:")

    def _close_history(self) -> None:
        self.status()
        self._closed = True
        self._history.close()

    async def beat(self) -> None:
        """Publish the record once and look at the directory once; one at a time, however many ask."""
        async with self._beating:
            await self._beat()

    async def _beat(self) -> None:
        num_failed = self.directory.num_failed_reads
        try:
            stored = await self.directory.publish(self._record(await self.transport.addresses()))
            problem = None if stored else "nobody takes our record"
        except LlmNodeError as error:
            problem = str(error)
        await self._collector.collect()
        self._note_disk("status.db", self._history.problem)
        if self.directory.num_failed_reads > num_failed:
            problem = "the directory cannot be read"
        records = self.directory.peers
        self._contact.note(problem, num_peers=len(records), now_s=asyncio.get_running_loop().time())
        for peer, record in records.items():
            await self.transport.learn(peer, record.addresses)
        self._cache([address for record in records.values() for address in record.addresses])

    async def _heartbeat(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await self.beat()
            self._start_watchers(tasks)

    def _start_watchers(self, tasks: asyncio.TaskGroup) -> None:
        """Those that are not at work. In a method of its own: the heartbeat's frame, which lasts, must not keep any of them."""
        for watcher, task in list(self._watchers.items()):
            if task is None or task.done():
                self._watchers[watcher] = tasks.create_task(self._watch(watcher))

    async def _watch(self, watcher: Watcher) -> None:
        """Run it. What a stranger has written into the directory must never end a peer, whatever a watcher makes of it."""
        try:
            await watcher()
        except Exception as error:  # a task root
            logger.exception("a watcher failed")
            self.events.emit("watcher_failed", reason=f"{type(error).__name__}: {error}".splitlines()[0][:200])

    def _cache(self, addresses: list[str]) -> None:
        """Remember addresses, so that a restart finds the swarm without its first address."""
        addresses = sorted(set(addresses))[:NUM_CACHED_ADDRESSES]
        if self._folder is None or not addresses or addresses == self._cached:
            return
        path = self._folder / "peers.json"
        try:
            path.with_suffix(".tmp").write_text(json.dumps(addresses))
            path.with_suffix(".tmp").replace(path)
        except OSError as error:
            self._note_disk(path.name, error.strerror or type(error).__name__)
        else:
            self._cached = addresses
            self._note_disk(path.name, None)

    def _note_disk(self, name: str, problem: str | None) -> None:
        """Tell once that a file cannot be written, and once that it can again."""
        path = str((self._folder or Path()) / name)
        if problem is not None and name not in self._disk_problems:
            self.events.emit("disk_error", path=path, reason=problem)
            self._disk_problems[name] = problem
        elif problem is None and self._disk_problems.pop(name, None) is not None:
            self.events.emit("disk_recovered", path=path)
