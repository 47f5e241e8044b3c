"""A part owner's arithmetic: the robust token-weighted mean of its part, encoded once.

    n_j = ‖Δ_j's part‖      τ = clip_factor · max(median of all n_j, our own n)      s_j = min(1, τ / n_j)
    mean = Σ w_j·s_j·Δ_j    w_j = tokens_j / Σ tokens, a claim counting at most max_token_ratio times the median claim

So one member moves the mean by at most w_j·τ. The median of few is the lower one, and our own norm is the floor: neither a huge nor
a tiny liar decides alone. Where half of the members have made far less progress than we, the mean is shortened to what they accept
(averaging/allreduce_transfer.py). A member whose values are not finite is left out. What encoding the mean loses is carried over
into the next round's mean of the same elements (error feedback on the owner's side, as in arXiv 1905.05957); with members'
own feedback for their Δ, nothing is lost in the long run but what clipping and shortening take.

Everything runs tile by tile; the only vector is the carried error, which a codec without loss does not need.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from averaging.allreduce_messages import Share
from averaging.codec import Codec, payload_tensor
from averaging.partners import TileNorm
from kernels.dispatch import tile_numel

__all__ = ["Contribution", "ErrorCarry", "GroupLimits", "PartMean", "average_part", "payload_norm"]

_CPU = torch.device("cpu")
_SHORTER = 0.9
"""Of the largest norm, when a mean has to be shortened: encoding it may make it longer again."""


@dataclass(frozen=True, kw_only=True)
class GroupLimits:
    """Bounds on what a member can do; a run's clip_factor is that of its manifest's [safety].

    Args:
        clip_factor: a member's part counts up to this many median norms.
        max_token_ratio: a member's claim of tokens counts up to this many median claims.
        mean_factor: a part's mean is refused beyond this many medians of the members' claimed ‖Δ‖.
    """

    clip_factor: float = 3.0
    max_token_ratio: float = 4.0
    mean_factor: float = 3.0

    def capped_tokens(self, claims: Sequence[int]) -> list[float]:
        """Every claim, cut down to what it may count."""
        cap = self.max_token_ratio * max(statistics.median_low(claims), 1)
        return [min(claim, cap) for claim in claims]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """One member's Δ of the owner's part.

    Args:
        payload: encoded as a vector of the part's length.
        tokens: capped tokens behind it.
        is_own: whether it is the owner's.
    """

    payload: bytes | bytearray
    tokens: float
    is_own: bool = False


@dataclass(frozen=True, slots=True)
class ErrorCarry:
    """What encoding lost of the owner's last mean: fp32 values of the elements from `start` on."""

    start: int
    values: Tensor

    def within(self, part: slice) -> Tensor:
        """fp32 [part]: the carried values there, 0 where the last part did not reach."""
        out = torch.zeros(part.stop - part.start)
        first, last = max(part.start, self.start), min(part.stop, self.start + self.values.numel())
        if first < last:
            out[first - part.start : last - part.start] = self.values[first - self.start : last - self.start]
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class PartMean:
    """The owner's result.

    Args:
        payload: the encoded mean of the part.
        shares: what became of every contribution, see `Share`.
        error: what encoding lost, fp32 [part]; empty for a codec without loss.
    """

    payload: bytearray
    shares: list[int]
    error: Tensor


def payload_norm(payload: bytes | bytearray | memoryview, numel: int, codec: Codec) -> float:
    """L2 norm of an encoded vector of `numel` elements; not finite if any value is not."""
    data = payload_tensor(payload, num_bytes=codec.num_bytes(numel), device=_CPU)
    norm = TileNorm()
    for tile, buffer in _tiles(numel):
        codec.decode(data, buffer, start=tile.start)
        norm.add(buffer)
    return norm.total()


