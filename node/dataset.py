"""Where a peer's batches come from, round by round.

For `files` and `stdlib` the run's tokens lie in shards of about 1 MiB that peers fetch from each other on demand. Which
shard a peer reads in a round is PRF(run, peer, round): nobody hands out work, nothing is reassigned when somebody leaves, and
two peers rarely read the same tokens at the same time. For `local` the tokens are the volunteer's own and stay here.
"""

from __future__ import annotations

import asyncio
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.batches import RoundBatches
from model.corpus import iter_files
from model.data import ShardIndex, Tokens, assigned_shard, decode_tokens, token_dtype
from model.tokenizer import Tokenizer
from node.events import EventLog
from protocol.blob_exchange import fetch_blob
from protocol.blobs import BlobDamagedError, BlobStore
from protocol.errors import TransportError, UserError
from protocol.ids import BlobId, PeerId
from protocol.manifest import Manifest
from protocol.transport import Transport

__all__ = ["BatchSource", "LocalSource", "ShardSource", "open_source"]

MAX_SHARD_BYTES = 16 << 20
MAX_INDEX_BYTES = 64 << 20
MAX_TOKENIZER_BYTES = 64 << 20
RETRY_S = 2.0
"""Pause before asking again for a shard when there is none to read instead."""


class BatchSource(ABC):
    """Gives each round its batches."""

    @abstractmethod
    async def batches(self, round: int) -> RoundBatches:
        """Batches of `round`, the same after a restart; may wait for the network."""

    @abstractmethod
    async def prefetch(self, round: int) -> None:
        """Bring what `round` will need; never raises for an unreachable swarm."""


class LocalSource(BatchSource):
    """The volunteer's own files."""

    def __init__(self, tokens: Tokens, *, seed: str, sequence_tokens: int) -> None:
        self._tokens, self._seed, self._sequence_tokens = tokens, seed, sequence_tokens

    async def batches(self, round: int) -> RoundBatches:
        return RoundBatches(self._tokens, seed=_seed(self._seed, round), sequence_tokens=self._sequence_tokens)

    async def prefetch(self, round: int) -> None:
        pass


class ShardSource(BatchSource):
    """Shards fetched from other peers, cached on disk and served on.

    Raises:
        UserError: no shard holds a single sequence.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        manifest: Manifest,
        peer: PeerId,
        store: BlobStore,
        fetch: Callable[[BlobId], Any],
        events: EventLog,
    ) -> None:
        self._manifest, self._peer = manifest, peer
        usable = [BlobId(blob) for blob, tokens in index.entries if tokens > manifest.inner.sequence_tokens]
        self._shards = usable  # the last one of a run may be too short for a single sequence
        if not usable:
            raise UserError("every shard of this run is shorter than one sequence; its organiser must add text")
        self._store, self._fetch, self._events = store, fetch, events
        self._run = manifest.run_id

    def shard_of(self, round: int) -> BlobId:
        """The shard this peer reads in `round`."""
        return self._shards[assigned_shard(self._run, self._peer, round, 0, len(self._shards))]

    async def batches(self, round: int) -> RoundBatches:
        tokens = decode_tokens(await self._read(self.shard_of(round)), self._manifest.model.vocab_size)
        seed = _seed(f"{self._run}{self._peer}", round)
        return RoundBatches(tokens, seed=seed, sequence_tokens=self._manifest.inner.sequence_tokens)

    async def prefetch(self, round: int) -> None:
        blob = self.shard_of(round)
        if not self._store.has(blob):
            try:
                await self._fetch(blob)
            except (TransportError, UserError) as error:
                self._events.emit("prefetch_failed", shard=blob[:12], round=round, reason=str(error))

    async def _read(self, wanted: BlobId) -> bytes:
        """The shard, or one that is here: training waits for the network only while there is none at all. The wanted shard
        is then still on its way (see `prefetch`), or nobody reachable has it."""
        failed: set[BlobId] = set()
        here = await asyncio.to_thread(self._shards_here)
        blob = wanted if wanted in here or not here else here[int(wanted[:8], 16) % len(here)]
        if blob != wanted:
            self._events.emit("shard_late", shard=wanted[:12])
        while True:
            try:
                if not self._store.has(blob):
                    await self._fetch(blob)
                return await asyncio.to_thread(self._store.read, blob)
            except BlobDamagedError as error:  # set aside by now, so that the next turn fetches it
                self._events.emit("blob_damaged", blob=blob[:12], reason=str(error))
            except (TransportError, UserError) as error:
                failed.add(blob)
                usable = [entry for entry in await asyncio.to_thread(self._shards_here) if entry not in failed]
                self._events.emit("shard_unavailable", shard=blob[:12], reason=str(error), fallback=bool(usable))
                if usable:
                    blob = usable[int(wanted[:8], 16) % len(usable)]
                else:
                    failed.clear()
                    blob = wanted
                    await asyncio.sleep(RETRY_S)

    def _shards_here(self) -> list[BlobId]:
        return [shard for shard in self._shards if self._store.has(shard)]


async def open_source(
    manifest: Manifest,
    *,
    peer: PeerId,
    store: BlobStore,
    transport: Transport,
    donors: Callable[[], Sequence[PeerId]],
    events: EventLog,
    local_data: Path | None,
) -> tuple[BatchSource, Tokens, Tokenizer]:
    """Fetch what training needs before the first step.

    Returns:
        The batch source, the held-out tokens [T] and the tokenizer.

    Raises:
        UserError, DataError: a `local` run without `--data`, that folder holds no usable text, or the run's blobs are not
            what its manifest says.
        TransportError: the swarm does not have the data just now.
    """

    async def fetch(blob: BlobId, max_bytes: int = MAX_SHARD_BYTES) -> None:
        await fetch_blob(blob, transport=transport, store=store, donors=donors, max_bytes=max_bytes)

    async def read(blob: BlobId, max_bytes: int) -> bytes:
        try:
            if store.has(blob):
                return await asyncio.to_thread(store.read, blob)
        except BlobDamagedError as error:
            events.emit("blob_damaged", blob=blob[:12], reason=str(error))
        await fetch(blob, max_bytes)
        return await asyncio.to_thread(store.read, blob)

    tokenizer = Tokenizer(await read(manifest.tokenizer_blob, MAX_TOKENIZER_BYTES))
    heldout = decode_tokens(await read(BlobId(manifest.data.heldout), MAX_SHARD_BYTES), manifest.model.vocab_size)
    if manifest.data.index is None:
        if local_data is None:
            raise UserError("this run trains on each volunteer's own files; name a folder of text with --data FOLDER")
        tokens = await asyncio.to_thread(_tokenise, local_data, tokenizer)
        if len(tokens) <= manifest.inner.sequence_tokens:
            raise UserError(f"{local_data} holds only {len(tokens)} tokens of text; add more files")
        source: BatchSource = LocalSource(
            tokens, seed=f"{manifest.run_id}{peer}", sequence_tokens=manifest.inner.sequence_tokens
        )
    else:
        index = ShardIndex.unpack(await read(BlobId(manifest.data.index), MAX_INDEX_BYTES))
        source = ShardSource(index, manifest=manifest, peer=peer, store=store, fetch=fetch, events=events)
    return source, heldout, tokenizer


def _tokenise(folder: Path, tokenizer: Tokenizer) -> Tokens:
    dtype = token_dtype(tokenizer.vocab_size)
    return np.concatenate([np.asarray([*tokenizer.encode(t), tokenizer.eot_id], dtype) for t in iter_files(folder)])


def _seed(text: str, round: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{text}/{round}".encode()).digest()[:8], "big")
