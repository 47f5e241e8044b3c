"""From texts to token shards: making a data set, describing it, and choosing who reads what.

Every document is tokenised, ends with the end-of-text token and is ordered by its SHA-256, which shuffles documents the same way
everywhere. The first ones in that order are held out whole (a duplicate has the same hash, so no held-out document is also
trained on); the rest is cut into shards. Tokens are little-endian uint16, or uint32 for large vocabularies.

Which shard a peer reads is a hash of run, peer, round and draw: nobody assigns, nobody can choose, and two peers seldom
read the same tokens at the same time. model/batches.py turns a shard into batches.
"""

from __future__ import annotations

import hashlib
import struct
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from model.errors import DataError
from model.tokenizer import Tokenizer

__all__ = ["Dataset", "ShardIndex", "Tokens", "assigned_shard", "build_dataset", "decode_tokens", "token_dtype"]

Tokens = npt.NDArray[np.unsignedinteger[Any]]

_BATCH_DOCUMENTS = 64
_MAX_SHARDS = 1 << 20
_INDEX_MAGIC = b"llm-node shards1"
_INDEX_ENTRY = struct.Struct("<32sQ")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The stored type of tokens: little-endian uint16 up to 65,536 tokens of vocabulary, uint32 beyond."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def decode_tokens(data: bytes | bytearray | memoryview, vocab_size: int) -> Tokens:
    """Read a shard's or the held-out set's bytes, without copying.

    Raises:
        DataError: a length that is no whole number of tokens, or a token outside the vocabulary.
    """
    dtype = token_dtype(vocab_size)
    if len(data) % dtype.itemsize:
        raise DataError(f"token data of {len(data)} bytes is cut off; fetch it again")
    tokens: Tokens = np.frombuffer(data, dtype=dtype)
    if tokens.size and int(tokens.max()) >= vocab_size:
        raise DataError("token data has tokens outside the vocabulary; it was made with another tokenizer")
    return tokens


class Dataset(NamedTuple):
    """What `build_dataset` makes."""

    shards: Iterator[bytes]
    heldout: bytes


class _Document(NamedTuple):
    digest: bytes
    start: int
    num_tokens: int


