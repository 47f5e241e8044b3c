"""The status document of a swarm, from one of its peers: what `llm-node status` shows."""

from __future__ import annotations

from typing import Any

from bootstrap.document import MAX_DOCUMENT_BYTES, STATUS_PROTOCOL, parse_document
from node.light_client import fetch_frame

__all__ = ["fetch_status"]


def fetch_status(address: str, *, timeout_s: float = 15.0) -> dict[str, Any]:
    """Fetch and check the status document of the peer at `address`.

    Args:
        address: multiaddress, as peers print it.
        timeout_s: for everything together.

    Returns:
        A document in the schema `bootstrap.document.StatusDocument`.

    Raises:
        UserError: see `node.light_client.fetch_frame`.
        ProtocolError: the peer answered with something that is not a status document.
    """
    return parse_document(
        fetch_frame(address, STATUS_PROTOCOL, what="status", max_bytes=MAX_DOCUMENT_BYTES, timeout_s=timeout_s)
    )
