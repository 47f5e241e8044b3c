"""The heart of a node: it beats whatever its watchers do, and its troubles are told once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from node.contact import PATIENCE_S
from node.service import HEARTBEAT_S, Service
from protocol.blobs import BlobStore
from protocol.errors import TransportError
from protocol.publication import SignedManifest
from protocol.records import PeerRecord
from protocol.virtual_time import run_virtual
from tests.node.swarm import Node, listening, neighbourhood
from tests.protocol.samples import record

Run = tuple[SignedManifest, BlobStore]
Heard = list[tuple[str, dict[str, Any]]]


class Scene:
    """A service on node 0, and perhaps one on node 1."""

    def __init__(self, run: Run, nodes: list[Node], folder: Path | None) -> None:
        self.run, self.nodes = run[0].manifest.run_id, nodes
        self.events, self.heard = listening()
        self._sequence = 0
        self.services = [self._service(run[0], node, folder if node is nodes[0] else None) for node in nodes]

    def _service(self, signed: SignedManifest, node: Node, folder: Path | None) -> Service:
        def own_record(addresses: Sequence[str]) -> PeerRecord:
            self._sequence += 1
            fields = {"run": self.run, "sequence": self._sequence, "sent_at_s": node.transport.network.now_s()}
            return record(node.identity, addresses=list(addresses), **fields)

        events = self.events if node is self.nodes[0] else listening()[0]
        return Service(
            signed,
            identity=node.identity,
            transport=node.transport,
            store=node.store,
            events=events,
            record=own_record,
            folder=folder,
        )

    def named(self, *events: str) -> list[str]:
        return [name for name, _ in self.heard if name in events]


@contextlib.asynccontextmanager
async def scene(run: Run, tmp_path: Path, num_nodes: int, *, folder: Path | None = None) -> AsyncIterator[Scene]:
    async with neighbourhood(tmp_path, num_nodes) as nodes, contextlib.AsyncExitStack() as stack:
        made = Scene(run, nodes, folder)
        for service in made.services:
            await stack.enter_async_context(service.running())
        yield made


def test_a_slow_watcher_does_not_stop_the_heart(run: Run, tmp_path: Path) -> None:
    """Copying a large snapshot may take hours; the peer must stay in everybody's directory."""

    async def story() -> None:
        async with scene(run, tmp_path, 2) as here:
            running: list[int] = []

            async def slow() -> None:
                running.append(1)
                assert len(running) == 1, "never twice at once"
                await asyncio.sleep(100 * HEARTBEAT_S)

            here.services[0].on_heartbeat(slow)
            await asyncio.sleep(50 * HEARTBEAT_S)
            assert running == [1]
            assert here.nodes[0].peer in here.services[1].directory.peers

    run_virtual(story())


def test_a_watcher_runs_after_every_beat(run: Run, tmp_path: Path) -> None:
    async def story() -> None:
        async with scene(run, tmp_path, 1) as here:
            times: list[float] = []

            async def quick() -> None:
                times.append(asyncio.get_running_loop().time())

            here.services[0].on_heartbeat(quick)
            await asyncio.sleep(10.5 * HEARTBEAT_S)
            assert 8 <= len(times) <= 10

    run_virtual(story())


def test_a_watcher_that_fails_is_told_of_and_ends_nothing(run: Run, tmp_path: Path) -> None:
    """What strangers write into the directory must not end a peer, whatever a watcher makes of it."""

    async def story() -> None:
        async with scene(run, tmp_path, 1) as here:
            times = []

            async def broken() -> None:
                times.append(asyncio.get_running_loop().time())
                raise ZeroDivisionError("a stranger's\nnumber")

            here.services[0].on_heartbeat(broken)
            await asyncio.sleep(10.5 * HEARTBEAT_S)
            assert len(times) == 10
            told = [fields for name, fields in here.heard if name == "watcher_failed"]
            assert told == [{"reason": "ZeroDivisionError: a stranger's"}] * 10

    run_virtual(story())


def test_leaving_says_goodbye_and_ends_the_watchers(run: Run, tmp_path: Path) -> None:
    async def story() -> None:
        ended: list[str] = []

        async def endless() -> None:
            try:
                await asyncio.sleep(1e9)
            finally:
                ended.append("cancelled")

        async with scene(run, tmp_path, 1) as here:
            here.services[0].on_heartbeat(endless)
            await asyncio.sleep(2 * HEARTBEAT_S)
            before = here._sequence
        assert ended == ["cancelled"]
        assert here._sequence == before + 1, "one last record"

    run_virtual(story())


def test_an_unreachable_directory_is_told_once_and_so_is_its_return(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with scene(run, tmp_path, 2) as here:
            dht = here.nodes[0].transport.dht

            async def fails(*_args: object, **_options: object) -> None:
                raise TransportError("p2pd is being started again")

            await asyncio.sleep(HEARTBEAT_S)
            with monkeypatch.context() as broken:
                broken.setattr(dht, "store", fails)
                broken.setattr(dht, "get", fails)
                await asyncio.sleep(10 * PATIENCE_S)
            await asyncio.sleep(3 * HEARTBEAT_S)
            assert here.named("swarm_unreachable", "swarm_reachable") == ["swarm_unreachable", "swarm_reachable"]

    run_virtual(story())


def test_a_partition_leaves_a_peer_alone_and_healing_ends_it(run: Run, tmp_path: Path) -> None:
    async def story() -> None:
        async with scene(run, tmp_path, 2) as here:
            network = here.nodes[0].transport.network
            await asyncio.sleep(2 * HEARTBEAT_S)
            network.partition([here.nodes[0].peer], [here.nodes[1].peer])
            await asyncio.sleep(200)
            assert here.named("alone", "company", "swarm_unreachable") == ["alone"]
            network.heal()
            await asyncio.sleep(60)
            assert here.named("alone", "company") == ["alone", "company"]

    run_virtual(story())


def test_addresses_are_cached_and_a_failure_is_told_once(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "peers.tmp").mkdir()  # in the way

    async def story() -> None:
        async with scene(run, tmp_path, 2, folder=folder) as here:
            await asyncio.sleep(5 * HEARTBEAT_S)
            assert here.named("disk_error", "disk_recovered") == ["disk_error"]
            (folder / "peers.tmp").rmdir()
            await asyncio.sleep(3 * HEARTBEAT_S)
            assert here.named("disk_error", "disk_recovered") == ["disk_error", "disk_recovered"]
            assert here.nodes[1].peer in (folder / "peers.json").read_text()

    run_virtual(story())


def test_donors_are_trainers_first(run: Run, tmp_path: Path) -> None:
    async def story() -> None:
        async with scene(run, tmp_path, 3) as here:
            await asyncio.sleep(2 * HEARTBEAT_S)
            service = here.services[0]
            assert set(service.donors()) == {node.peer for node in here.nodes[1:]}
            first = service.donors()[0]
            as_bootstrap = service.directory._alive[first].model_copy(update={"role": "bootstrap"})
            service.directory._alive[first] = as_bootstrap
            assert service.donors()[-1] == first

    run_virtual(story())
