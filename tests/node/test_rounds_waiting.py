"""Inner steps do not wait for the network: not for data, not for the directory, not for exchanges, not for saving."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from averaging.averager import Averager
from model.batches import RoundBatches
from model.data import Tokens, decode_tokens
from node.compute import VirtualCompute
from node.dataset import BatchSource
from node.events import EventLog
from node.inner_steps import BatchSteps
from node.preparation import LEAD_S
from node.progress import Progress
from node.rounds import RoundLoop, RoundSettings
from node.trainer import Trainer
from protocol.directory import Directory, validate_entry
from protocol.identity import Identity
from protocol.ids import BlobId, PeerId
from protocol.manifest import Manifest
from protocol.memory import LinkSpec, MemoryNetwork, MemoryTransport
from protocol.records import PeerRecord
from protocol.virtual_time import run_virtual
from tests.node.runs import tiny_run

STEP_S = 0.4
NUM_STEPS = 10
NUM_ROUNDS = 4


class StepCompute(VirtualCompute):
    """Only inner steps take time, so that all other time is waiting."""

    def __init__(self) -> None:
        super().__init__(seconds_per_call=STEP_S)

    async def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if getattr(function, "__name__", "") == "step":
            return await super().run(function, *args, **kwargs)
        return function(*args, **kwargs)


class SlowSource(BatchSource):
    """Fetching takes most of a round, and reading a good part of one."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self.fetched: set[int] = set()
        self.read: list[tuple[int, bool]] = []

    async def batches(self, round: int) -> RoundBatches:
        self.read.append((round, round in self.fetched))
        await asyncio.sleep(0.9 * STEP_S)
        return RoundBatches(self._tokens, seed=round, sequence_tokens=16)

    async def prefetch(self, round: int) -> None:
        await asyncio.sleep(0.8 * NUM_STEPS * STEP_S)
        self.fetched.add(round)


class SlowDirectory(Directory):
    """Every look is begun before a round's end and has its answer after it."""

    looks: list[bytes | None]

    async def refresh(self, *, extra: bytes | None = None) -> Any:
        self.__dict__.setdefault("looks", []).append(extra)
        await asyncio.sleep(1.25 * LEAD_S)
        return await super().refresh(extra=extra)


class Alone:
    """One peer's round loop with slow surroundings."""

    def __init__(self, manifest: Manifest, heldout: Tokens) -> None:
        self.manifest, self.trainer = manifest, Trainer(manifest, heldout=heldout)
        self.source = SlowSource(heldout)
        self.events: list[tuple[str, dict[str, Any]]] = []

    async def live(
        self, network: MemoryNetwork, name: bytes, *, others: dict[PeerId, PeerRecord] | None = None
    ) -> Progress:
        identity = Identity.generate(name.ljust(32, b"."))
        run, events = self.manifest.run_id, EventLog()
        events.listen(lambda event, fields: self.events.append((event, fields)))
        async with (
            MemoryTransport(network, identity.peer_id, validator=validate_entry) as transport,
            Averager(
                transport=transport,
                identity=identity,
                run=run,
                payload_bytes=self.trainer.replica.num_payload_bytes,
                max_lag_rounds=1,
            ) as averager,
        ):
            steps = self.manifest.sync.inner_steps
            self.progress = Progress(
                run=run, peer=identity.peer_id, name="", inner_steps=steps, traffic=transport.traffic
            )
            self.progress.state = "training"
            self.directory = SlowDirectory(dht=transport.dht, identity=identity, run=run)
            await self.announce()
            compute = StepCompute()
            loop = RoundLoop(
                self.manifest,
                trainer=self.trainer,
                steps=BatchSteps(self.trainer, compute, self.progress),
                compute=compute,
                source=self.source,
                averager=averager,
                directory=self.directory,
                progress=self.progress,
                events=events,
                settings=RoundSettings(sequences=2, adapt=False),
                after_round=self.after_round,
                announce=self.announce,
            )
            await loop.run()
        return self.progress

    async def after_round(self, round: int) -> None:
        await asyncio.sleep(0.3 * NUM_STEPS * STEP_S)  # a checkpoint, a snapshot

    async def announce(self) -> None:
        await self.directory.publish(self.progress.record([]))


def swarm_of(folder: Path, num_peers: int, **settings: Any) -> list[Alone]:
    signed, store = tiny_run(
        folder, sync__inner_steps=NUM_STEPS, sync__total_rounds=NUM_ROUNDS, sync__exchange_timeout_s=60.0, **settings
    )
    heldout = decode_tokens(store.read(BlobId(signed.manifest.data.heldout)), signed.manifest.model.vocab_size)
    return [Alone(signed.manifest, heldout) for _ in range(num_peers)]


def together(peers: list[Alone], network: MemoryNetwork) -> list[Progress]:
    async def story() -> list[Progress]:
        return list(await asyncio.gather(*(peer.live(network, b"%d" % i) for i, peer in enumerate(peers))))

    return run_virtual(story())


def test_data_directory_and_saving_cost_no_step(tmp_path: Path) -> None:
    (peer,) = swarm_of(tmp_path, 1)
    (progress,) = together([peer], MemoryNetwork())
    assert progress.rounds_done == NUM_ROUNDS
    assert progress.training_share is not None
    assert progress.training_share > 0.999
    assert peer.source.read[:NUM_ROUNDS] == [(0, False), *((number, True) for number in range(1, NUM_ROUNDS))]
    looked = peer.directory.looks
    assert len(set(looked)) == NUM_ROUNDS, "every round looks where its own lot says"


def test_exchanges_over_a_slow_line_cost_no_step_with_overlap(tmp_path: Path) -> None:
    peers = swarm_of(tmp_path, 2)
    num_bytes = peers[0].trainer.replica.num_payload_bytes
    round_s = NUM_STEPS * STEP_S
    slow = LinkSpec(latency_s=0.05, bytes_per_s=num_bytes / (0.7 * round_s))
    for progress in together(peers, MemoryNetwork(link=slow)):
        assert progress.exchanges_ok == NUM_ROUNDS
        assert progress.training_share is not None
        assert progress.training_share > 0.999


def test_without_overlap_exchanges_cost_their_time(tmp_path: Path) -> None:
    peers = swarm_of(tmp_path, 2, sync__overlap=False)
    num_bytes = peers[0].trainer.replica.num_payload_bytes
    round_s = NUM_STEPS * STEP_S
    slow = LinkSpec(latency_s=0.05, bytes_per_s=num_bytes / (0.7 * round_s))
    for progress in together(peers, MemoryNetwork(link=slow)):
        assert progress.training_share is not None
        assert 0.3 < progress.training_share < 0.65


def test_a_swarm_with_slow_lines_repeats_exactly(tmp_path: Path) -> None:
    link = LinkSpec(latency_s=0.05, bytes_per_s=20_000)
    first, second = ([*swarm_of(tmp_path / name, 3)] for name in ("a", "b"))
    together(first, MemoryNetwork(seed=1, link=link))
    together(second, MemoryNetwork(seed=1, link=link))
    for one, other in zip(first, second, strict=True):
        assert one.trainer.flat.theta.equal(other.trainer.flat.theta)
        assert one.events == other.events


@pytest.mark.parametrize("overlap", [True, False])
def test_every_validation_tells_the_share(tmp_path: Path, overlap: bool) -> None:
    (peer,) = swarm_of(tmp_path, 1, sync__overlap=overlap)
    together([peer], MemoryNetwork())
    shares = [fields["training_share"] for event, fields in peer.events if event == "validation"]
    assert len(shares) == NUM_ROUNDS
    assert all(0.5 < share <= 1.0 for share in shares)
