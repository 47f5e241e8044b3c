"""One llm-node peer without a model: transport, averager and replica, exchanging a vector of random weights.

python -m tests.benchmarks.sync_peers.ours FOLDER
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import sys
import time
from pathlib import Path
from typing import Any, cast

import psutil
import torch
import uvloop

from averaging.averager import Averager
from averaging.outer import OuterConfig
from averaging.replica import Replica
from averaging.replica_config import ReplicaConfig
from kernels.memory import in_huge_pages
from protocol.identity import Identity
from protocol.ids import PeerId, RunId
from protocol.libp2p import Libp2pTransport
from protocol.libp2p_stream import Libp2pStream
from protocol.transport import Stream
from protocol.wire import pack, read_frame, unpack, write_frame
from tests.benchmarks.sync_peers.driver import Json, read_command, reply, wait_until

__all__ = ["main"]

_RUN = RunId("b7" * 32)
_RAW = "/llm-node/benchmark-raw/1"
_DEADLINE_S = 120.0
_WEIGHT_STD = 0.02
_DRIFT_STD = 1e-4
"""Root mean square of θ − φ after a round, half a per cent of the weights: what a real round leaves."""
_CHUNK_BYTES = 1 << 20


class Peer:
    """Carries out the benchmark's commands."""

    def __init__(self, transport: Libp2pTransport, identity: Identity) -> None:
        self._transport = transport
        self._identity = identity
        self._partner: PeerId | None = None
        self._replica: Replica | None = None
        self._averager: Averager | None = None
        self._random = torch.Generator().manual_seed(hash(identity.peer_id) % 2**31)
        self._raw = asyncio.Event()
        transport.handle(_RAW, self._serve_raw)

    async def serve(self) -> None:
        """Answer commands until there are none."""
        while command := await asyncio.to_thread(read_command):
            answer = await getattr(self, command.pop("do"))(**command)
            reply(answer or {})

    async def connect(self, partner: str, address: str) -> None:
        """Know the other peer; `address` is empty for the one that is dialled."""
        self._partner = PeerId(partner)
        if address:
            await self._transport.connect(address)

    async def prepare(self, numel: int, algorithm: Any, delta: str, slow: str, eager: bool) -> None:
        """Start from weights that both peers share."""
        await self.free()
        theta = in_huge_pages(torch.empty(numel))  # as averaging/flatten.py makes a model's
        theta.normal_(std=_WEIGHT_STD, generator=torch.Generator().manual_seed(1))
        theta_only = algorithm == "theta-only"
        outer = OuterConfig(algorithm="noloco" if theta_only else algorithm, theta_only=theta_only)
        config = ReplicaConfig(outer=outer, delta_codec=delta, slow_codec=slow, compiled=False if eager else None)
        self._replica = Replica(theta, config)
        self._averager = Averager(
            transport=self._transport,
            identity=self._identity,
            run=_RUN,
            payload_bytes=self._replica.round_bytes,
            max_lag_rounds=0,
        )
        await self._averager.__aenter__()

    async def free(self) -> None:
        """Forget the weights."""
        if self._averager is not None:
            await self._averager.__aexit__(None, None, None)
        self._averager = self._replica = None

    async def drift(self) -> None:
        """What a round of training does to the weights, as far as an exchange is concerned."""
        assert self._replica is not None
        theta = self._replica.theta
        for start in range(0, theta.numel(), 1 << 20):
            piece = theta[start : start + (1 << 20)]
            piece.add_(torch.empty_like(piece).normal_(std=_DRIFT_STD, generator=self._random))

    async def exchange(self, round: int, at_s: float) -> Json:
        """One whole exchange: encode, transfer, judge, outer step."""
        replica, averager, partner = self._replica, self._averager, self._partner
        assert replica is not None
        assert averager is not None
        assert partner is not None
        sent_bytes = self._transport.traffic.sent_bytes
        await asyncio.to_thread(wait_until, at_s)
        cpu_s, daemon_cpu_s = time.process_time(), _daemon_cpu_s()
        async with _LoopWatch() as watch:
            times = [time.monotonic()]
            update = await asyncio.to_thread(replica.pack, round=round, tokens=1000)
            times.append(time.monotonic())
            deadline_s = asyncio.get_running_loop().time() + _DEADLINE_S
            result = await averager.exchange(update, candidates=[partner], deadline_s=deadline_s)
            times.append(time.monotonic())
            assert result.remote is not None, f"the exchange ended {result.outcome}"
            outcome = await asyncio.to_thread(replica.apply, [result.remote])
            times.append(time.monotonic())
        return {
            "kind": outcome.kind,
            "times_s": times,
            "cpu_s": time.process_time() - cpu_s,
            "daemon_cpu_s": _daemon_cpu_s() - daemon_cpu_s,
            "bytes": self._transport.traffic.sent_bytes - sent_bytes,
            "payload_bytes": update.num_bytes,
            "longest_block_s": watch.longest_s,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }

    # ---- the stream alone ----

    async def raw(self, num_bytes: int, dials: bool, both_ways: bool) -> Json:
        """Move bytes over a stream of p2pd and do nothing with them; with `both_ways` false, from the dialler only."""
        if not dials:
            await self._raw.wait()
            self._raw.clear()
            return {}
        assert self._partner is not None
        async with await self._transport.open(self._partner, _RAW) as stream:
            back_bytes = num_bytes if both_ways else 0
            await write_frame(stream, pack([num_bytes, back_bytes]))
            await stream.read_exactly(1)
            begun_s, cpu_s = time.monotonic(), time.process_time() + _daemon_cpu_s()
            await self._move(stream, send_bytes=num_bytes, receive_bytes=back_bytes, first=b"c")
            return {"seconds": time.monotonic() - begun_s, "cpu_s": time.process_time() + _daemon_cpu_s() - cpu_s}

    async def _serve_raw(self, stream: Stream) -> None:
        receive_bytes, send_bytes = cast(list[int], unpack(await read_frame(stream, max_bytes=64)))
        await stream.write(b"b")
        await self._move(stream, send_bytes=send_bytes, receive_bytes=receive_bytes, first=b"")
        self._raw.set()

    async def _move(self, stream: Stream, *, send_bytes: int, receive_bytes: int, first: bytes) -> None:
        """Both directions in threads, on the bare socket to p2pd: no event loop, no asyncio in the way."""
        assert isinstance(stream, Libp2pStream)
        transport = stream._writer.transport
        transport.pause_reading()  # type: ignore[attr-defined]  # nothing is on its way: each side waits for the other
        with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as bare:
            bare.setblocking(True)
            if first:
                bare.sendall(first)
            else:
                bare.recv(1)
            receiving = asyncio.to_thread(_receive, bare, receive_bytes)
            sending = asyncio.to_thread(_send, bare, send_bytes)
            await asyncio.gather(receiving, sending)
            # The last bytes are only delivered when the other side says so.
            await asyncio.to_thread(_shake, bare)


