"""The passes of every rule and format, in C (kernels/exchange.py): the route of large models on a CPU.

An exchange of a large model is bound by memory. Eager torch (averaging/passes.py) moves every vector through a dozen buffers, and
torch.compile (averaging/fused.py) takes ten seconds of compiling and knows only what sends θ alone. Here a pass reads each vector
once and writes it once. The rules are those of passes.py; sums are rounded differently, and so may be the last bit of a value.

The one format that these passes do not read themselves is topk, with its chunks of 4096: kernels/sparse.c selects and scatters,
tile by tile, and the passes take its values as fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from averaging.fragments import Fragments, Piece
from averaging.partners import Measurement, Partner
from averaging.payloads import Payloads
from averaging.replica_config import ReplicaConfig
from averaging.vectors import Passes, Vectors
from kernels import exchange
from kernels.dispatch import tile_numel
from kernels.exchange import BLOCK, CODECS, Encoded, PieceVectors, Rule
from protocol.ids import PeerId

__all__ = ["NativePasses", "is_native"]

_PIECE_NUMEL = 1 << 22
"""Elements per call and thread: a call costs nothing beside it."""


def is_native(config: ReplicaConfig) -> bool:
    """Whether this route knows the run's way of averaging."""
    return config.outer.algorithm != "local"


