"""One peer's side of averaging: φ, δ, the error-feedback residual, and the step that joins partners' progress with ours.

    pack   (round t ends)           anchor ← θ;  Δ = θ − φ;  bytes ← encode(Δ + residual), encode(φ)
           … the bytes travel while θ takes the inner steps of round t+1 …
    apply  (at a step boundary)     outer step on φ, δ with the accepted partners, or alone;  θ ← (θ − anchor) + φ

θ − anchor is the progress made meanwhile and is kept. Without overlap it is exactly zero and θ becomes φ.

Three rules keep a swarm from drifting apart. (1) Where a partner's decoded value enters, ours enters as decoded from the bytes
WE sent, not as it was: both sides then work with the same numbers, the mean of φ is conserved whatever the codec, and equal φ
give a pull of exactly zero. (2) What the Δ codec lost goes into the residual, and only when a partner has received the bytes.
(3) Without an accepted partner the step is the solo step, bit for bit.

All work runs over tiles that fit a core's cache, each tile once; the only vectors are θ, φ, δ, residual and anchor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from averaging.admission import Admission, AdmissionConfig, Distances, Verdict
from averaging.codec import codec_named
from averaging.outer import OuterConfig, outer_step
from averaging.partners import Partner, TileNorm, read_partners, weigh_partners
from averaging.update import RemoteUpdate, Update
from kernels.dispatch import tile_numel, use_compiled
from protocol.ids import PeerId

__all__ = ["Outcome", "Replica", "ReplicaConfig"]


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig:
    """How one run averages.

    Args:
        outer: the outer optimizer.
        admission: bounds on partners; None trusts every finite update (closed swarms, simulations).
        delta_codec: format of Δ.
        slow_codec: format of φ (pair-average: θ).
        compiled: whether the kernels run through torch.compile: True, False, or None for "when the model is large". Off by
            default, since compiling takes longer than many rounds' worth of eager encoding.
    """

    outer: OuterConfig = field(default_factory=OuterConfig)
    admission: AdmissionConfig | None = field(default_factory=AdmissionConfig)
    delta_codec: str = "q8"
    slow_codec: str = "bf16"
    compiled: bool | None = False

    def payload_bytes(self, num_parameters: int) -> tuple[int, int]:
        """Exact bytes of (Δ, φ) on the wire for a model of that size."""
        delta = codec_named(self.delta_codec).num_bytes(num_parameters) if self.outer.sends_delta else 0
        slow = codec_named(self.slow_codec).num_bytes(num_parameters) if self.outer.sends_slow else 0
        return delta, slow


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one `apply` did.

    Args:
        kind: solo (nobody came), refused (all who came), averaged, or clipped (all accepted updates were scaled down).
        verdicts: one per partner.
        delta_norm: ‖Δ‖ of our own round.
        shift_norm: ‖φ_new − anchor‖, the correction added to θ.
    """

    kind: Literal["solo", "averaged", "clipped", "refused"]
    verdicts: Mapping[PeerId, Verdict]
    delta_norm: float
    shift_norm: float


