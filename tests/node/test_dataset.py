"""Where batches come from, and what happens when they cannot be had."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from model.data import ShardIndex, token_dtype
from model.errors import DataError
from node.dataset import RETRY_S, LocalSource, ShardSource, open_source
from protocol.blobs import BlobStore
from protocol.errors import TransportError, UserError
from protocol.ids import BlobId
from protocol.manifest import DataSpec
from protocol.publication import SignedManifest
from protocol.virtual_time import run_virtual
from tests.node.runs import write_corpus
from tests.node.swarm import listening, neighbourhood
from tests.protocol.samples import identity, manifest

Run = tuple[SignedManifest, BlobStore]
PEER = identity(0).peer_id
NUM_SHARDS = 6


class Shelf:
    """A shard source over six small shards, of which a "swarm" has all and the peer's store has some."""

    def __init__(self, folder: Path) -> None:
        self.swarm, self.store = BlobStore(folder / "swarm"), BlobStore(folder / "own")
        dtype = token_dtype(512)
        shards = [np.full(500, number, dtype).tobytes() for number in range(NUM_SHARDS)]
        self.blobs = [self.swarm.put(shard) for shard in shards]
        self.fetched: list[BlobId] = []
        self.failing: Exception | None = None
        self.events, self.heard = listening()
        self.source = ShardSource(
            ShardIndex(tuple((str(blob), 500) for blob in self.blobs)),
            manifest=manifest(),
            peer=PEER,
            store=self.store,
            fetch=self._fetch,
            events=self.events,
        )

    async def _fetch(self, blob: BlobId) -> None:
        self.fetched.append(blob)
        if self.failing is not None:
            raise self.failing
        self.store.put(self.swarm.read(blob))

    def have(self, *numbers: int) -> None:
        for number in numbers:
            self.store.put(self.swarm.read(self.blobs[number]))

    def assigned(self, round: int) -> int:
        return self.blobs.index(self.source.shard_of(round))

    async def read(self, round: int) -> int:
        """Which shard the batches of a round come from."""
        batch = (await self.source.batches(round)).next(3)
        (number,) = set(batch.reshape(-1).tolist())
        return int(number)

    def reasons(self) -> list[object]:
        return [fields.get("fallback") for name, fields in self.heard if name == "shard_unavailable"]


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def test_a_round_reads_the_shard_that_the_lot_gives(shelf: Shelf) -> None:
    async def story() -> None:
        numbers = []
        for round in range(100):
            await shelf.source.prefetch(round)
            numbers.append(await shelf.read(round))
        assert numbers == [shelf.assigned(round) for round in range(100)]
        assert set(numbers) == set(range(NUM_SHARDS))
        assert len(shelf.fetched) == NUM_SHARDS, "each is fetched once"

    run_virtual(story())


def test_a_shard_too_short_for_a_sequence_is_nobody_s(shelf: Shelf, tmp_path: Path) -> None:
    """The last shard of a run has whatever was left of the text."""

    def source(*shards: tuple[str, int]) -> ShardSource:
        return ShardSource(
            ShardIndex(shards),
            manifest=manifest(),
            peer=PEER,
            store=shelf.store,
            fetch=shelf._fetch,
            events=shelf.events,
        )

    least = manifest().inner.sequence_tokens
    short = shelf.store.put(np.zeros(least, token_dtype(512)).tobytes())
    mixed = source((str(shelf.blobs[0]), 500), (str(short), least))
    assert {mixed.shard_of(round) for round in range(50)} == {shelf.blobs[0]}

    async def story() -> None:
        shelf.failing = TransportError("nobody has it")
        waiting = asyncio.create_task(mixed.batches(0))
        await asyncio.sleep(2 * RETRY_S)  # the short one, which is here, does not do instead
        shelf.failing = None
        assert (await waiting).num_sequences > 0

    run_virtual(story())
    with pytest.raises(UserError, match="shorter than one sequence"):
        source((str(short), least))


def test_batches_are_the_same_after_a_restart(shelf: Shelf) -> None:
    async def story() -> None:
        first = (await shelf.source.batches(5)).next(4)
        again = await shelf.source.batches(5)
        assert torch.equal(again.next(4), first)

    run_virtual(story())


def test_prefetching_brings_the_next_shard_and_never_raises(shelf: Shelf) -> None:
    async def story() -> None:
        await shelf.source.prefetch(1)
        await shelf.source.prefetch(1)
        assert shelf.fetched == [shelf.source.shard_of(1)]
        other = next(round for round in range(2, 50) if shelf.assigned(round) != shelf.assigned(1))
        for error in (TransportError("nobody"), UserError("the disk is full")):
            shelf.failing = error
            await shelf.source.prefetch(other)
        assert [name for name, _ in shelf.heard] == ["prefetch_failed"] * 2

    run_virtual(story())


