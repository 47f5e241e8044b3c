"""One training run of the convergence benchmark: N replicas of a small transformer on real text, and one way of averaging.

Everything that decides the result is the product's own code: model, initial weights, batches, inner optimizer, learning rate, and
`averaging.replica` for pack, codec and outer step. Only the network is left out: updates are handed over in memory, nobody is
late, and the partners of a round are a random perfect matching. All replicas live in one process and take their steps in turn,
in bfloat16 autocast and compiled, so that two thousand steps of eight replicas take minutes.

`synchronous` is the upper reference: one model, every step with the mean gradient of the N replicas' batches.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from averaging.flatten import FlatParameters
from averaging.fragments import Piece
from averaging.replica import Replica, ReplicaConfig
from averaging.update import RemoteUpdate
from model.batches import RoundBatches, heldout_batches
from model.config import ModelConfig
from model.corpus import iter_stdlib
from model.data import Tokens, build_dataset, decode_tokens
from model.initial import initialise
from model.optim import InnerConfig, build_optimizer, learning_rate, set_learning_rate
from model.tokenizer import Tokenizer, train_tokenizer
from model.transformer import Transformer
from protocol.ids import PeerId
from protocol.manifest import SyncSpec
from tests.benchmarks.shared_moments import moment_bytes, share_moments

__all__ = ["MODEL", "SEQUENCES", "SEQUENCE_TOKENS", "VOCABULARY", "Cell", "cell_key", "run_cell", "sync_spec", "texts"]

SEQUENCE_TOKENS = 64
SEQUENCES = 16
VOCABULARY = 1024
HELDOUT_TOKENS = 32_769
MODEL = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=192,
    intermediate_size=512,
    num_layers=2,
    num_heads=3,
    num_kv_heads=3,
    max_sequence_tokens=SEQUENCE_TOKENS,
)
_LATER_SYNC = {"fragment_choice": "turn", "early_slow": False}
_LATER_FIELDS = {"sequences": 16, "moments": False}
"""What came after the first stored runs, in [sync] and in a cell, with the value that those had."""
WARMUP_STEPS = 100
DECAY_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run.

    Args:
        method: its name in the table; `synchronous` is special.
        replicas: N.
        seed: of the initial weights, the batches and the pairs.
        steps: inner steps of every replica.
        lr: peak learning rate.
        sync: fields of the manifest's [sync] section, as an organiser would write them.
        inner: other fields of [inner].
        delay_steps: inner steps between `pack` and `apply`, as overlap makes them.
        sequences: per replica and step.
        moments: partners also take the mean of both AdamW moments of what they exchange, each sent in 8 bits.
    """

    method: str
    replicas: int
    seed: int
    steps: int
    lr: float
    sync: Mapping[str, Any] = field(default_factory=dict)
    inner: Mapping[str, Any] = field(default_factory=dict)
    delay_steps: int = 0
    sequences: int = SEQUENCES
    moments: bool = False


def cell_key(cell: Cell) -> str:
    """Names a cell by everything that decides its result but the code."""
    sync = sync_spec(cell).model_dump()  # with all defaults as they are now
    fields = asdict(cell) | {"sync": sync}
    for section, later in ((sync, _LATER_SYNC), (fields, _LATER_FIELDS)):
        for name, default in later.items():
            if section[name] == default:
                del section[name]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def sync_spec(cell: Cell) -> SyncSpec:
    """The validated [sync] section of a cell."""
    return SyncSpec.model_validate(dict(cell.sync))


@functools.cache
def texts() -> tuple[Tokens, Tokens]:
    """Training and held-out tokens: the standard library's sources, tokenised by a tokenizer trained on them."""
    sources = list(iter_stdlib())
    tokenizer = Tokenizer(train_tokenizer(sources, VOCABULARY))
    dataset = build_dataset(sources, tokenizer, shard_tokens=1 << 31, heldout_tokens=HELDOUT_TOKENS)
    return decode_tokens(b"".join(dataset.shards), VOCABULARY), decode_tokens(dataset.heldout, VOCABULARY)


@functools.cache
def _compiled_loss() -> Any:
    def loss(model: Transformer, tokens: Tensor) -> Tensor:
        # Explicit attention: at 64 tokens three times faster than the fused kernel's backward pass.
        with sdpa_kernel(SDPBackend.MATH):
            return model.loss(tokens)

    return torch.compile(loss)


def _loss(model: Transformer, tokens: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        loss: Tensor = _compiled_loss()(model, tokens)
    return loss


class _Member:
    """One replica: model, optimizer and averaging state."""

    def __init__(self, cell: Cell, number: int) -> None:
        self.peer = PeerId(f"replica-{number}")
        self.model = Transformer(MODEL)
        initialise(self.model, cell.seed)
        self.flat = FlatParameters(self.model)
        self.inner = InnerConfig(
            lr=cell.lr, sequence_tokens=SEQUENCE_TOKENS, **{"warmup_steps": WARMUP_STEPS, **cell.inner}
        )
        self._sequences = cell.sequences
        self.optimizer = build_optimizer(self.model, self.inner)
        self.replica = Replica(self.flat.theta, ReplicaConfig.of(sync_spec(cell), admission=None))

    def step(self, batches: Sequence[RoundBatches], rate: float) -> None:
        """One optimizer step on the mean gradient over one batch of each."""
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=False)
        for source in batches:
            (_loss(self.model, source.next(self._sequences)) / len(batches)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.inner.clip_norm)
        self.optimizer.step()

    def pieces(self, round: int) -> list[Piece]:
        """What a round exchanges."""
        config, numel = self.replica.config, self.flat.theta.numel()
        division = config.division(numel)
        return list(division.pieces(division.index(round), max_numel=numel))

    @torch.no_grad()
    def evaluate(self, heldout: Tokens) -> float:
        """Held-out loss in nats per token of the present weights."""
        total, count = 0.0, 0
        for batch in heldout_batches(heldout, sequence_tokens=SEQUENCE_TOKENS, num_sequences=SEQUENCES):
            total += float(_loss(self.model, batch)) * len(batch)
            count += len(batch)
        return total / count


