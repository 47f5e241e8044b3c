"""A joiner on the memory network, and what the others there hold and claim."""

from __future__ import annotations

from model.weights import encode_weights
from node.catchup import StateFetcher
from node.compute import VirtualCompute
from node.trainer import Trainer
from protocol.directory import Directory
from protocol.records import SnapshotRef
from tests.node.swarm import Node, listening
from tests.protocol.samples import record

__all__ = ["Scene", "weights_like"]


class Scene:
    """A joiner (node 0) among trainers that show what a test gives them."""

    def __init__(self, trainer: Trainer, nodes: list[Node]) -> None:
        self.trainer, self.nodes = trainer, nodes
        self.events, self.heard = listening()
        own = nodes[0]
        self.run = trainer.manifest.run_id
        self.directory = Directory(dht=own.transport.dht, identity=own.identity, run=self.run)
        self.fetcher = StateFetcher(
            trainer=trainer,
            compute=VirtualCompute(seconds_per_call=0.1),
            store=own.store,
            transport=own.transport,
            directory=self.directory,
            events=self.events,
        )
        self._sequence = 0

    async def show(self, offers: dict[int, list[SnapshotRef]], *, round: int = 8) -> None:
        """Publish the trainers' records."""
        self._sequence += 1
        for number, refs in offers.items():
            node = self.nodes[number]
            directory = Directory(dht=node.transport.dht, identity=node.identity, run=self.run)
            now_s = node.transport.network.now_s()
            fields = {
                "run": self.run,
                "round": round,
                "snapshots": refs,
                "sequence": self._sequence,
                "sent_at_s": now_s,
            }
            assert await directory.publish(record(node.identity, **fields))

    def named(self, event: str) -> list[dict[str, object]]:
        """The fields of all events of that name."""
        return [fields for name, fields in self.heard if name == event]


def weights_like(trainer: Trainer, factor: float) -> bytes:
    """A whole snapshot; with a large factor a useless one."""
    return encode_weights({name: view * factor for name, view in trainer.flat.views(trainer.replica.phi).items()})