def average_part(
    contributions: Sequence[Contribution],
    *,
    numel: int,
    codec: Codec,
    limits: GroupLimits,
    carried: Tensor | None,
    largest_norm: float = math.inf,
) -> PartMean:
    """The mean of one part.

    Args:
        contributions: of all members present, exactly one of them the owner's, which is finite.
        numel: elements of the part.
        codec: of the contributions and of the mean.
        limits: see there.
        carried: the owner's carried error, fp32 [numel]; None without error feedback.
        largest_norm: the others refuse a longer mean, so a longer one is shortened.

    Returns:
        The encoded mean, and what was done with each contribution.
    """
    factors, shares = _weigh(contributions, numel, codec, limits)
    inputs = [payload_tensor(c.payload, num_bytes=codec.num_bytes(numel), device=_CPU) for c in contributions]
    mean, error = _encoded_mean(inputs, factors, numel=numel, codec=codec, carried=carried)
    norm = payload_norm(mean, numel, codec) if largest_norm < math.inf else 0.0
    if norm > largest_norm > 0.0:
        scale = _SHORTER * largest_norm / norm
        factors, carried = [factor * scale for factor in factors], None if carried is None else carried * scale
        mean, error = _encoded_mean(inputs, factors, numel=numel, codec=codec, carried=carried)
    return PartMean(payload=mean, shares=shares, error=error)


def _encoded_mean(
    inputs: Sequence[Tensor], factors: Sequence[float], *, numel: int, codec: Codec, carried: Tensor | None
) -> tuple[bytearray, Tensor]:
    """The encoded sum of factor × input and of what was carried, and what encoding it lost."""
    encoded = bytearray(codec.num_bytes(numel))
    output = payload_tensor(encoded, num_bytes=len(encoded), device=_CPU)
    error = torch.zeros(numel if codec.lossy and carried is not None else 0)
    scratch = torch.empty(min(numel, tile_numel(_CPU)))
    for tile, mean in _tiles(numel):
        mean.zero_()
        for data, factor in zip(inputs, factors, strict=True):
            if factor:  # 0 × NaN is NaN
                codec.decode_add(data, mean, weight=factor, start=tile.start, scratch=scratch)
        if carried is not None:
            mean.add_(carried[tile])
        codec.encode(mean, output, start=tile.start, scratch=scratch)
        if error.numel():
            codec.decode(output, scratch[: mean.numel()], start=tile.start)
            torch.sub(mean, scratch[: mean.numel()], out=error[tile])
    return encoded, error


def _weigh(
    contributions: Sequence[Contribution], numel: int, codec: Codec, limits: GroupLimits
) -> tuple[list[float], list[int]]:
    """One factor per contribution, and what became of it."""
    norms = [payload_norm(c.payload, numel, codec) for c in contributions]
    own = next(norm for norm, c in zip(norms, contributions, strict=True) if c.is_own)
    finite = [math.isfinite(norm) for norm in norms]
    tau = limits.clip_factor * max(own, statistics.median_low(n for n, ok in zip(norms, finite, strict=True) if ok))
    tokens = [c.tokens if ok else 0.0 for c, ok in zip(contributions, finite, strict=True)]
    if not sum(tokens):
        tokens = [float(ok) for ok in finite]
    factors, shares = [], []
    for norm, ok, weight in zip(norms, finite, tokens, strict=True):
        scale = min(1.0, tau / norm) if ok and norm > 0.0 else float(ok)
        factors.append(weight / sum(tokens) * scale)
        shares.append(Share.COUNTED if scale == 1.0 else Share.CLIPPED if ok else Share.NOT_FINITE)
    return factors, shares


def _tiles(numel: int) -> Iterator[tuple[slice, Tensor]]:
    """The tiles of a vector, each with the same fp32 buffer of the tile's length."""
    size = min(numel, tile_numel(_CPU))
    buffer = torch.empty(size)
    for start in range(0, numel, size or 1):
        stop = min(start + size, numel)
        yield slice(start, stop), buffer[: stop - start]