def build_dataset(texts: Iterable[str], tokenizer: Tokenizer, *, shard_tokens: int, heldout_tokens: int) -> Dataset:
    """Tokenise texts into training shards and a held-out set.

    Tokens are spooled to a temporary file, so that memory holds one batch of documents and one shard only.

    Args:
        texts: documents.
        tokenizer: the run's.
        shard_tokens: tokens per shard; the last one is shorter.
        heldout_tokens: exact size of the held-out set.

    Returns:
        Shards, made as they are asked for, and the held-out tokens.

    Raises:
        DataError: less text than twice the held-out set.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    with tempfile.TemporaryFile() as spool:
        documents = _tokenise(texts, tokenizer, spool, dtype)
        total = sum(document.num_tokens for document in documents)
        if total < 2 * heldout_tokens:
            raise DataError(
                f"the text has only {total} tokens and {heldout_tokens} are held out; add text or hold out fewer"
            )
        tokens = np.memmap(spool, dtype=dtype, mode="r", shape=(total,))  # outlives the file object: it maps the pages
    heldout, training = _split(sorted(documents), heldout_tokens)
    held = _gather(tokens, heldout)[:heldout_tokens].tobytes()
    return Dataset(_shards(tokens, training, shard_tokens), held)


def _tokenise(texts: Iterable[str], tokenizer: Tokenizer, spool: IO[bytes], dtype: np.dtype[Any]) -> list[_Document]:
    documents: list[_Document] = []
    iterator, start = iter(texts), 0
    while batch := list(islice(iterator, _BATCH_DOCUMENTS)):
        for text, ids in zip(batch, tokenizer.encode_many(batch), strict=True):
            spool.write(np.array([*ids, tokenizer.eot_id], dtype=dtype).data)
            documents.append(_Document(hashlib.sha256(text.encode()).digest(), start, len(ids) + 1))
            start += len(ids) + 1
    spool.flush()
    return documents


def _split(documents: list[_Document], heldout_tokens: int) -> tuple[list[_Document], list[_Document]]:
    """Hold out whole documents until there are enough tokens; long ones last, so that the set is varied and little is cut off."""
    limit = max(1, heldout_tokens // 4)
    chosen: set[bytes] = set()
    missing = heldout_tokens
    for document in sorted(documents, key=lambda document: document.num_tokens > limit):
        if missing <= 0:
            break
        if document.digest not in chosen:
            chosen.add(document.digest)
            missing -= document.num_tokens
    heldout = list({document.digest: document for document in documents if document.digest in chosen}.values())
    return heldout, [document for document in documents if document.digest not in chosen]


def _gather(tokens: Tokens, documents: Iterable[_Document]) -> Tokens:
    return np.concatenate([tokens[document.start : document.start + document.num_tokens] for document in documents])


def _shards(tokens: Tokens, documents: list[_Document], shard_tokens: int) -> Iterator[bytes]:
    parts: list[Tokens] = []
    missing = shard_tokens
    for document in documents:
        rest = tokens[document.start : document.start + document.num_tokens]
        while rest.size >= missing:
            yield np.concatenate([*parts, rest[:missing]]).tobytes()
            rest, parts, missing = rest[missing:], [], shard_tokens
        parts.append(rest)
        missing -= rest.size
    if missing < shard_tokens:
        yield np.concatenate(parts).tobytes()


@dataclass(frozen=True)
class ShardIndex:
    """All shards of a run in order: (blob id, number of tokens) each.

    Its packed form is itself a blob, named by the manifest: 16 bytes of magic, a u32 count, then 32 bytes of hash and a u64 token
    count per shard, little-endian.
    """

    entries: tuple[tuple[str, int], ...]

    @property
    def num_tokens(self) -> int:
        """Training tokens in all shards."""
        return sum(num_tokens for _, num_tokens in self.entries)

    def pack(self) -> bytes:
        """The index as bytes."""
        assert 0 < len(self.entries) <= _MAX_SHARDS
        parts = [_INDEX_ENTRY.pack(bytes.fromhex(blob), num_tokens) for blob, num_tokens in self.entries]
        return _INDEX_MAGIC + len(parts).to_bytes(4, "little") + b"".join(parts)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read an index.

        Raises:
            DataError: anything but what `pack` makes: wrong magic, count or length, no shards, an empty shard.
        """
        head = len(_INDEX_MAGIC) + 4
        count = int.from_bytes(data[len(_INDEX_MAGIC) : head], "little")
        if not data.startswith(_INDEX_MAGIC) or not 0 < count <= _MAX_SHARDS:
            raise DataError("shard index is not an index of this format; fetch it again")
        if len(data) != head + count * _INDEX_ENTRY.size:
            raise DataError("shard index is cut off or too long; fetch it again")
        entries = tuple((digest.hex(), size) for digest, size in _INDEX_ENTRY.iter_unpack(memoryview(data)[head:]))
        if min(size for _, size in entries) < 1:
            raise DataError("shard index names an empty shard; its publisher must make it again")
        return cls(entries)


def assigned_shard(run: str, peer: str, round: int, draw: int, num_shards: int) -> int:
    """The shard a peer reads: SHA-256 of run, peer, round and draw, modulo the number of shards.

    Args:
        run: run id.
        peer: peer id.
        round: the peer's round.
        draw: 0 for the round's first shard, then 1, 2, … when one is used up or can not be had.
        num_shards: entries of the index.
    """
    digest = hashlib.sha256(f"llm-node:shard\0{run}\0{peer}\0{round}\0{draw}".encode()).digest()
    return int.from_bytes(digest, "big") % num_shards