class NativePasses(Passes):
    """See the module; arguments as for `TiledPasses`. With pair averaging the anchor is φ itself, or what is sent."""

    def __init__(self, vectors: Vectors, payloads: Payloads, fragments: Fragments, config: ReplicaConfig) -> None:
        outer = config.outer
        assert (vectors.anchor is vectors.phi) == (not outer.keeps_slow)
        self._sends_anchor = not outer.keeps_slow and config.slow_codec == "fp32"
        self._vectors, self._payloads, self._fragments, self._config = vectors, payloads, fragments, config
        self._translates = outer.sends_delta and config.delta_codec not in CODECS
        self._piece_numel = tile_numel(vectors.theta.device) if self._translates else _PIECE_NUMEL
        self._scratch: list[Tensor] = []
        """Values of Δ in a format that C does not know: ours, and then the partners'."""
        self._seen: dict[PeerId, tuple[Tensor, Tensor]] = {}
        """For the lattice's window: mean squares of theirs − ours and what could be read, fp32 and uint8 [B], per partner."""
        self._rule = Rule(
            algorithm=(outer.momentum or "nesterov") if outer.algorithm == "diloco" else outer.algorithm,
            alpha=outer.alpha,
            beta=outer.beta,
            gamma=outer.gamma,
            scale=1.0,
            clip=1.0,
            keep=1.0 - config.blend,
            error_decay=config.error_decay,
            slow_is_theta=outer.slow_is_theta,
            keeps_residual=False,
            own_factor=None,
        )

    def pack(self, round: int) -> float:
        if not self._config.outer.keeps_slow and not self._sends_anchor and not self._is_finite(round):
            return math.nan  # φ must stay as it was
        window = self._payloads.window
        drift = 0.0 if window is None else float(window.drift_of(round))
        squares = self._total(round, lambda piece: self._pack(round, piece, drift))
        return math.sqrt(squares)

    def measure(self, round: int, partners: Sequence[Partner]) -> list[Measurement]:
        self._seen = {}
        return [self._measure(round, partner) for partner in partners]

    def step(
        self, round: int, accepted: Sequence[Partner], *, scale: float, clip: float, keeps_residual: bool
    ) -> float:
        outer = self._config.outer
        if not outer.keeps_slow and not accepted:  # the solo step: φ is θ as it was packed, if it is not that already
            if self._sends_anchor:
                for piece in self._pieces(round):
                    self._vectors.phi[piece.span] = self._anchor_of(piece)
            return 0.0
        keeps_residual = keeps_residual and self._vectors.residual.numel() > 0
        rule = replace(self._rule, scale=scale, clip=clip, keeps_residual=keeps_residual)
        shift = math.sqrt(self._total(round, lambda piece: self._step(round, piece, accepted, rule)))
        self._learn(round, accepted)
        return shift

    def step_norm(self, round: int, accepted: Sequence[Partner]) -> float:
        rule = replace(self._rule, is_dry=True)
        return math.sqrt(self._total(round, lambda piece: self._step(round, piece, accepted, rule)))

    def _is_finite(self, round: int) -> bool:
        return math.isfinite(self._total(round, lambda piece: exchange.size(self._vectors.theta[piece.span])))

    def _pack(self, round: int, piece: Piece, drift: float) -> float:
        payloads, outer, vectors = self._payloads, self._config.outer, self._vectors_of(piece)
        distance = None if payloads.window is None else payloads.window.distance[_blocks(piece.span)]
        delta = self._delta(round, piece, payloads.delta, slot=0, is_written=True)
        squares = exchange.pack(
            vectors,
            delta=delta,
            slow=None if self._sends_anchor else self._slow(round, piece, payloads.slow),
            slow_is_theta=outer.slow_is_theta,
            moved_by_momentum=outer.has_momentum and not outer.slow_is_theta,
            error_decay=self._config.error_decay,
            distance=distance,
            drift=drift,
        )
        if self._translates:
            numel = vectors.theta.numel()
            payloads.encode_delta(piece, self._scratch_of(0, numel), self._scratch_of(1, numel))
        return squares

    def _measure(self, round: int, partner: Partner) -> Measurement:
        payloads, outer, found = self._payloads, self._config.outer, Measurement()
        num_blocks = -(-self._numel(round) // BLOCK)
        squares, readable = torch.zeros(num_blocks), torch.ones(num_blocks, dtype=torch.uint8)

        def of_delta(piece: Piece) -> float:
            ours, theirs = (
                self._delta(round, piece, payload, slot=slot)
                for slot, payload in enumerate((payloads.delta, partner.delta))
            )
            assert ours is not None
            assert theirs is not None
            return exchange.measure(ours, theirs, numel=_numel_of(piece))[0]

        def of_slow(piece: Piece) -> float:
            ours, theirs = (self._slow(round, piece, payload) for payload in (payloads.slow, partner.slow))
            assert ours is not None
            assert theirs is not None
            begin = piece.start // BLOCK
            blocks = slice(begin, begin - (-_numel_of(piece) // BLOCK))
            return exchange.measure(
                ours,
                theirs,
                numel=_numel_of(piece),
                near=self._anchor_of(piece) if outer.slow_is_theta else self._vectors.phi[piece.span],
                squares=squares[blocks],
                readable=readable[blocks],
            )[0]

        if partner.delta.numel() and payloads.delta.numel():
            found.delta.add_squares(torch.tensor([self._total(round, of_delta)], dtype=torch.float64))
        if payloads.slow.numel():
            found.slow.add_squares(torch.tensor([self._total(round, of_slow)], dtype=torch.float64))
            found.num_unreadable, found.num_blocks = int((readable == 0).sum()), num_blocks
        squares.div_(BLOCK)
        if tail := self._numel(round) % BLOCK:
            squares[-1] *= BLOCK / tail
        self._seen[partner.peer] = squares, readable
        return found

    def _step(self, round: int, piece: Piece, accepted: Sequence[Partner], rule: Rule) -> float:
        payloads = self._payloads
        deltas: list[Encoded | None] = []
        slows = [self._slow(round, piece, partner.slow, partner.slow_factor) for partner in accepted]
        if payloads.group_mean is not None:  # instead of the partners' own
            mean = self._delta(round, piece, payloads.group_mean, slot=1, factor=1.0)
            deltas, slows = [*([None] * len(accepted)), mean], [*slows, None]
            rule = replace(rule, own_factor=0.0)
        elif accepted and payloads.delta.numel():
            deltas = [
                self._delta(round, piece, partner.delta, slot=slot, factor=partner.delta_factor)
                for slot, partner in enumerate(accepted, start=1)
            ]
            own_factor = 1.0 - sum(partner.delta_factor for partner in accepted)
            rule = replace(rule, own_factor=max(own_factor, 0.0))  # rounding may take it below
        else:
            deltas = [None] * len(accepted)
        own_is_read = rule.own_factor is not None or rule.keeps_residual
        return exchange.step(
            self._vectors_of(piece),
            rule,
            own_delta=self._delta(round, piece, payloads.delta, slot=0) if own_is_read else None,
            own_slow=self._slow(round, piece, payloads.slow),
            deltas=deltas,
            slows=slows,
        )

    def _learn(self, round: int, accepted: Sequence[Partner]) -> None:
        """Let the lattice's window follow what was found."""
        window = self._payloads.window
        if window is None:
            return
        for partner in accepted:
            squares, readable = self._seen[partner.peer]
            for piece in self._pieces(round):
                blocks = slice(piece.start // BLOCK, -(-(piece.start + _numel_of(piece)) // BLOCK))
                window.follow(piece, partner.slow, rms=squares[blocks].sqrt(), unreadable=readable[blocks] == 0)

    def _slow(self, round: int, piece: Piece, payload: Tensor, factor: float = 0.0) -> Encoded | None:
        if payload.numel() == 0:
            return None
        return Encoded(self._config.slow_codec, payload, self._numel(round), piece.start, factor)

    def _delta(
        self, round: int, piece: Piece, payload: Tensor, *, slot: int, factor: float = 0.0, is_written: bool = False
    ) -> Encoded | None:
        """A payload of Δ as C can read or write it, in the scratch of this slot where it does not know the format."""
        if payload.numel() == 0:
            return None
        if not self._translates:
            return Encoded(self._config.delta_codec, payload, self._numel(round), piece.start, factor)
        values = self._scratch_of(slot, _numel_of(piece))
        if not is_written:
            self._payloads.delta_codec.decode(payload, values, start=piece.start)
        return Encoded("fp32", values.view(torch.uint8), values.numel(), 0, factor)

    def _scratch_of(self, slot: int, numel: int) -> Tensor:
        while len(self._scratch) <= slot:
            self._scratch.append(torch.empty(min(self._piece_numel, self._vectors.theta.numel())))
        return self._scratch[slot][:numel]

    def _vectors_of(self, piece: Piece) -> PieceVectors:
        vectors = self._vectors
        return PieceVectors(
            theta=vectors.theta[piece.span],
            phi=vectors.phi[piece.span],
            momentum=vectors.momentum[piece.span],
            residual=vectors.residual[piece.span],
            anchor=self._anchor_of(piece),
        )

    def _anchor_of(self, piece: Piece) -> Tensor:
        """θ as it was packed. Pair averaging that sends it in fp32 keeps it in the payload alone: a pass less, and φ can wait."""
        if self._sends_anchor:
            return self._payloads.slow.view(torch.float32)[piece.start : piece.start + _numel_of(piece)]
        return self._vectors.anchor[piece.span]

    def _numel(self, round: int) -> int:
        return self._fragments.numel(self._fragments.index(round))

    def _pieces(self, round: int) -> Iterator[Piece]:
        return self._fragments.pieces(self._fragments.index(round), max_numel=self._piece_numel)

    def _total(self, round: int, work: Callable[[Piece], float]) -> float:
        """The sum of what `work` gives for all pieces, which torch's number of threads share: C runs without Python's lock."""
        pieces = list(self._pieces(round))
        num_threads = 1 if self._translates else min(torch.get_num_threads(), len(pieces))
        if num_threads == 1:
            return sum(map(work, pieces))
        with ThreadPoolExecutor(num_threads) as threads:
            return sum(threads.map(work, pieces))


def _numel_of(piece: Piece) -> int:
    numel: int = piece.span.stop - piece.span.start
    return numel


def _blocks(span: slice) -> slice:
    """The blocks of the lattice that a span of the whole vector covers."""
    return slice(span.start // BLOCK, -(-span.stop // BLOCK))
