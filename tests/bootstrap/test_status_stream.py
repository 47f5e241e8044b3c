"""The status stream: one frame, then the end, also for a reader that stalls."""

from __future__ import annotations

import pytest

from bootstrap.document import MAX_DOCUMENT_BYTES, STATUS_PROTOCOL, parse_document
from bootstrap.status_stream import serve_status
from protocol.errors import StreamClosedError
from protocol.memory import LinkSpec, MemoryNetwork, MemoryTransport, run_virtual
from protocol.wire import read_frame
from tests.bootstrap.samples import document_of, peer_id, record


def test_one_frame_then_the_end() -> None:
    document = document_of(record(1), record(2, name="Zoë"))

    async def main() -> None:
        network = MemoryNetwork(link=LinkSpec(latency_s=0.05))
        async with MemoryTransport(network, peer_id(1)) as server, MemoryTransport(network, peer_id(2)) as reader:
            serve_status(server, lambda: document)
            async with await reader.open(peer_id(1), STATUS_PROTOCOL) as stream:
                data = await read_frame(stream, max_bytes=MAX_DOCUMENT_BYTES)
                assert parse_document(data) == document
                with pytest.raises(StreamClosedError):
                    await stream.read_exactly(1)

    run_virtual(main())


def test_each_reader_gets_the_document_of_its_moment() -> None:
    served = [document_of(), document_of(record(1))]

    async def main() -> list[int]:
        network = MemoryNetwork()
        counts: list[int] = []
        async with MemoryTransport(network, peer_id(1)) as server, MemoryTransport(network, peer_id(2)) as reader:
            serve_status(server, lambda: served[len(counts)])
            for _ in served:
                async with await reader.open(peer_id(1), STATUS_PROTOCOL) as stream:
                    data = await read_frame(stream, max_bytes=MAX_DOCUMENT_BYTES)
                counts.append(len(parse_document(data)["peers"]))
        return counts

    assert run_virtual(main()) == [0, 1]
