"""The three kinds of identifier, as distinct types, so that one is never passed for another."""

from __future__ import annotations

from typing import NewType

__all__ = ["BlobId", "PeerId", "RunId"]

PeerId = NewType("PeerId", str)
"""A libp2p peer id of an Ed25519 key in base58 (`12D3KooW…`, 52 characters). It contains the public key itself."""

RunId = NewType("RunId", str)
"""SHA-256 of a run's canonical manifest, 64 lower-case hexadecimal digits."""

BlobId = NewType("BlobId", str)
"""Merkle root over a blob's 1 MiB leaves, 64 lower-case hexadecimal digits (see protocol/blobs.py)."""
