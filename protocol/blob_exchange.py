"""Fetching a blob from several donors at once over `/llm-node/blob/1` (protocol/blob_server.py is the other side).

The first donor to answer gives the leaf list, which is checked against the blob id before any leaf is asked for. From then on
every leaf is checked alone, so any mixture of donors is safe: a liar is found out by its first leaf and dropped, a donor that
breaks off is tried again a little later, and its leaves go to the others. Verified leaves are on disk at once, so a fetch that ends
early (crash, cancellation, no donor left) is continued by the next one for the same blob.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from protocol.blob_server import BLOB_PROTOCOL, BlobReply, BlobRequest, serve_blobs
from protocol.blobs import BlobStore
from protocol.errors import DeadlineError, ProtocolError, TransportError, UserError
from protocol.ids import BlobId, PeerId
from protocol.leaf_queue import LeafQueue
from protocol.merkle import HASH_BYTES, LeafList, num_leaves
from protocol.partial_blob import PartialBlob
from protocol.transport import Stream, Transport
from protocol.wire import read_bulk, read_message, write_message

__all__ = ["BlobUnavailableError", "FetchReport", "fetch_blob", "serve_blobs"]

logger = logging.getLogger(__name__)

MAX_DONORS = 4
"""Donors used at the same time."""
WINDOW_LEAVES = 4
"""Leaves asked for ahead per donor: 4 MiB under way fill a 40 MB/s path with a round trip of 100 ms."""
REPLY_TIMEOUT_S = 30.0
MAX_FAILURES = 4
"""Failures in a row after which a donor from a fixed list is given up."""
FIRST_RETRY_S = 0.5
LAST_RETRY_S = 8.0
PATIENCE_S = 30.0
"""How long a fetch with changing donors goes on without a single new leaf."""
POLL_S = 0.25

Donors = Sequence[PeerId] | Callable[[], Sequence[PeerId]]


@dataclass(slots=True)
class FetchReport:
    """Who gave what."""

    received_bytes: Counter[PeerId] = field(default_factory=Counter)
    """Verified bytes per donor."""
    violations: list[ProtocolError] = field(default_factory=list)
    """What donors did against the protocol, each with its peer."""


class BlobUnavailableError(TransportError):
    """No donor is left that could give the blob. What has arrived is kept for the next attempt.

    Args:
        reason: one line.
        report: what happened until then.
    """

    def __init__(self, reason: str, report: FetchReport) -> None:
        super().__init__(reason)
        self.report = report


class _AbsentError(TransportError):
    """The donor does not have the blob."""


async def fetch_blob(
    blob: BlobId,
    *,
    transport: Transport,
    store: BlobStore,
    donors: Donors,
    max_bytes: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> FetchReport:
    """Bring a blob into the store, verified; at once if it is there already.

    Cancellation leaves what has arrived on disk for the next call, and no stream open.

    Args:
        blob: its id.
        transport: where the donors are.
        store: where it goes, and where an earlier attempt may have left a part of it.
        donors: peers that may have it, best first. A callable is asked again and again, so that donors may appear later; then
            the fetch ends only after PATIENCE_S without progress.
        max_bytes: most bytes that this blob can have; a donor that claims more is taken for a liar.
        on_progress: called with (bytes done, size in bytes) when the size is known and after every leaf.

    Raises:
        BlobUnavailableError: no donor is left.
        UserError: the disk is full or not writable.
    """
    async with store.fetch_lock(blob):
        if store.has(blob):
            return FetchReport()
        fetch = _Fetch(blob, transport, store, donors, max_bytes, on_progress or (lambda done, size: None))
        try:
            await fetch.run()
        finally:
            fetch.close()
        return fetch.report


class _Fetch:
    """One call of `fetch_blob`: a supervisor that keeps up to MAX_DONORS donor tasks going until nothing is missing."""

    def __init__(
        self,
        blob: BlobId,
        transport: Transport,
        store: BlobStore,
        donors: Donors,
        max_bytes: int,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self.report = FetchReport()
        self._blob = blob
        self._transport = transport
        self._store = store
        self._donors = donors
        self._max_bytes = max_bytes
        self._on_progress = on_progress
        self._partial: PartialBlob | None = None
        self._queue: LeafQueue | None = None
        self._opening = asyncio.Lock()
        self._done_bytes = 0
        self._tasks: dict[PeerId, asyncio.Task[None]] = {}
        self._liars: set[PeerId] = set()
        self._failures: Counter[PeerId] = Counter()
        self._retry_at_s: dict[PeerId, float] = {}
        self._local_error: UserError | None = None
        self._last_problem = "nobody was asked"
        self._changed = asyncio.Event()
        self._progress_at_s = self._now_s()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            while not self._is_complete() and self._local_error is None and not self._is_hopeless():
                self._start_donors(group)
                await self._wait_for_change(POLL_S)
            for task in self._tasks.values():
                task.cancel()
        if self._local_error is not None:
            raise self._local_error
        if self._partial is None or not self._is_complete():
            raise BlobUnavailableError(
                f"blob {self._blob[:12]}… cannot be had from any peer ({self._last_problem})", self.report
            )
        await asyncio.to_thread(self._store.finish, self._partial)

    def close(self) -> None:
        if self._partial is not None:
            self._partial.close()

    # ---- supervisor --------------------------------------------------------------------------------------------------------

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def _is_complete(self) -> bool:
        return self._queue is not None and not self._queue.num_missing

    def _listed(self) -> list[PeerId]:
        listed = self._donors() if callable(self._donors) else self._donors
        return [donor for donor in listed if donor not in self._liars and donor != self._transport.peer_id]

    def _is_hopeless(self) -> bool:
        if self._tasks:
            return False
        if callable(self._donors):
            return self._now_s() - self._progress_at_s >= PATIENCE_S
        return all(self._failures[donor] >= MAX_FAILURES for donor in self._listed())

    def _start_donors(self, group: asyncio.TaskGroup) -> None:
        for donor in sorted(self._listed(), key=lambda donor: self._failures[donor]):
            if len(self._tasks) >= MAX_DONORS:
                return
            given_up = self._failures[donor] >= MAX_FAILURES and not callable(self._donors)
            if donor not in self._tasks and not given_up and self._retry_at_s.get(donor, 0.0) <= self._now_s():
                self._tasks[donor] = group.create_task(self._use(donor), name=f"fetch from {donor}")

    async def _wait_for_change(self, timeout_s: float | None) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # ---- one donor ---------------------------------------------------------------------------------------------------------

    async def _use(self, donor: PeerId) -> None:
        try:
            async with await self._transport.open(donor, BLOB_PROTOCOL) as stream:
                if self._queue is None:
                    await self._begin(await self._ask_for_list(stream))
                await self._take_leaves(stream)
        except ProtocolError as error:
            logger.warning("donor %s is dropped: %s", donor, error.reason)
            self._liars.add(donor)
            self.report.violations.append(ProtocolError(error.reason, peer=donor))
            self._last_problem = f"{donor}: {error.reason}"
        except TransportError as error:
            logger.debug("donor %s: %s", donor, error)
            self._failures[donor] = MAX_FAILURES if isinstance(error, _AbsentError) else self._failures[donor] + 1
            delay_s = min(FIRST_RETRY_S * 2.0 ** (self._failures[donor] - 1), LAST_RETRY_S)
            self._retry_at_s[donor] = self._now_s() + delay_s
            self._last_problem = f"{donor}: {error}"
        except UserError as error:
            self._local_error = error
        finally:
            del self._tasks[donor]
            self._wake()

    async def _begin(self, leaves: LeafList) -> None:
        async with self._opening:
            if self._queue is None:
                self._partial = partial = PartialBlob(self._store.partial_path(self._blob), leaves)
                await asyncio.to_thread(partial.rehash)
                self._queue = LeafQueue(partial.missing)
                self._done_bytes = partial.done_bytes
                self._on_progress(self._done_bytes, leaves.size_bytes)

    async def _ask(self, stream: Stream, leaf: int | None) -> None:
        try:
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                await write_message(stream, BlobRequest(blob=self._blob, leaf=leaf))
        except TimeoutError:
            raise DeadlineError("the donor does not read requests") from None

    async def _reply(self, stream: Stream) -> BlobReply:
        try:
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                reply = await read_message(stream, BlobReply)
        except TimeoutError:
            raise DeadlineError("the donor does not answer") from None
        if reply.status != "ok":
            raise _AbsentError("it lacks the blob") if reply.status == "missing" else TransportError("it is busy")
        return reply

    async def _ask_for_list(self, stream: Stream) -> LeafList:
        await self._ask(stream, None)
        size_bytes = (await self._reply(stream)).size_bytes
        if size_bytes is None:
            raise ProtocolError("a leaf list without a size")
        if size_bytes > self._max_bytes:
            raise ProtocolError(f"claims {size_bytes} bytes for a blob of at most {self._max_bytes}")
        hashes = await read_bulk(stream, HASH_BYTES * num_leaves(size_bytes))
        return await asyncio.to_thread(LeafList.checked, self._blob, size_bytes=size_bytes, hashes=bytes(hashes))

    async def _take_leaves(self, stream: Stream) -> None:
        assert self._queue is not None
        owed: deque[int] = deque()
        try:
            while not self._is_complete():
                while len(owed) < WINDOW_LEAVES:
                    index = self._queue.take(stream.peer, is_idle=not owed)
                    if index is None:
                        break
                    owed.append(index)
                    await self._ask(stream, index)
                if owed:
                    await self._take_leaf(stream, owed[0])
                    owed.popleft()
                else:
                    await self._wait_for_change(None)
        finally:
            self._queue.give_back(stream.peer, owed)

    async def _take_leaf(self, stream: Stream, index: int) -> None:
        assert self._partial is not None
        assert self._queue is not None
        await self._reply(stream)
        leaf_bytes = self._partial.leaves.leaf_bytes(index)
        data = await read_bulk(stream, leaf_bytes)
        if not await asyncio.to_thread(self._partial.write, index, data):
            raise ProtocolError(f"leaf {index} does not match its hash")
        self._failures[stream.peer] = 0
        if self._queue.done(index):
            self.report.received_bytes[stream.peer] += leaf_bytes
            self._done_bytes += leaf_bytes
            self._progress_at_s = self._now_s()
            self._on_progress(self._done_bytes, self._partial.leaves.size_bytes)
            self._wake()
