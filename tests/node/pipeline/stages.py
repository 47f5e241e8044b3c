"""A pipeline of real stages on the memory network, in virtual time: every pass takes STEP_S."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

import torch
from torch import Tensor

from model.config import ModelConfig
from model.initial import initialise
from model.stage import Stage
from model.transformer import Transformer
from node.compute import VirtualCompute
from node.pipeline.activations import ActivationCodec
from node.pipeline.handover import StageTerms
from node.pipeline.server import StageServer
from node.pipeline.worker import StageWorker
from protocol.identity import Identity
from protocol.ids import PeerId, RunId
from protocol.memory import LinkSpec, MemoryNetwork, MemoryTransport
from protocol.transport import Transport
from protocol.violations import Violations

__all__ = [
    "BACKWARD",
    "CONFIG",
    "FORWARD",
    "PER_MICROBATCH",
    "RUN",
    "SEQUENCES",
    "STEP_S",
    "TOKENS",
    "Pipeline",
    "StagePeer",
    "gradients",
    "microbatches",
    "train_all",
    "whole_gradients",
]

FORWARD, BACKWARD = "_run_forward", "_run_backward"
"""Names of the passes that `stalls` and `begins` take."""

P = ParamSpec("P")
T = TypeVar("T")

CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    max_sequence_tokens=32,
)
RUN = RunId("5a" * 32)
SEQUENCES, TOKENS = 2, 16
PER_MICROBATCH = SEQUENCES * TOKENS
STEP_S = 0.1


def microbatches(count: int) -> list[Tensor]:
    """Token ids [B, T + 1]."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(CONFIG.vocab_size, (SEQUENCES, TOKENS + 1), generator=generator) for _ in range(count)]


class StallingCompute(VirtualCompute):
    """Hangs for a while before the call that its owner names."""

    def __init__(self) -> None:
        super().__init__(seconds_per_call=STEP_S)
        self.stalls: dict[str, float] = {}
        self._begun: dict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        name = getattr(function, "__name__", "")
        self._begun[name].set()
        await asyncio.sleep(self.stalls.pop(name, 0.0))
        return await super().run(function, *args, **kwargs)

    async def begins(self, name: str) -> None:
        """Until a call of this name has begun."""
        await self._begun[name].wait()


@dataclass(kw_only=True)
class StagePeer:
    """One peer and everything it consists of."""

    peer: PeerId
    stage: int
    transport: Transport
    worker: StageWorker
    server: StageServer
    compute: StallingCompute
    violations: Violations


class Pipeline:
    """`replicas` peers for each of `num_stages` stages; all replicas of a stage have the same weights.

    Args:
        latency_s: one way, on `network`.
        transports: one per peer, stage by stage; left out, they are on `network`.
        terms: of the stage servers.
    """

    def __init__(
        self,
        num_stages: int,
        *,
        replicas: int = 1,
        codec: str = "fp32",
        latency_s: float = 0.01,
        transports: Iterable[Transport] | None = None,
        **terms: Any,
    ) -> None:
        self.network = MemoryNetwork(link=LinkSpec(latency_s=latency_s))
        self._transports = None if transports is None else iter(transports)
        self.num_stages = num_stages
        self.peers: list[StagePeer] = []
        self._exit = AsyncExitStack()
        shape = (SEQUENCES, TOKENS, CONFIG.hidden_size)
        for stage in range(num_stages):
            for replica in range(replicas):
                self.peers.append(self._peer(stage, replica, ActivationCodec(codec, shape), terms))

    def _peer(self, number: int, replica: int, codec: ActivationCodec, terms: dict[str, Any]) -> StagePeer:
        if self._transports is None:
            identity = Identity.generate(f"{number} {replica}".encode().ljust(32, b"."))
            transport: Transport = MemoryTransport(self.network, identity.peer_id)
        else:
            transport = next(self._transports)
        peer = transport.peer_id
        stage = Stage(CONFIG, number, self.num_stages)
        initialise(stage, seed=3)
        worker, compute, violations = StageWorker(stage), StallingCompute(), Violations()
        options = {"slots": 4, "hop_timeout_s": 5.0} | terms
        server = StageServer(
            StageTerms(run=RUN, peer=peer, payload_bytes=codec.num_bytes, **options),
            transport=transport,
            compute=compute,
            worker=worker,
            codec=codec,
            router=self,
            violations=violations,
        )
        return StagePeer(
            peer=peer,
            stage=number,
            transport=transport,
            worker=worker,
            server=server,
            compute=compute,
            violations=violations,
        )

    # ---- the router

    def stage_of(self, peer: PeerId) -> int | None:
        return next((each.stage for each in self.peers if each.peer == peer), None)

    def replicas(self, peer: PeerId) -> list[PeerId]:
        stage = self.stage_of(peer)
        return [each.peer for each in self.peers if each.stage == stage and each.peer != peer]

    # ---- what tests do

    def at(self, stage: int, replica: int = 0) -> StagePeer:
        return [each for each in self.peers if each.stage == stage][replica]

    def path(self, *stages: int) -> list[PeerId]:
        """The first replica of each of these stages."""
        return [self.at(stage).peer for stage in stages]

    def counted(self, stage: int) -> int:
        """Tokens that the replicas of a stage have counted, together."""
        return sum(each.worker.num_tokens for each in self.peers if each.stage == stage)

    async def __aenter__(self) -> Self:
        for each in self.peers:
            await self._exit.enter_async_context(each.transport)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._exit.aclose()


async def train_all(pipeline: Pipeline, paths: list[list[PeerId]]) -> list[float | BaseException]:
    """One microbatch per path, all at once; a loss each, or why there is none."""
    batches = microbatches(len(paths))
    origins = [next(each for each in pipeline.peers if each.peer == path[0]) for path in paths]
    numbers = [sum(path[0] == other[0] for other in paths[:index]) for index, path in enumerate(paths)]
    return await asyncio.gather(
        *(
            origin.server.origin.train(batch, path=path, priority=number)
            for origin, number, batch, path in zip(origins, numbers, batches, paths, strict=True)
        ),
        return_exceptions=True,
    )


def whole_gradients(count: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and gradients of the unsplit model over the same microbatches."""
    whole = Transformer(CONFIG)
    initialise(whole, seed=3)
    loss = torch.stack([whole.loss(batch) for batch in microbatches(count)]).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}


def gradients(pipeline: Pipeline) -> dict[str, torch.Tensor]:
    """Mean gradients of the first replicas."""
    found: dict[str, torch.Tensor] = {}
    for stage in range(pipeline.num_stages):
        worker = pipeline.at(stage).worker
        assert worker.end_iteration(least_tokens=1)
        found |= {name: p.grad for name, p in worker.stage.named_parameters() if p.grad is not None}
    return found
