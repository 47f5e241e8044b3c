"""A peer that is told to leave does so at once, whatever it waits for."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from averaging.averager import Averager
from model.batches import RoundBatches
from model.data import decode_tokens
from node.compute import VirtualCompute
from node.dataset import BatchSource
from node.events import EventLog
from node.inner_steps import BatchSteps
from node.progress import Progress
from node.rounds import RoundLoop, RoundSettings
from node.trainer import Trainer
from protocol.directory import Directory, validate_entry
from protocol.identity import Identity
from protocol.ids import BlobId
from protocol.memory import MemoryNetwork, MemoryTransport
from protocol.virtual_time import run_virtual
from tests.node.runs import tiny_run


class SlowSource(BatchSource):
    """Has some rounds' tokens at once, and waits for those of all others, as when nobody who has a shard can be reached."""

    def __init__(self, batches: RoundBatches, *, rounds: set[int]) -> None:
        self._batches, self._rounds = batches, rounds
        self.waiting = asyncio.Event()

    async def batches(self, round: int) -> RoundBatches:
        await self.prefetch(round)
        return self._batches

    async def prefetch(self, round: int) -> None:
        if round not in self._rounds:
            self.waiting.set()
            await asyncio.Event().wait()


@pytest.mark.parametrize("rounds", [set(), {0}], ids=["for the first round", "for the next round"])
def test_it_stops_while_it_waits_for_data(tmp_path: Path, rounds: set[int]) -> None:
    signed, store = tiny_run(tmp_path)
    manifest, identity = signed.manifest, Identity.generate(b"p" * 32)
    heldout = decode_tokens(store.read(BlobId(manifest.data.heldout)), manifest.model.vocab_size)
    trainer = Trainer(manifest, heldout=heldout)

    async def story() -> float:
        clock = asyncio.get_running_loop()
        source = SlowSource(RoundBatches(heldout, seed=0, sequence_tokens=16), rounds=rounds)
        async with (
            MemoryTransport(MemoryNetwork(), identity.peer_id, validator=validate_entry) as transport,
            Averager(
                transport=transport,
                identity=identity,
                run=manifest.run_id,
                payload_bytes=trainer.replica.num_payload_bytes,
                max_lag_rounds=1,
            ) as averager,
        ):
            compute = VirtualCompute(seconds_per_call=0.01)
            progress = Progress(
                run=manifest.run_id,
                peer=identity.peer_id,
                name="",
                inner_steps=manifest.sync.inner_steps,
                traffic=transport.traffic,
            )
            loop = RoundLoop(
                manifest,
                trainer=trainer,
                steps=BatchSteps(trainer, compute, progress),
                compute=compute,
                source=source,
                averager=averager,
                directory=Directory(dht=transport.dht, identity=identity, run=manifest.run_id),
                progress=progress,
                events=EventLog(),
                settings=RoundSettings(sequences=2),
                after_round=after_round,
                announce=announce,
            )
            async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
                running = tasks.create_task(loop.run())
                await source.waiting.wait()
                await asyncio.sleep(5)
                assert not running.done()
                loop.stop()
                stopped_s = clock.time()
        return clock.time() - stopped_s

    async def after_round(round: int) -> None:
        assert round in rounds

    async def announce() -> None:
        pass

    assert run_virtual(story()) < 1.0
    assert (trainer.round, trainer.step_in_round) == (len(rounds), 0)
