"""One peer's side of averaging: φ, δ, the error-feedback residual, and the step that joins partners' progress with ours.

    pack   (round t ends)           anchor ← θ;  Δ = θ − φ;  bytes ← encode(Δ + residual), encode(φ or θ)
           … the bytes travel while θ takes the inner steps of round t+1 …
    apply  (at a step boundary)     outer step on φ, δ with the accepted partners, or alone;  θ ← (θ − anchor) + φ

θ − anchor is the progress made meanwhile and is kept. Without overlap it is exactly zero and θ becomes φ. With fragments
(averaging/fragments.py) both do all this to one fragment and leave the others alone; with a blend a, θ takes only the share 1 − a
of the correction φ − anchor.

Three rules keep a swarm from drifting apart. (1) Where a partner's decoded value enters, ours enters as decoded from the bytes
WE sent, not as it was: both sides then work with the same numbers, the mean of φ is conserved whatever the codec, and equal φ
give a pull of exactly zero (with the lattice, whose steps are each peer's own, of a step at most). (2) What the Δ codec lost goes
into the residual, and only when a partner has received the bytes. (3) Without an accepted partner the step is the solo step,
bit for bit.

All work runs over tiles that fit a core's cache, each tile once; the only vectors are θ, φ, δ, residual and anchor.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from averaging.admission import Admission, Verdict
from averaging.fragments import Fragments, Piece
from averaging.outer import outer_step
from averaging.partners import Measurement, Partner, TileNorm, read_partners, weigh_partners
from averaging.payloads import Buffers, Payloads
from averaging.replica_config import ReplicaConfig
from averaging.update import RemoteUpdate, Update
from kernels.dispatch import tile_numel, use_compiled
from protocol.ids import PeerId

__all__ = ["Outcome", "Replica", "ReplicaConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one `apply` did.

    Args:
        kind: solo (nobody came), refused (all who came), averaged, or clipped (all accepted updates were scaled down).
        verdicts: one per partner.
        delta_norm: ‖Δ‖ of our own round.
        shift_norm: ‖(1 − a)·(φ_new − anchor)‖, the correction added to θ.
        step_scale: factor on the outer step, below 1 when it was clipped or delayed.
        unreadable_share: share, in 0 … 1, of the partners' blocks that the lattice codec could not tell.
    """

    kind: Literal["solo", "averaged", "clipped", "refused"]
    verdicts: Mapping[PeerId, Verdict]
    delta_norm: float
    shift_norm: float
    step_scale: float = 1.0
    unreadable_share: float = 0.0