class _Exchanges:
    """All exchanges of a run, without a network."""

    def __init__(self, cell: Cell, members: Sequence[_Member]) -> None:
        self._cell, self._members, self._sync = cell, members, sync_spec(cell)
        self._pairs = np.random.default_rng([cell.seed, cell.replicas])
        self._round = 0
        self._waiting: list[tuple[_Member, list[RemoteUpdate]]] = []
        self.bytes_per_peer = 0.0
        self.unreadable: list[float] = []

    def after_step(self, step: int) -> None:
        """Pack at the end of a round, apply `delay_steps` later."""
        if self._sync.group == "none":
            return
        if step % self._sync.inner_steps == self._cell.delay_steps % self._sync.inner_steps:
            self.apply()
        if step % self._sync.inner_steps == 0:
            self._pack()
            if not self._cell.delay_steps:
                self.apply()

    def apply(self) -> None:
        """The outer step of the round packed last, if it waits."""
        for member, partners in self._waiting:
            outcome = member.replica.apply(partners, steps_since_pack=self._cell.delay_steps)
            self.unreadable.append(outcome.unreadable_share)
        self._waiting = []

    def _pack(self) -> None:
        tokens = self._sync.inner_steps * self._cell.sequences * SEQUENCE_TOKENS
        updates = {}
        for member in self._members:
            update = member.replica.pack(round=self._round, tokens=tokens)
            updates[member.peer] = RemoteUpdate(
                peer=member.peer, round=update.round, tokens=tokens, delta=update.delta, slow=update.slow
            )
        for group in self._groups():
            if self._cell.moments:
                share_moments(group, group[0].pieces(self._round))
            for member in group:
                others = [updates[other.peer] for other in group if other is not member]
                self._waiting.append((member, others))
        self.bytes_per_peer += self._round_bytes()
        self._round += 1

    def _groups(self) -> list[list[_Member]]:
        if self._sync.group == "all":
            return [list(self._members)]
        order = [self._members[index] for index in self._pairs.permutation(len(self._members))]
        return [order[index : index + 2] for index in range(0, len(order), 2)]

    def _round_bytes(self) -> float:
        """Bytes that one peer sends: its payload to one partner or to all, or twice (N − 1)/N of it in an all-reduce."""
        payload, others = self._members[0].replica.round_bytes(self._round), len(self._members) - 1
        if self._cell.moments:
            payload += moment_bytes(self._members[0].pieces(self._round))
        if self._sync.group != "all":
            return payload
        # A mean does not survive being made sparse once more, so nodes send topk to everybody (docs/LOG.md).
        return payload * (others if self._sync.delta_codec == "topk" else 2 * others / len(self._members))


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train, and measure on the held-out text.

    Returns:
        `loss` (mean over the replicas), `averaged` (of the averaged model), `spread` (mean ‖θ_i − mean θ‖ / ‖mean θ‖),
        `bytes_per_peer`, `unreadable` (share of blocks the lattice codec could not read) and `seconds`.
    """
    torch.set_num_threads(1)  # several runs share the machine, and matrices this small gain nothing from more
    started = time.perf_counter()
    train, heldout = texts()
    synchronous = cell.method.startswith("synchronous")
    members = [_Member(cell, number) for number in range(1 if synchronous else cell.replicas)]
    sources = [
        RoundBatches(train, seed=1000 * cell.seed + number, sequence_tokens=SEQUENCE_TOKENS)
        for number in range(cell.replicas)
    ]
    exchanges = _Exchanges(cell, members)
    for step in range(cell.steps):
        rate = learning_rate(
            step, config=members[0].inner, total_steps=cell.steps, decay_steps=int(DECAY_SHARE * cell.steps)
        )
        for number, member in enumerate(members):
            member.step(sources if synchronous else sources[number : number + 1], rate)
        if not synchronous:
            exchanges.after_step(step + 1)
    exchanges.apply()
    result = _measure(members, heldout)
    if synchronous:  # an fp32 ring all-reduce of the gradients in every step
        exchanges.bytes_per_peer = cell.steps * 8.0 * MODEL.num_parameters * (cell.replicas - 1) / cell.replicas
    unreadable = exchanges.unreadable
    return result | {
        "bytes_per_peer": round(exchanges.bytes_per_peer),
        "unreadable": sum(unreadable) / max(len(unreadable), 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _measure(members: Sequence[_Member], heldout: Tokens) -> dict[str, Any]:
    losses = [member.evaluate(heldout) for member in members]
    stacked = torch.stack([member.flat.theta for member in members])
    mean = stacked.mean(dim=0)
    spread = float((stacked - mean).norm(dim=1).mean() / mean.norm())
    members[0].flat.theta.copy_(mean)
    return {"loss": float(np.mean(losses)), "averaged": members[0].evaluate(heldout), "spread": spread}
