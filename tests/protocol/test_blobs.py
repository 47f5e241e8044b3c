"""Blob ids, the store's promises on disk, and partial blobs."""

from __future__ import annotations

import hashlib
import os
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.blobs import BlobDamagedError, BlobStore
from protocol.errors import ProtocolError, UserError
from protocol.ids import BlobId
from protocol.merkle import HASH_BYTES, LEAF_BYTES, MAX_BLOB_BYTES, LeafList, leaf_hash, num_leaves, parse_blob_id
from protocol.partial_blob import PartialBlob


def some_bytes(num_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(num_bytes)


def leaves_of(data: bytes) -> LeafList:
    return LeafList.of_leaves(data[start : start + LEAF_BYTES] for start in range(0, len(data), LEAF_BYTES))


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Make every write beyond `num_bytes` of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def test_blob_id_follows_its_written_definition() -> None:
    parts = [some_bytes(LEAF_BYTES, 1), some_bytes(LEAF_BYTES, 2), some_bytes(7, 3)]
    a, b, c = (sha(b"\0" + part) for part in parts)
    top = sha(b"\1" + sha(b"\1" + a + b) + c)
    size = (2 * LEAF_BYTES + 7).to_bytes(8, "big")
    assert LeafList.of_leaves(parts).blob == sha(b"\2" + size + top).hex()


def test_blob_ids_of_fixed_inputs_never_change() -> None:
    assert leaves_of(b"").blob == sha(b"\2" + bytes(8) + sha(b"\0")).hex()
    assert leaves_of(b"llm-node").blob == "047e83f077656133597d736ccb4685c44d4d33097a400e2df921d27e9726bb6b"


@given(count=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_every_leaf_and_the_size_are_bound_in(count: int, seed: int) -> None:
    rng = random.Random(seed)
    hashes = rng.randbytes(HASH_BYTES * count)
    size_bytes = count * LEAF_BYTES - rng.randrange(1, LEAF_BYTES)
    blob = LeafList(size_bytes=size_bytes, hashes=hashes).blob
    changed = bytearray(hashes)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    assert LeafList(size_bytes=size_bytes, hashes=bytes(changed)).blob != blob
    assert LeafList(size_bytes=size_bytes + 1, hashes=hashes).blob != blob
    assert LeafList.checked(blob, size_bytes=size_bytes, hashes=hashes).blob == blob


@given(size_bytes=st.integers(-(2**70), 2**70), hashes=st.binary(max_size=200))
def test_a_received_leaf_list_is_refused_or_right(size_bytes: int, hashes: bytes) -> None:
    blob = leaves_of(b"something").blob
    with pytest.raises(ProtocolError):
        LeafList.checked(blob, size_bytes=size_bytes, hashes=hashes)


def test_an_inner_node_does_not_pass_for_a_leaf() -> None:
    a, b = leaf_hash(b"a"), leaf_hash(b"b")
    assert leaf_hash(a + b) != sha(b"\1" + a + b)


def test_number_of_leaves() -> None:
    assert [num_leaves(n) for n in (0, 1, LEAF_BYTES, LEAF_BYTES + 1)] == [1, 1, 1, 2]
    assert num_leaves(MAX_BLOB_BYTES) * HASH_BYTES == 8 << 20


BAD_IDS = [
    "",
    "../../etc/passwd",
    "a" * 63,
    "A" * 64,
    "a" * 64 + "\n",
    "../" + "a" * 61,
    "a" * 63 + "/",
    "٠" * 64,
    "a" * 65,
]


@pytest.mark.parametrize("text", BAD_IDS)
def test_no_id_is_a_path(store: BlobStore, text: str) -> None:
    with pytest.raises(ValueError, match="64 lower-case"):
        parse_blob_id(text)
    for method in (store.path, store.partial_path, store.has, store.read, store.remove, store.leaves, store.verify):
        with pytest.raises(ValueError, match="64 lower-case"):
            method(BlobId(text))


@pytest.mark.parametrize("size_bytes", [0, 1, LEAF_BYTES - 1, LEAF_BYTES, LEAF_BYTES + 1, 3 * LEAF_BYTES + 17])
def test_put_then_read(store: BlobStore, tmp_path: Path, size_bytes: int) -> None:
    data = some_bytes(size_bytes)
    blob = store.put(data)
    assert blob == leaves_of(data).blob
    assert store.has(blob)
    assert store.read(blob) == data
    assert store.size_bytes(blob) == size_bytes
    assert store.leaves(blob) == leaves_of(data)
    assert store.blobs() == [blob]
    (tmp_path / "file").write_bytes(data)
    assert store.put_file(tmp_path / "file") == blob
    assert sorted(p.name for p in store.root.iterdir()) == [blob, f"{blob}.leaves"]
    store.remove(blob)
    assert not list(store.root.iterdir())


def test_put_takes_any_buffer(store: BlobStore) -> None:
    data = some_bytes(4096)
    assert store.put(bytearray(data)) == store.put(memoryview(data).cast("I")) == store.put(data)


def test_missing_things_are_one_line(store: BlobStore, tmp_path: Path) -> None:
    blob = leaves_of(b"x").blob
    for method in (store.read, store.size_bytes, store.verify, store.leaves):
        with pytest.raises(BlobDamagedError, match=r"^blob \w{12}… is not in .*; fetch it first$"):
            method(blob)
    store.remove(blob)
    with pytest.raises(UserError, match=r"^cannot read .*No such file.*; check the path and its permissions$"):
        store.put_file(tmp_path / "absent")


@pytest.mark.parametrize("damage", ["flip", "truncate", "extend"])
def test_damage_on_disk_is_noticed_and_costs_one_leaf(store: BlobStore, damage: str) -> None:
    data = some_bytes(3 * LEAF_BYTES)
    blob = store.put(data)
    leaves = store.leaves(blob)
    with store.path(blob).open("r+b") as file:
        if damage == "flip":
            file.seek(LEAF_BYTES + 5)
            file.write(bytes([data[LEAF_BYTES + 5] ^ 4]))
        else:
            file.truncate(2 * LEAF_BYTES + 9 if damage == "truncate" else 3 * LEAF_BYTES + 9)
    with pytest.raises(BlobDamagedError, match="damaged on disk"):
        store.read(blob)
    assert not store.has(blob)
    with PartialBlob(store.partial_path(blob), leaves) as partial:
        partial.rehash()
        assert partial.missing == {"flip": {1}, "truncate": {2}, "extend": set()}[damage]
        for index in list(partial.missing):
            assert partial.write(index, data[index * LEAF_BYTES : (index + 1) * LEAF_BYTES])
        store.finish(partial)
    assert store.read(blob) == data


def test_a_damaged_leaf_is_not_served(store: BlobStore) -> None:
    data = some_bytes(2 * LEAF_BYTES)
    blob = store.put(data)
    leaves = store.leaves(blob)
    with store.path(blob).open("r+b") as file:
        file.write(bytes([data[0] ^ 1]))
    assert store.read_leaf(blob, leaves, 1) == data[LEAF_BYTES:]
    with pytest.raises(BlobDamagedError):
        store.read_leaf(blob, leaves, 0)
    assert not store.has(blob)


@pytest.mark.parametrize("content", [b"", b"x" * 64, b"x" * 33])
def test_a_wrong_leaf_cache_is_only_a_cache(store: BlobStore, content: bytes) -> None:
    data = some_bytes(LEAF_BYTES + 1)
    blob = store.put(data)
    store.root.joinpath(f"{blob}.leaves").write_bytes(content)
    assert store.leaves(blob) == leaves_of(data)
    store.root.joinpath(f"{blob}.leaves").unlink()
    assert store.leaves(blob) == leaves_of(data)
    assert store.root.joinpath(f"{blob}.leaves").is_file()


def test_a_full_disk_is_one_line_and_leaves_the_store_as_it_was(store: BlobStore) -> None:
    blob = store.put(b"small")
    with (
        largest_file(LEAF_BYTES),
        pytest.raises(UserError, match=r"^cannot keep a blob in .*; free space there or") as caught,
    ):
        store.put(some_bytes(2 * LEAF_BYTES))
    assert "\n" not in str(caught.value)
    assert store.blobs() == [blob]
    assert not list(store.root.glob("*.tmp"))
    assert store.read(blob) == b"small"


def test_a_store_where_a_file_is_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"^cannot keep blobs in "):
        BlobStore(tmp_path / "file" / "blobs")


def test_the_folder_is_private_and_leftovers_of_a_crash_are_swept(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        store = BlobStore(tmp_path / "blobs")
    finally:
        os.umask(old)
    assert store.root.stat().st_mode & 0o777 == 0o700
    blob = store.put(b"kept")
    (store.root / "0123.tmp").write_bytes(b"left by a crash")
    partial = store.partial_path(leaves_of(b"other").blob)
    partial.write_bytes(b"other")
    assert BlobStore(store.root).blobs() == [blob]
    assert not list(store.root.glob("*.tmp"))
    assert partial.exists()


def test_a_partial_blob_finds_its_leaves_again(store: BlobStore) -> None:
    data = some_bytes(4 * LEAF_BYTES + 3)
    leaves = leaves_of(data)
    path = store.partial_path(leaves.blob)
    with PartialBlob(path, leaves) as partial:
        partial.rehash()
        assert partial.missing == {0, 1, 2, 3, 4}
        assert partial.done_bytes == 0
        assert not partial.write(1, data[:LEAF_BYTES]), "another leaf's bytes"
        assert not partial.write(4, data[-3:] + b"\0"), "too long"
        assert partial.write(4, data[-3:])
        assert partial.write(2, data[2 * LEAF_BYTES : 3 * LEAF_BYTES])
    with PartialBlob(path, leaves) as partial:
        partial.rehash()
        assert partial.missing == {0, 1, 3}
        assert partial.done_bytes == LEAF_BYTES + 3
    assert not store.has(leaves.blob)


def test_a_leaf_of_zeros_counts_only_where_it_belongs(store: BlobStore) -> None:
    data = bytes(LEAF_BYTES) + some_bytes(LEAF_BYTES) + bytes(LEAF_BYTES)
    leaves = leaves_of(data)
    with PartialBlob(store.partial_path(leaves.blob), leaves) as partial:
        partial.rehash()
        assert partial.missing == {0, 1, 2}
    with PartialBlob(store.partial_path(leaves.blob), leaves) as partial:
        partial.rehash()
        assert partial.missing == {1}, "the sparse file's zeros are the right bytes there"


def test_a_full_disk_under_a_partial_blob_keeps_the_leaf_missing(store: BlobStore) -> None:
    data = some_bytes(2 * LEAF_BYTES)
    leaves = leaves_of(data)
    path = store.partial_path(leaves.blob)
    with largest_file(LEAF_BYTES), pytest.raises(UserError, match=r"^cannot keep a blob"):
        PartialBlob(path, leaves)
    with PartialBlob(path, leaves) as partial:
        with largest_file(LEAF_BYTES + 4096), pytest.raises(UserError, match=r"^cannot keep a blob"):
            partial.write(1, data[LEAF_BYTES:])
        assert partial.missing == {0, 1}
        assert partial.write(1, data[LEAF_BYTES:])
        assert partial.missing == {0}


def test_a_late_write_does_not_touch_a_reused_descriptor(store: BlobStore, tmp_path: Path) -> None:
    leaves = leaves_of(b"data")
    partial = PartialBlob(store.partial_path(leaves.blob), leaves)
    partial.close()
    with (tmp_path / "innocent").open("w+b") as innocent:
        partial.write(0, b"data")
        partial.rehash()
        with pytest.raises(AssertionError):
            partial.sync()
        partial.close()
        assert innocent.read() == b""
    assert partial.missing == {0}


def test_a_symlink_in_place_of_a_partial_blob_is_refused(store: BlobStore, tmp_path: Path) -> None:
    leaves = leaves_of(b"data")
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    store.partial_path(leaves.blob).symlink_to(target)
    with pytest.raises(UserError):
        PartialBlob(store.partial_path(leaves.blob), leaves)
    assert target.read_bytes() == b"precious"