class Replica:
    """Averaging state of one model. Not thread-safe: call it from the thread that trains, between two inner steps.

    Args:
        theta: θ, fp32 [P], contiguous; read by `pack` and corrected in place by `apply`.
        config: how the run averages.
    """

    def __init__(self, theta: Tensor, config: ReplicaConfig) -> None:
        numel, device, outer = theta.numel(), theta.device, config.outer
        compiled = use_compiled(numel, wanted=config.compiled)
        self.config = config
        self.admission = Admission(config.admission)
        self.theta = theta
        self.phi = theta.clone()
        self._delta_codec = codec_named(config.delta_codec, compiled=compiled)
        self._slow_codec = codec_named(config.slow_codec, compiled=compiled)
        self.momentum = torch.zeros(numel if outer.has_momentum else 0, device=device)
        carries_error = outer.sends_delta and self._delta_codec.lossy
        self.residual = torch.zeros(numel if carries_error else 0, device=device)
        self.num_delta_bytes, self.num_slow_bytes = config.payload_bytes(numel)
        self._anchor = torch.empty_like(theta)
        self._delta_wire = torch.zeros(self.num_delta_bytes, dtype=torch.uint8, device=device)
        self._slow_wire = torch.zeros(self.num_slow_bytes, dtype=torch.uint8, device=device)
        self._tile = min(numel, tile_numel(device))
        self._buffers = [torch.empty(self._tile, device=device) for _ in range(4)]
        self._packed: Update | None = None
        self._delta_norm = 0.0

    @property
    def num_payload_bytes(self) -> int:
        """Exact bytes sent per partner, Δ and φ together; each partner sends as many."""
        return self.num_delta_bytes + self.num_slow_bytes

    def pack(self, *, round: int, tokens: int) -> Update:
        """Encode this round's progress and remember θ as it is now.

        Args:
            round: number of the round just finished.
            tokens: training tokens behind it.

        Returns:
            Views of our buffers, valid until the next `pack`.

        Raises:
            FloatingPointError: θ is not finite; the state is as before, and the caller should go back to a checkpoint.
        """
        norm = TileNorm()
        for tile in self._tiles():
            delta, total, scratch, _ = self._scratch(tile)
            torch.sub(self.theta[tile], self.phi[tile], out=delta)
            norm.add(delta)
            if self.num_delta_bytes:
                total = torch.add(delta, self.residual[tile], out=total) if self.residual.numel() else delta
                self._delta_codec.encode(total, self._delta_wire, start=tile.start, scratch=scratch)
            if self.num_slow_bytes:
                slow = self.phi if self.config.outer.has_momentum else self.theta
                self._slow_codec.encode(slow[tile], self._slow_wire, start=tile.start, scratch=scratch)
            self._anchor[tile] = self.theta[tile]
        self._delta_norm = norm.total()
        if not math.isfinite(self._delta_norm):
            self._packed = None
            raise FloatingPointError("the weights are not finite after this round; go back to a checkpoint")
        self._packed = Update(
            round=round, tokens=tokens, delta=_host_bytes(self._delta_wire), slow=_host_bytes(self._slow_wire)
        )
        return self._packed

    def apply(self, partners: Sequence[RemoteUpdate]) -> Outcome:
        """Take the outer step of the round that was packed last.

        Args:
            partners: those with whom the exchange was committed, so that they have our bytes; empty for a solo step.

        Returns:
            What became of every partner's update.
        """
        assert self._packed is not None, "apply without a pack before it"
        lengths = self.num_delta_bytes, self.num_slow_bytes
        readable, verdicts = read_partners(partners, num_bytes=lengths, device=self.theta.device)
        verdicts |= self._judge(readable)
        accepted = weigh_partners(readable, verdicts, own_tokens=self._packed.tokens, config=self.config.admission)
        corrects = self.config.outer.has_momentum or (
            accepted and self.num_slow_bytes
        )  # else θ must not even be rounded
        shift = TileNorm()
        for tile in self._tiles():
            self._step(tile, accepted, delivered=bool(partners))
            shift.add(torch.sub(self.phi[tile], self._anchor[tile], out=self._scratch(tile)[0]))
            if corrects:
                self.theta[tile].sub_(self._anchor[tile]).add_(self.phi[tile])
        self._packed = None
        return Outcome(kind=_kind(verdicts), verdicts=verdicts, delta_norm=self._delta_norm, shift_norm=shift.total())

    def state_dict(self) -> dict[str, Tensor]:
        """φ, δ and the residual, not copied. θ is the model's own; the history is `admission.state_dict()`."""
        return {"phi": self.phi, "momentum": self.momentum, "residual": self.residual}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy what `state_dict` returned; an exchange under way is forgotten, its progress stays in θ − φ.

        Raises:
            ValueError: a tensor is missing or has another shape; nothing is changed.
        """
        own = self.state_dict()
        for name, tensor in own.items():
            if name not in state or state[name].shape != tensor.shape:
                raise ValueError(f"averaging state lacks {name!r} of shape {tuple(tensor.shape)}")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self._packed = None

    def replace_slow(self, phi: Tensor) -> None:
        """Start anew from the swarm's φ (fp32 [P]): θ = φ, no momentum, no residual, no exchange under way."""
        self.phi.copy_(phi)
        self.theta.copy_(phi)
        self.momentum.zero_()
        self.residual.zero_()
        self._packed = None

    def _judge(self, partners: Sequence[Partner]) -> dict[PeerId, Verdict]:
        """Measure d and e of every partner in one pass, then ask admission in the order of peer ids."""
        norms = [(TileNorm(), TileNorm()) for _ in partners]
        for tile in self._tiles() if partners else ():
            own, theirs, _, _ = self._scratch(tile)
            if self.num_delta_bytes:
                self._delta_codec.decode(self._delta_wire, own, start=tile.start)
                for partner, (delta_norm, _) in zip(partners, norms, strict=True):
                    self._delta_codec.decode(partner.delta, theirs, start=tile.start)
                    delta_norm.add(theirs.sub_(own))
            if self.num_slow_bytes:
                self._slow_codec.decode(self._slow_wire, own, start=tile.start)
                for partner, (_, slow_norm) in zip(partners, norms, strict=True):
                    self._slow_codec.decode(partner.slow, theirs, start=tile.start)
                    slow_norm.add(theirs.sub_(own))
        verdicts = {}
        for partner, (delta_norm, slow_norm) in sorted(
            zip(partners, norms, strict=True), key=lambda item: item[0].peer
        ):
            distances = Distances(delta=delta_norm.total(), slow=slow_norm.total(), own=self._delta_norm)
            verdicts[partner.peer] = self.admission.judge(partner.peer, distances)
        return verdicts

    def _step(self, tile: slice, accepted: Sequence[Partner], *, delivered: bool) -> None:
        """Update φ, δ and the residual of one tile."""
        mean, pull, ours, scratch = self._scratch(tile)
        outer = self.config.outer
        if outer.has_momentum:
            torch.sub(self._anchor[tile], self.phi[tile], out=mean)
            self._mix_delta(tile, mean, scratch, accepted, delivered=delivered)
        else:
            self.phi[tile] = self._anchor[tile]
        has_pull = bool(accepted) and self.num_slow_bytes > 0
        if has_pull:
            self._sum_pulls(tile, pull, ours, scratch, accepted)
        momentum = self.momentum[tile] if outer.has_momentum else self.momentum
        outer_step(self.phi[tile], momentum, mean, pull if has_pull else None, outer)

    def _mix_delta(
        self, tile: slice, delta: Tensor, scratch: Tensor, accepted: Sequence[Partner], *, delivered: bool
    ) -> None:
        """Turn our exact Δ into the group's mean, and keep what our own encoding lost if somebody received it."""
        if delivered and self.residual.numel():
            self._delta_codec.decode(self._delta_wire, scratch, start=tile.start)
            self.residual[tile].add_(delta).sub_(scratch)
        if not accepted:
            return
        self._delta_codec.decode(self._delta_wire, delta, start=tile.start)
        delta.mul_(1.0 - sum(partner.delta_factor for partner in accepted))
        for partner in accepted:
            self._delta_codec.decode_add(
                partner.delta, delta, weight=partner.delta_factor, start=tile.start, scratch=scratch
            )

    def _sum_pulls(self, tile: slice, pull: Tensor, ours: Tensor, scratch: Tensor, accepted: Sequence[Partner]) -> None:
        """pull ← Σ factor·(theirs − ours). Differences first: φ is a thousand times larger than they are."""
        self._slow_codec.decode(self._slow_wire, ours, start=tile.start)
        pull.zero_()
        for partner in accepted:
            self._slow_codec.decode(partner.slow, scratch, start=tile.start)
            pull.add_(scratch.sub_(ours), alpha=partner.slow_factor)

    def _scratch(self, tile: slice) -> list[Tensor]:
        return [buffer[: tile.stop - tile.start] for buffer in self._buffers]

    def _tiles(self) -> Iterator[slice]:
        numel = self.theta.numel()
        for start in range(0, numel, self._tile):
            yield slice(start, min(start + self._tile, numel))


def _host_bytes(payload: Tensor) -> memoryview:
    """The payload in main memory, without a copy when it is there already."""
    host: np.ndarray[tuple[int], np.dtype[np.uint8]] = payload.cpu().numpy()
    return host.data


def _kind(verdicts: Mapping[PeerId, Verdict]) -> Literal["solo", "averaged", "clipped", "refused"]:
    kinds = {verdict.kind for verdict in verdicts.values()}
    if not kinds:
        return "solo"
    if "averaged" in kinds:
        return "averaged"
    return "clipped" if "clipped" in kinds else "refused"