class Replica:
    """Averaging state of one model. Not thread-safe: call it from the thread that trains, between two inner steps.

    Args:
        theta: θ, fp32 [P], contiguous; read by `pack` and corrected in place by `apply`.
        config: how the run averages.

    Raises:
        ValueError: θ has too few parameters for the fragments.
    """

    def __init__(self, theta: Tensor, config: ReplicaConfig) -> None:
        numel, device, outer = theta.numel(), theta.device, config.outer
        compiled = use_compiled(numel, wanted=config.compiled)
        self.config = config
        self.admission = Admission(config.admission)
        self.theta = theta
        self.phi = theta.clone()
        self._payloads = Payloads(numel, config, device=device, compiled=compiled)
        self.momentum = torch.zeros(numel if outer.has_momentum else 0, device=device)
        carries_error = outer.sends_delta and self._payloads.delta_codec.lossy
        self.residual = torch.zeros(numel if carries_error else 0, device=device)
        self._fragments = Fragments(numel, config.fragments)
        self._anchor = torch.empty_like(theta)
        self._tile = min(numel, tile_numel(device))
        self._buffers = [torch.empty(self._tile, device=device) for _ in range(6)]
        self._packed: Update | None = None
        self._delta_norm = 0.0

    @property
    def num_payload_bytes(self) -> int:
        """Bytes sent per partner in the round of fragment 0, which is the longest; without fragments, in every round."""
        return self.round_bytes(0)

    def round_bytes(self, round: int) -> int:
        """Exact bytes sent per partner in one round, Δ and φ together; each partner sends as many."""
        return sum(self.config.payload_bytes(self.theta.numel(), round))

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
        norm, payloads = TileNorm(), self._payloads
        payloads.begin(round)
        for piece in self._pieces(round):
            buffers = self._buffers_of(piece)
            delta = torch.sub(self.theta[piece.span], self.phi[piece.span], out=buffers.mean)
            norm.add(delta)
            if payloads.delta.numel():
                payloads.encode_delta(piece, self._with_residual(piece, delta, buffers.pull), buffers.scratch)
            if payloads.slow.numel():
                slow, momentum = self._slow_vectors(piece.span)
                payloads.encode_slow(piece, slow, buffers, momentum=momentum)
            self._anchor[piece.span] = self.theta[piece.span]
        self._delta_norm = norm.total()
        if not math.isfinite(self._delta_norm):
            self._packed = None
            raise FloatingPointError("the weights are not finite after this round; go back to a checkpoint")
        delta_bytes, slow_bytes = payloads.host_bytes()
        self._packed = Update(round=round, tokens=tokens, delta=delta_bytes, slow=slow_bytes)
        return self._packed

    def apply(
        self, partners: Sequence[RemoteUpdate], *, steps_since_pack: int = 0, group_mean: memoryview | None = None
    ) -> Outcome:
        """Take the outer step of the round that was packed last.

        Args:
            partners: those with whom the exchange was committed, so that they have our bytes; empty for a solo step. Beside a
                group mean they bring φ only.
            steps_since_pack: inner steps taken meanwhile; if there were any, the step is delayed and `staleness_penalty` applies.
            group_mean: the group's mean Δ from an all-reduce that took ours in, encoded like Δ; trusted as it is.

        Returns:
            What became of every partner's update.
        """
        assert self._packed is not None, "apply without a pack before it"
        own, self._packed = self._packed, None
        readable, verdicts = read_partners(
            partners,
            own=own if group_mean is None else replace(own, delta=memoryview(b"")),
            num_fragments=self.config.fragments,
            device=self.theta.device,
        )
        found = self._measure(own, readable)
        verdicts |= {
            partner.peer: found[partner.peer].judge(partner.peer, own=self._delta_norm, admission=self.admission)
            for partner in sorted(readable, key=lambda partner: partner.peer)
        }
        accepted = weigh_partners(readable, verdicts, own_tokens=own.tokens, config=self.config)
        self._payloads.take_group_mean(group_mean)
        clip = self._clip(own, accepted)
        scale = clip * (self.config.outer.staleness_penalty if steps_since_pack > 0 else 1.0)
        shift = TileNorm()
        for piece in self._pieces(own.round):
            if (partners or group_mean is not None) and self.residual.numel():
                self._keep_residual(piece)
            self._step(piece, accepted, scale=scale, clip=clip)
            shift.add(self._correct(piece, moves=self.config.outer.keeps_slow or bool(accepted)))
        return Outcome(
            kind=_kind(verdicts) if verdicts or group_mean is None else "averaged",
            verdicts=verdicts,
            delta_norm=self._delta_norm,
            shift_norm=(1.0 - self.config.blend) * shift.total(),
            step_scale=scale,
            unreadable_share=self._unreadable_share(found.values()),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """φ, δ, residual and the lattice's window, not copied. θ is the model's own; the history is `admission.state_dict()`."""
        state = {"phi": self.phi, "momentum": self.momentum, "residual": self.residual}
        if self._payloads.window is not None:
            state["window"] = self._payloads.window.distance
        return state

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

    def _with_residual(self, piece: Piece, delta: Tensor, out: Tensor) -> Tensor:
        """Δ + b·e, what is to be encoded."""
        if not self.residual.numel():
            return delta
        return torch.add(delta, self.residual[piece.span], alpha=self.config.error_decay, out=out)

    def _slow_vectors(self, span: slice) -> tuple[Tensor, Tensor | None]:
        """What travels as the slow payload, and the δ that tells how far it moved, if that is what moved it."""
        if self.config.outer.slow_is_theta:
            return self.theta[span], None
        return self.phi[span], self.momentum[span] if self.config.outer.has_momentum else None

    def _near(self, span: slice) -> Tensor:
        """What we encoded as the slow payload. φ stands still between `pack` and the step, θ does not."""
        return (self._anchor if self.config.outer.slow_is_theta else self.phi)[span]

    def _measure(self, own: Update, partners: Sequence[Partner]) -> dict[PeerId, Measurement]:
        """How far every partner is from us, in one pass."""
        found = [(partner, Measurement()) for partner in partners]
        for piece in self._pieces(own.round) if found else ():
            self._payloads.measure(piece, self._near(piece.span), self._buffers_of(piece), found)
        return {partner.peer: measurement for partner, measurement in found}

    def _unreadable_share(self, found: Collection[Measurement]) -> float:
        """The share of blocks that could not be read; the window widens if that was most of them."""
        if self._payloads.window is not None and any(measurement.is_too_far for measurement in found):
            self._payloads.window.widen()
        num_blocks = sum(measurement.num_blocks for measurement in found)
        return sum(measurement.num_unreadable for measurement in found) / max(num_blocks, 1)

    def _keep_residual(self, piece: Piece) -> None:
        """e ← b·e + Δ − sent: what our own encoding lost, since somebody received the rest."""
        buffers = self._buffers_of(piece)
        delta = torch.sub(self._anchor[piece.span], self.phi[piece.span], out=buffers.mean)
        self._payloads.read_delta(piece, buffers.scratch)
        self.residual[piece.span].mul_(self.config.error_decay).add_(delta).sub_(buffers.scratch)

    def _gather(self, piece: Piece, accepted: Sequence[Partner], *, learns: bool) -> tuple[Buffers, Tensor | None]:
        """The group's mean Δ in `buffers.mean`, and the pull if there is one. Alone, the mean is our exact Δ."""
        buffers, payloads = self._buffers_of(piece), self._payloads
        if payloads.has_group_mean:
            payloads.read_group_mean(piece, buffers.mean)
        elif accepted and payloads.delta.numel():
            payloads.mix_deltas(piece, buffers.mean, buffers.scratch, accepted)
        elif self.config.outer.keeps_slow:
            torch.sub(self._anchor[piece.span], self.phi[piece.span], out=buffers.mean)
        if not accepted or not payloads.slow.numel():
            return buffers, None
        payloads.sum_pulls(piece, self._near(piece.span), buffers, accepted, learns=learns)
        return buffers, buffers.pull

    def _clip(self, own: Update, accepted: Sequence[Partner]) -> float:
        """Factor that shortens the outer step to `momentum_clip` times our own ‖Δ‖; it takes a pass of its own."""
        outer, norm = self.config.outer, TileNorm()
        if outer.momentum_clip == 0.0:
            return 1.0
        for piece in self._pieces(own.round):
            buffers, pull = self._gather(piece, accepted, learns=False)
            buffers.momentum.copy_(self.momentum[piece.span])
            outer_step(buffers.step.zero_(), buffers.momentum, buffers.mean, pull, outer)
            norm.add(buffers.step)
        length, limit = norm.total(), outer.momentum_clip * self._delta_norm
        return 1.0 if length <= limit else limit / length

    def _step(self, piece: Piece, accepted: Sequence[Partner], *, scale: float, clip: float) -> None:
        """Update φ and δ of one piece: φ moves by `scale` times the step, and δ shrinks by `clip`."""
        outer, phi = self.config.outer, self.phi[piece.span]
        momentum = self.momentum[piece.span] if outer.has_momentum else self.momentum
        buffers, pull = self._gather(piece, accepted, learns=True)
        if not outer.keeps_slow:
            phi.copy_(self._anchor[piece.span])
        if scale == 1.0:
            outer_step(phi, momentum, buffers.mean, pull, outer)
            return
        outer_step(buffers.step.zero_(), momentum, buffers.mean, pull, outer)
        phi.add_(buffers.step, alpha=scale)
        momentum.mul_(clip)

    def _correct(self, piece: Piece, *, moves: bool) -> Tensor:
        """Move θ by the share 1 − a of φ − anchor, which is returned. Where φ is the anchor, θ must not even be rounded."""
        theta, anchor, phi = self.theta[piece.span], self._anchor[piece.span], self.phi[piece.span]
        shift = torch.sub(phi, anchor, out=self._buffers_of(piece).scratch)
        if moves and self.config.blend == 0.0:
            theta.sub_(anchor).add_(phi)  # exactly φ when no step was taken meanwhile
        elif moves:
            theta.add_(shift, alpha=1.0 - self.config.blend)
        return shift

    def _buffers_of(self, piece: Piece) -> Buffers:
        return Buffers(*(buffer[: piece.span.stop - piece.span.start] for buffer in self._buffers))

    def _pieces(self, round: int) -> Iterator[Piece]:
        return self._fragments.pieces(self._fragments.index(round), max_numel=self._tile)


def _kind(verdicts: Mapping[PeerId, Verdict]) -> Literal["solo", "averaged", "clipped", "refused"]:
    kinds = {verdict.kind for verdict in verdicts.values()}
    if not kinds:
        return "solo"
    if "averaged" in kinds:
        return "averaged"
    return "clipped" if "clipped" in kinds else "refused"