@pytest.mark.parametrize("error", [TransportError("nobody has it"), UserError("No space left on device")])
def test_a_missing_shard_is_replaced_by_one_that_is_here(shelf: Shelf, error: Exception) -> None:
    async def story() -> None:
        round = next(round for round in range(50) if shelf.assigned(round) not in (1, 4))
        shelf.have(1, 4)
        shelf.failing = error
        began_s = asyncio.get_running_loop().time()
        assert await shelf.read(round) in (1, 4)
        assert asyncio.get_running_loop().time() == began_s, "training does not wait"
        assert [name for name, _ in shelf.heard] == ["shard_late"]
        shelf.failing = None
        await shelf.source.prefetch(round)
        assert await shelf.read(round) == shelf.assigned(round), "and read when it has come"

    run_virtual(story())


def test_with_nothing_here_it_waits_until_somebody_comes(shelf: Shelf) -> None:
    async def story() -> None:
        shelf.failing = TransportError("nobody has it")
        reading = asyncio.ensure_future(shelf.read(0))
        await asyncio.sleep(3.5 * RETRY_S)
        assert not reading.done()
        assert shelf.reasons() == [False] * 4
        shelf.failing = None
        assert await reading == shelf.assigned(0)

    run_virtual(story())


def test_a_shard_damaged_on_disk_is_fetched_again(shelf: Shelf) -> None:
    async def story() -> None:
        number = shelf.assigned(0)
        shelf.have(number)
        path = shelf.store.path(shelf.blobs[number])
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
        assert await shelf.read(0) == number
        assert shelf.fetched == [shelf.blobs[number]]
        assert [name for name, _ in shelf.heard] == ["blob_damaged"]

    run_virtual(story())


async def test_the_volunteers_own_text(tmp_path: Path) -> None:
    tokens = np.arange(300, dtype=np.uint16)
    source = LocalSource(tokens, seed="x", sequence_tokens=16)
    await source.prefetch(1)
    first, second = (await source.batches(1)).next(4), (await source.batches(2)).next(4)
    assert first.shape == (4, 17)
    assert not torch.equal(first, second)
    assert torch.equal((await source.batches(1)).next(4), first)


# ---- opening


def opened(run: Run, folder: Path, *, local_data: Path | None = None, with_blobs: bool = True) -> object:
    """`open_source` of node 0, which has nothing, beside node 1, which has the run's blobs."""

    async def story() -> object:
        signed, store = run
        async with neighbourhood(folder, 2) as nodes:
            if with_blobs:
                for blob in store.blobs():
                    nodes[1].store.put(store.read(blob))
            events, heard = listening()
            source, heldout, tokenizer = await open_source(
                signed.manifest,
                peer=PEER,
                store=nodes[0].store,
                transport=nodes[0].transport,
                donors=lambda: [nodes[1].peer],
                events=events,
                local_data=local_data,
            )
            assert len(heldout) == signed.manifest.data.heldout_tokens
            assert tokenizer.vocab_size == signed.manifest.model.vocab_size
            assert heard == []
            return (await source.batches(0)).next(2)

    return run_virtual(story())


def local(run: Run, **changes: object) -> Run:
    """The same run, with each volunteer's own text."""
    whole = run[0].manifest
    data = whole.data.model_copy(update={"kind": "local", "index": None, "train_tokens": 0})
    assert DataSpec.model_validate(data.model_dump()) == data
    return SignedManifest(whole.model_copy(update={"data": data} | changes), b""), run[1]


def test_everything_comes_from_other_peers(run: Run, tmp_path: Path) -> None:
    batch = opened(run, tmp_path)
    assert isinstance(batch, torch.Tensor)
    assert batch.shape == (2, run[0].manifest.inner.sequence_tokens + 1)


def test_without_anybody_it_fails_as_a_matter_of_the_network(run: Run, tmp_path: Path) -> None:
    with pytest.raises(TransportError):
        opened(run, tmp_path, with_blobs=False)


def test_a_local_run_reads_the_folder(run: Run, tmp_path: Path) -> None:
    batch = opened(local(run), tmp_path, local_data=write_corpus(tmp_path / "mine"))
    assert isinstance(batch, torch.Tensor)


@pytest.mark.parametrize("kind", ["none named", "missing", "empty", "not text", "too short"])
def test_a_local_run_without_usable_text(run: Run, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "mine"
    if kind != "missing":
        folder.mkdir()
    if kind == "not text":
        (folder / "picture.bin").write_bytes(bytes(range(256)) * 10)
    if kind == "too short":
        (folder / "one.txt").write_text("a")
    with pytest.raises((UserError, DataError)) as caught:
        opened(local(run), tmp_path, local_data=None if kind == "none named" else folder)
    assert "\n" not in str(caught.value)
    assert ("--data" if kind == "none named" else "mine") in str(caught.value)


def test_blobs_that_are_not_what_the_manifest_says(run: Run, tmp_path: Path) -> None:
    whole = run[0].manifest
    swapped = whole.tokenizer.model_copy(update={"blob": whole.data.heldout})
    with pytest.raises(DataError, match="tokenizer"):
        opened((SignedManifest(whole.model_copy(update={"tokenizer": swapped}), b""), run[1]), tmp_path)
