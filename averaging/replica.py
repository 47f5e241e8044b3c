"""One peer's side of averaging: φ, δ, the error-feedback residual, and the step that joins partners' progress with ours.

    pack   (round t ends)           anchor ← θ;  Δ = θ − φ;  bytes ← encode(Δ + residual), encode(φ or θ)
           … the bytes travel while θ takes the inner steps of round t+1 …
    apply  (at a step boundary)     outer step on φ, δ with the accepted partners, or alone;  θ ← (θ − anchor) + φ

θ − anchor is the progress made meanwhile and is kept. Without overlap it is exactly zero and θ becomes φ. With fragments
(averaging/fragments.py) both do all this to one fragment and leave the others alone; with a blend a, θ takes only the share 1 − a
of the correction φ − anchor.

Three rules keep a swarm from drifting apart. (1) Where a partner's decoded value enters, ours enters as decoded from the bytes
WE sent (averaging/passes.py). (2) What the Δ codec lost goes into the residual, and only when a partner has received the bytes.
(3) Without an accepted partner the step is the solo step, bit for bit.

The vectors are θ, φ, δ, residual and anchor; averaging/passes.py works on them, or, for large models,
averaging/native_passes.py on a CPU and averaging/fused.py elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from averaging.admission import Admission, Verdict
from averaging.codec import codec_named
from averaging.fused import FusedPasses, is_fusible
from averaging.native_passes import NativePasses, is_native
from averaging.partners import Measurement, Partner, read_partners, weigh_partners
from averaging.passes import TiledPasses
from averaging.payloads import Payloads
from averaging.replica_config import ReplicaConfig
from averaging.update import RemoteUpdate, Update
from averaging.vectors import Passes, Vectors
from kernels.dispatch import use_compiled
from kernels.exchange import use_native
from kernels.memory import in_huge_pages
from protocol.ids import PeerId

__all__ = ["Outcome", "Replica", "ReplicaConfig"]

_AHEAD_NUMEL = 1 << 22


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
        native = is_native(config) and use_native(numel, wanted=config.compiled, device=device)
        compiled = not native and use_compiled(numel, wanted=config.compiled)
        self.config = config
        self.admission = Admission(config.admission)
        self.theta = theta
        self.phi = in_huge_pages(torch.empty_like(theta)).copy_(theta)
        self._payloads = Payloads(numel, config, device=device, compiled=compiled or native)
        self.momentum = in_huge_pages(torch.zeros(numel if outer.has_momentum else 0, device=device))
        carries_error = outer.sends_delta and self._payloads.delta_codec.lossy
        self.residual = in_huge_pages(torch.zeros(numel if carries_error else 0, device=device))
        fused = compiled and is_fusible(config)
        is_anchored = outer.keeps_slow or not (native or fused)
        vectors = Vectors(
            theta=theta,
            phi=self.phi,
            momentum=self.momentum,
            residual=self.residual,
            anchor=in_huge_pages(torch.empty_like(theta)) if is_anchored else self.phi,
        )
        self._fragments = config.division(numel)
        route = NativePasses if native else FusedPasses if fused else TiledPasses
        self._passes: Passes = route(vectors, self._payloads, self._fragments, config)
        self._packed: Update | None = None
        self._delta_norm = 0.0

    @property
    def num_payload_bytes(self) -> int:
        """Bytes sent per partner in the round of the longest fragment; without fragments, in every round."""
        return sum(self.config.max_payload_bytes(self.theta.numel()))

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
            FloatingPointError: θ is not finite; φ, δ and the residual are as before, and the caller should go back to a checkpoint.
        """
        self._payloads.begin(round)
        self._delta_norm = self._passes.pack(round)
        if not math.isfinite(self._delta_norm):
            self._packed = None
            raise FloatingPointError("the weights are not finite after this round; go back to a checkpoint")
        delta_bytes, slow_bytes = self._payloads.host_bytes()
        self._packed = Update(round=round, tokens=tokens, delta=delta_bytes, slow=slow_bytes)
        return self._packed

    def slow_ahead(self, round: int) -> bytes:
        """φ as the next `pack` will encode it for this round, if nothing changes it before: the inner steps do not.

        Only where φ itself travels, in a format that needs nothing but its values (any but the lattice).
        """
        num_bytes = self.config.payload_bytes(self.theta.numel(), round)[1]
        payload = torch.zeros(num_bytes, dtype=torch.uint8, device=self.theta.device)
        # Not the compiled one: ten seconds of compiling would hold up the inner steps, for bytes that are the same.
        codec, fragment = codec_named(self.config.slow_codec), self._fragments.index(round)
        for piece in self._fragments.pieces(fragment, max_numel=_AHEAD_NUMEL):
            codec.encode(self.phi[piece.span], payload, start=piece.start)
        return payload.cpu().numpy().tobytes()

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
            fragments=self._fragments,
            device=self.theta.device,
        )
        readable.sort(key=lambda partner: partner.peer)
        found = self._passes.measure(own.round, readable)
        verdicts |= {
            partner.peer: measured.judge(partner.peer, own=self._delta_norm, admission=self.admission)
            for partner, measured in zip(readable, found, strict=True)
        }
        accepted = weigh_partners(readable, verdicts, own_tokens=own.tokens, config=self.config)
        self._payloads.take_group_mean(group_mean)
        clip = self._clip(own, accepted)
        scale = clip * (self.config.outer.staleness_penalty if steps_since_pack > 0 else 1.0)
        received = bool(partners) or group_mean is not None
        shift = self._passes.step(own.round, accepted, scale=scale, clip=clip, keeps_residual=received)
        return Outcome(
            kind=_kind(verdicts) if verdicts or group_mean is None else "averaged",
            verdicts=verdicts,
            delta_norm=self._delta_norm,
            shift_norm=(1.0 - self.config.blend) * shift,
            step_scale=scale,
            unreadable_share=self._unreadable_share(found, own.round, alone=not accepted),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """φ, δ, residual and the lattice's window, not copied. θ is the model's own; the history is `admission.state_dict()`."""
        state = {"phi": self.phi, "momentum": self.momentum, "residual": self.residual}
        if self._payloads.window is not None:
            state |= {"window": self._payloads.window.distance, "window_drift": self._payloads.window.drift}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy what `state_dict` returned; an exchange under way is forgotten, its progress stays in θ.

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
        """Start anew from the swarm's φ (fp32 [P]): θ = φ, no momentum, no residual, nothing known of distances, no exchange."""
        self.phi.copy_(phi)
        self.theta.copy_(phi)
        self.momentum.zero_()
        self.residual.zero_()
        if self._payloads.window is not None:
            self._payloads.window.reset()
        self._packed = None

    def _unreadable_share(self, found: Collection[Measurement], round: int, *, alone: bool) -> float:
        """The share of blocks that could not be read; the lattice's window learns of it."""
        if self._payloads.window is not None:
            self._payloads.window.after_round(round, alone=alone)
            if any(measurement.is_too_far for measurement in found):
                self._payloads.window.widen()
        num_blocks = sum(measurement.num_blocks for measurement in found)
        return sum(measurement.num_unreadable for measurement in found) / max(num_blocks, 1)

    def _clip(self, own: Update, accepted: Sequence[Partner]) -> float:
        """Factor that shortens the outer step to `momentum_clip` times our own ‖Δ‖; it takes a pass of its own."""
        if self.config.outer.momentum_clip == 0.0:
            return 1.0
        length, limit = self._passes.step_norm(own.round, accepted), self.config.outer.momentum_clip * self._delta_norm
        return 1.0 if length <= limit else limit / length


def _kind(verdicts: Mapping[PeerId, Verdict]) -> Literal["solo", "averaged", "clipped", "refused"]:
    kinds = {verdict.kind for verdict in verdicts.values()}
    if not kinds:
        return "solo"
    if "averaged" in kinds:
        return "averaged"
    return "clipped" if "clipped" in kinds else "refused"