def _daemon_cpu_s() -> float:
    """Processor time that our p2pd has used so far."""
    return sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))


def _receive(bare: socket.socket, num_bytes: int) -> None:
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while num_bytes > 0:
        received = bare.recv_into(buffer[: min(num_bytes, _CHUNK_BYTES)])
        assert received, "the stream broke"
        num_bytes -= received


def _send(bare: socket.socket, num_bytes: int) -> None:
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    for start in range(0, num_bytes, _CHUNK_BYTES):
        bare.sendall(buffer[: min(num_bytes - start, _CHUNK_BYTES)])


def _shake(bare: socket.socket) -> None:
    bare.sendall(b"k")
    bare.recv(1)


class _LoopWatch:
    """How long the event loop was kept from its work at worst, by a task that wants to run every millisecond."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    async def __aenter__(self) -> _LoopWatch:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    async def _watch(self) -> None:
        while True:
            begun_s = time.monotonic()
            await asyncio.sleep(0.001)
            self.longest_s = max(self.longest_s, time.monotonic() - begun_s - 0.001)


async def main(folder: Path) -> None:
    """Run one peer until its standard input ends."""
    identity = Identity.load_or_create(folder / "key")
    transport = Libp2pTransport(
        identity=identity, runtime_dir=folder / "run", listen=["/ip4/127.0.0.1/tcp/0"], validator=None
    )
    async with transport:
        reply({"peer": identity.peer_id, "address": (await transport.addresses())[0]})
        await Peer(transport, identity).serve()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(Path(sys.argv[1])))
