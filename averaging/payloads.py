"""Our own update of one round in encoded form, and what is computed between it and the partners' encoded updates.

Everything that compares two peers reads BOTH from the bytes that travelled, ours included: then the two ends of an exchange
work with the same numbers, whatever the codec lost. All methods work on one piece of the fragment at a time, in the
caller's buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from averaging.codec import codec_named, payload_tensor
from averaging.fragments import Piece
from averaging.partners import Measurement, Partner
from averaging.replica_config import ReplicaConfig
from averaging.window import LatticeWindow
from kernels.memory import in_huge_pages

__all__ = ["Buffers", "Payloads"]


@dataclass(frozen=True, slots=True)
class Buffers:
    """Working memory for one piece: fp32 [n] each, apart from one another."""

    mean: Tensor
    pull: Tensor
    ours: Tensor
    scratch: Tensor
    step: Tensor
    momentum: Tensor


class Payloads:
    """Codecs and wire buffers of one replica.

    Args:
        num_parameters: length of the whole vectors.
        config: how the run averages.
        device: where the vectors are.
        compiled: whether codecs take the compiled route.
    """

    def __init__(self, num_parameters: int, config: ReplicaConfig, *, device: torch.device, compiled: bool) -> None:
        self._num_parameters, self._config = num_parameters, config
        self.delta_codec = codec_named(config.delta_codec, compiled=compiled)
        self.slow_codec = codec_named(config.slow_codec, compiled=compiled)
        uses_lattice = config.outer.sends_slow and config.slow_codec == "lattice"
        # Random fragments have one drift for all: what was alone is not what is exchanged next, but as wide on the average.
        num_drifts = 1 if config.fragment_choice == "random" else config.fragments
        self.window = LatticeWindow(num_parameters, num_fragments=num_drifts, device=device) if uses_lattice else None
        # For the longest fragment; the other rounds use a part of these buffers.
        self._delta_room, self._slow_room = (
            in_huge_pages(torch.zeros(num_bytes, dtype=torch.uint8, device=device))
            for num_bytes in config.max_payload_bytes(num_parameters)
        )
        self.delta, self.slow = self._delta_room, self._slow_room
        self.group_mean: Tensor | None = None
        """The mean Δ that an all-reduce brought, encoded like Δ."""
        self._round = 0

    def take_group_mean(self, data: memoryview | None) -> None:
        """The mean Δ of this round's all-reduce, or None if there was none.

        Raises:
            ProtocolError: its length is not that of Δ.
        """
        if data is None:
            self.group_mean = None
        else:
            self.group_mean = payload_tensor(data, num_bytes=self.delta.numel(), device=self.delta.device)

    def read_group_mean(self, piece: Piece, out: Tensor) -> None:
        """out ← the group's mean Δ."""
        assert self.group_mean is not None
        self.delta_codec.decode(self.group_mean, out, start=piece.start)

    def begin(self, round: int) -> None:
        """Make room for a round's fragment."""
        self._round = round
        num_delta_bytes, num_slow_bytes = self._config.payload_bytes(self._num_parameters, round)
        self.delta, self.slow = self._delta_room[:num_delta_bytes], self._slow_room[:num_slow_bytes]

    def host_bytes(self) -> tuple[memoryview, memoryview]:
        """(Δ, φ) in main memory, without a copy where they are there already."""
        return _host_bytes(self.delta), _host_bytes(self.slow)

    def encode_delta(self, piece: Piece, total: Tensor, scratch: Tensor) -> None:
        """Encode Δ with the residual added, fp32 [n]."""
        self.delta_codec.encode(total, self.delta, start=piece.start, scratch=scratch)

    def encode_slow(self, piece: Piece, slow: Tensor, buffers: Buffers, *, momentum: Tensor | None) -> None:
        """Encode φ or θ, fp32 [n].

        Args:
            buffers: `mean` holds Δ; `pull` and `scratch` are overwritten.
            momentum: δ, where it is what moved φ.
        """
        motion = None
        if self.window is not None:
            moved = (buffers.mean,) if momentum is None else (buffers.mean, momentum)
            motion = self.window.motion(piece, slow, moved, round=self._round, out=buffers.pull)
        self.slow_codec.encode(slow, self.slow, start=piece.start, scratch=buffers.scratch, motion=motion)

    def read_delta(self, piece: Piece, out: Tensor) -> None:
        """out ← our Δ with the residual, as the partners read it."""
        self.delta_codec.decode(self.delta, out, start=piece.start)

    def mix_deltas(self, piece: Piece, out: Tensor, scratch: Tensor, partners: Sequence[Partner]) -> None:
        """out ← Δi + Σ factor·(Δj − Δi), the mean progress of the group."""
        self.read_delta(piece, out)
        out.mul_(1.0 - sum(partner.delta_factor for partner in partners))
        for partner in partners:
            self.delta_codec.decode_add(
                partner.delta, out, weight=partner.delta_factor, start=piece.start, scratch=scratch
            )

    def sum_pulls(
        self, piece: Piece, near: Tensor, buffers: Buffers, partners: Sequence[Partner], *, learns: bool
    ) -> None:
        """pull ← Σ factor·(theirs − ours). Differences first: φ is a thousand times larger than they are.

        Args:
            near: what we encoded, fp32 [n].
            buffers: `pull` receives the sum; `ours` and `scratch` are overwritten.
            learns: whether the lattice's window is to follow what is found; once per exchange.
        """
        self.slow_codec.decode(self.slow, buffers.ours, start=piece.start, near=near)
        buffers.pull.zero_()
        for partner in partners:
            _, unreadable = self._subtract_ours(piece, near, partner, buffers)
            buffers.pull.add_(buffers.scratch, alpha=partner.slow_factor)
            if self.window is not None and learns:
                self.window.learn(piece, partner.slow, difference=buffers.scratch, unreadable=unreadable)

    def measure(
        self, piece: Piece, near: Tensor, buffers: Buffers, partners: Sequence[tuple[Partner, Measurement]]
    ) -> None:
        """Add a piece to the measured distances of all partners; `ours` and `scratch` are overwritten."""
        ours, theirs = buffers.ours, buffers.scratch
        if self.delta.numel() and not all(partner.delta.numel() == 0 for partner, _ in partners):
            self.read_delta(piece, ours)
            for partner, found in partners:
                self.delta_codec.decode(partner.delta, theirs, start=piece.start)
                found.delta.add(theirs.sub_(ours))
        if self.slow.numel():
            self.slow_codec.decode(self.slow, ours, start=piece.start, near=near)
            for partner, found in partners:
                found.num_unreadable += self._subtract_ours(piece, near, partner, buffers)[0]
                found.num_blocks += -(-near.numel() // self.slow_codec.block)
                found.slow.add(theirs)

    def _subtract_ours(
        self, piece: Piece, near: Tensor, partner: Partner, buffers: Buffers
    ) -> tuple[int, Tensor | None]:
        """scratch ← theirs − ours, where `ours` is decoded already; exactly zero in blocks that can not be read.

        Returns:
            How many those are, and if there are any, their elements, bool [n].
        """
        theirs, ours = buffers.scratch, buffers.ours
        num_unreadable = self.slow_codec.decode(partner.slow, theirs, start=piece.start, near=near)
        unreadable = theirs == near if num_unreadable else None
        theirs.sub_(ours)
        if unreadable is not None:
            theirs.masked_fill_(unreadable, 0.0)
        return num_unreadable, unreadable


def _host_bytes(payload: Tensor) -> memoryview:
    host: np.ndarray[tuple[int], np.dtype[np.uint8]] = payload.cpu().numpy()
    return host.data
