"""One stage peer of the pipeline benchmark: real transport, real executor, passes of a given length.

python -m tests.benchmarks.pipeline_peers.peer FOLDER HOST
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar
from unittest.mock import patch

import psutil
import torch
import uvloop

from node.compute import ThreadCompute
from node.pipeline.activations import ActivationCodec
from node.pipeline.handover import StageTerms
from node.pipeline.iterations import Iterations, Way
from node.pipeline.links import Links
from node.pipeline.replay import BACKWARD, FORWARD, LOSS
from node.pipeline.routing import Replica, StageMap
from node.pipeline.server import StageServer
from node.pipeline.trainer import StageTrainer
from node.service import HEARTBEAT_S
from protocol.errors import StreamClosedError, TransportError
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.libp2p import Libp2pTransport
from protocol.manifest import Manifest
from protocol.records import PeerRecord
from protocol.transport import Stream
from protocol.violations import Violations
from protocol.wire import read_bulk, write_bulk
from tests.benchmarks.sync_peers.driver import Json, read_command, reply

__all__ = ["main"]

P = ParamSpec("P")
T = TypeVar("T")

PROBE = "/llm-node/benchmark-probe/1"
HOP_TIMEOUT_S = 60.0
ITERATION_TIMEOUT_S = 60.0
PAUSE_S = 0.6
"""Between two payloads on a link, as in an iteration: TCP begins slowly again."""
MEETING_TRIES = 60


class PaddedCompute(ThreadCompute):
    """Every pass takes its given time: its real work, and then sleep in the compute thread, as a slower processor would.

    Args:
        durations_s: by the name of the function that is run.
    """

    def __init__(self, durations_s: dict[str, float]) -> None:
        super().__init__()
        self._durations_s = durations_s
        self.passes: list[tuple[str, float, float, float]] = []
        """Name, begin and end on the machine's monotonic clock, and seconds of work, of what has run."""

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return (await self.timed(function, *args, **kwargs))[0]

    async def timed(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> tuple[T, float]:
        name = getattr(function, "__name__", "")

        def padded() -> tuple[T, float]:
            began_s = time.monotonic()
            result = function(*args, **kwargs)
            worked_s = time.monotonic() - began_s
            time.sleep(max(0.0, self._durations_s.get(name, 0.0) - worked_s))
            ended_s = time.monotonic()
            self.passes.append((name, began_s, ended_s, worked_s))
            return result, ended_s - began_s

        return await super().run(padded)


class Peer:
    """Carries out the benchmark's commands."""

    def __init__(self, transport: Libp2pTransport) -> None:
        self._transport = transport
        self._me = transport.peer_id
        self._plans: list[list[Way]] = []
        transport.handle(PROBE, self._serve_probe)

    async def serve(self) -> None:
        """Answer commands until there are none."""
        while command := await asyncio.to_thread(read_command):
            answer = await getattr(self, command.pop("do"))(**command)
            reply(answer or {})

    async def meet(self, peers: dict[str, list[str]]) -> None:
        """Know the others, and be connected to those that come before us: of two peers one dials."""
        for peer, addresses in peers.items():
            if peer != self._me:
                await self._transport.learn(PeerId(peer), addresses)
        for peer in list(peers)[: list(peers).index(self._me)]:
            for _ in range(MEETING_TRIES):
                if await self._reaches(PeerId(peer)):
                    break
                await asyncio.sleep(1.0)
            else:
                raise RuntimeError(f"{peer} is out of reach; is the machine very busy?")

    async def _reaches(self, peer: PeerId) -> bool:
        try:
            await (await self._transport.open(peer, PROBE)).close()
        except TransportError:
            return False
        return True

    async def prepare(self, manifest: str, stage: int, holders: dict[str, int], durations_s: dict[str, float]) -> Json:
        """Hold a stage."""
        run = Manifest.from_toml(manifest)
        spec, inner = run.pipeline, run.inner
        shape = (spec.microbatch_sequences, inner.sequence_tokens, run.model.hidden_size)
        codec = ActivationCodec(spec.codec, shape)
        trainer = StageTrainer(run, stage=stage)
        self._stage, self._run = stage, run.run_id
        self._compute = PaddedCompute(durations_s)
        stages = StageMap(num_stages=spec.stages, path_length=spec.path_length)
        stages.update({PeerId(peer): Replica(stage=held) for peer, held in holders.items()})
        self._failures: Counter[str] = Counter()
        self._links = Links(self._transport, payload_bytes=codec.num_bytes)
        self._server = server = StageServer(
            StageTerms(
                run=run.run_id,
                peer=self._me,
                payload_bytes=codec.num_bytes,
                slots=spec.slots,
                per_origin=spec.microbatches,
                hop_timeout_s=HOP_TIMEOUT_S,
            ),
            transport=self._transport,
            compute=self._compute,
            worker=trainer.worker,
            codec=codec,
            router=stages,
            violations=Violations(),
            links=self._links,
            on_failure=lambda task, reason: self._failures.update([f"{task.kind}: {reason}"]),
        )
        self._stages = stages
        self._iterations = Iterations(
            peer=self._me,
            server=server,
            trainer=trainer,
            compute=self._compute,
            stages=stages,
            choose_paths=lambda iteration, _: self._plans[iteration % len(self._plans)],
            timeout_s=ITERATION_TIMEOUT_S,
        )
        generator = torch.Generator().manual_seed(stage)
        batch = (spec.microbatch_sequences, inner.sequence_tokens + 1)
        self._batches = [
            torch.randint(run.model.vocab_size, batch, generator=generator)
            for _ in range(spec.microbatches if stage == 0 else 0)
        ]
        self._payload = codec.encode(torch.zeros(shape))
        return {"payload_bytes": codec.num_bytes, "lost": 0}

    async def train(self, plans: list[list[Way]], iterations: int) -> Json:
        """Run iterations.

        Args:
            plans: path and priority of each microbatch of ours. Iteration i takes plan i, and begins again after the last.
        """
        self._plans = [[(path, priority) for path, priority in plan] for plan in plans]
        self._compute.passes.clear()
        self._failures.clear()
        cpu_s, sent_bytes = _cpu_s(), self._transport.traffic.sent_bytes
        ends, returned, lost, complete = [], [], [], []
        measuring = asyncio.create_task(self._measure_links())
        for _ in range(iterations):
            stats = await self._iterations.run(self._batches)
            ends.append(time.monotonic())
            returned.append(stats.returned)
            lost.append(stats.lost)
            complete.append(stats.is_complete)
        measuring.cancel()
        return {
            "ends_s": ends,
            "returned": returned,
            "lost": lost,
            "complete": complete,
            "failures": self._failures,
            "passes": self._compute.passes,
            "cpu_s": _cpu_s() - cpu_s,
            "bytes": self._transport.traffic.sent_bytes - sent_bytes,
        }

    # ---- what a live peer measures, and tells

    async def _measure_links(self) -> None:
        """One link per heartbeat, as in node/pipeline/steps.py."""
        while True:
            await self._links.probe_next(self._stages.everybody)
            await asyncio.sleep(HEARTBEAT_S)

    async def record(self) -> Json:
        """Our record, as far as a planner reads it."""
        pace = self._server.pace
        record = PeerRecord(
            run=self._run,
            peer=self._me,
            sequence=1,
            role="trainer",
            state="training",
            started_at_s=0.0,
            sent_at_s=0.0,
            stage=self._stage,
            forward_s=pace.get(FORWARD, 0.0),
            backward_s=pace.get(BACKWARD, 0.0),
            loss_s=pace.get(LOSS, 0.0),
            links=self._links.notes(),
        )
        return record.model_dump(mode="json")

    # ---- the links alone

    async def probe(self, peer: str, times: int) -> Json:
        """Seconds for one microbatch's payload to another one, after a pause each, one byte's way back taken off."""
        tries = []
        for _ in range(MEETING_TRIES):
            await asyncio.sleep(PAUSE_S)
            with contextlib.suppress(TransportError):  # of two connections that were made at once, one is closed
                tries.append(await self._probe(PeerId(peer)))
            if len(tries) == times:
                break
        return {"link_s": min(tries)}

    async def _probe(self, peer: PeerId) -> float:
        begun_s = time.monotonic()
        async with await self._transport.open(peer, PROBE) as stream:
            await stream.write(b"p")
            await stream.read_exactly(1)
            round_trip_s = time.monotonic() - begun_s
            begun_s = time.monotonic()
            await write_bulk(stream, self._payload)
            await stream.read_exactly(1)
            return time.monotonic() - begun_s - round_trip_s / 2

    async def _serve_probe(self, stream: Stream) -> None:
        with contextlib.suppress(StreamClosedError):  # opened to see whether we are there
            await stream.read_exactly(1)
            await stream.write(b"q")
            await read_bulk(stream, len(self._payload))
            await stream.write(b"q")


def _cpu_s() -> float:
    """Processor time of this process and of p2pd so far."""
    us = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (us, *us.children(recursive=True)))


async def main(folder: Path, host: str) -> None:
    """Run one peer until its standard input ends."""
    identity = Identity.load_or_create(folder / "key")
    transport = Libp2pTransport(
        identity=identity, runtime_dir=folder / "run", listen=[f"/ip4/{host}/tcp/0"], validator=None
    )
    async with transport:
        reply({"peer": identity.peer_id, "addresses": await transport.addresses()})
        await Peer(transport).serve()


if __name__ == "__main__":
    torch.set_num_threads(1)
    # At the priority of everything else here: the passes have a given length.
    with patch("node.compute.NICENESS", 0), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(Path(sys.argv[1]), sys.argv[2]))
