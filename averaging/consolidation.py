"""The end of a run: plain averaging without training, until the peers hold one model.

Gossip leaves every replica a little different. After the last round each peer goes on meeting random partners and takes the mean
of both weights, in fp32. The squared spread halves about once per round, so 15 rounds bring a spread of a tenth below half a
thousandth; ⌈6·log2 N⌉ + 12 are allowed, since peers come late and meetings fail. A peer has agreed when its last meetings, with
several different partners, found the weights of both sides nearer than half the tolerance before they were averaged: two peers that
agree with a third are then within it themselves. How many partners grows with the swarm, up to half of it: with two, seven peers
fell into cliques of three and four, each of one mind, and a hundredth apart. And a peer that nobody came to see held on to the
word of three who had moved since. So whoever agrees tells a sketch of its model, and all compare it with theirs.

Liars: without progress of our own, admission's bound would be zero, and the usual one, met at every meeting, would let a liar lead
us anywhere. So the bound starts at the usual distance between replicas and shrinks by SHRINKAGE per meeting: more slowly than the
distances between honest peers, and the sum of all steps stays below a few usual distances, whatever is sent. A peer that has met
nobody in the whole run takes its first partner's distance for usual. Measured with one liar among 4 or two among 8, in usual
distances that the honest peers' mean moves: 0.2 and 0.3; with a bound that starts at three usual distances 0.5 and 0.9.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from averaging.admission import Verdict
from averaging.outer import OuterConfig
from averaging.replica import Replica, ReplicaConfig
from averaging.update import RemoteUpdate, Update
from protocol.ids import PeerId

__all__ = [
    "SKETCH_BYTES",
    "Agreement",
    "Consolidation",
    "agreeing_partners",
    "num_rounds",
    "sketch",
    "sketched_distance",
]

FIRST_BOUND = 1.0
"""Admission's bound at the first meeting, in usual distances."""
MARGIN = 0.5
"""Share of the tolerance within which partners must be."""
SHRINKAGE = 0.8
"""Factor on the bound per meeting; honest distances shrink by about 0.71."""
SKETCH_LEEWAY = 2.0
"""Two sketches of models just within the tolerance are so many tolerances apart once in 10,000 times, and of models seven
tolerances apart as little once in 5,000."""
SKETCH_BYTES = 32
_SKETCH_NUMBERS, _SKETCH_CHUNK = 8, 1 << 20
_LEAST_NORM = 1e-30  # weights that are all zero have no relative distance


def agreeing_partners(num_others: int) -> int:
    """Different partners in a row that must be within the tolerance, with so many others about.

    More than half of the swarm, ourselves included, while that is little: then no two cliques can both agree. In larger swarms
    ⌈log2 N⌉ + 1, since random partners rarely all come from one clique.
    """
    num_peers = num_others + 1
    return min(max(num_others, 1), max(2, min(num_peers // 2, math.ceil(math.log2(num_peers)) + 1)))


def num_rounds(num_peers: int) -> int:
    """Rounds after which `num_peers` peers stop, agreed or not. With an odd number each sits out one of `num_peers`."""
    num_peers = max(num_peers, 2)
    rounds = 6 * math.log2(num_peers) + 12
    return math.ceil(rounds * num_peers / (num_peers - 1) if num_peers % 2 else rounds)


def sketch(model: Tensor) -> bytes:
    """Eight sums of the weights with random signs, each weight in one of them (count sketch; Charikar et al. 2002).

    Args:
        model: fp32 [P].

    Returns:
        Eight fp32 numbers, little-endian.
    """
    sums = torch.zeros(_SKETCH_NUMBERS, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for chunk in torch.split(model.detach().cpu(), _SKETCH_CHUNK):
        signs = torch.randint(2, chunk.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
        signed = pad(chunk * signs, (0, -chunk.numel() % _SKETCH_NUMBERS))
        sums += signed.view(-1, _SKETCH_NUMBERS).sum(dim=0, dtype=torch.float64)
    return bytes(sums.numpy().astype("<f4").tobytes())


def sketched_distance(one: bytes, other: bytes) -> float:
    """About ‖θi − θj‖ of two models, by their sketches: the mean of the square is exact, its deviation half of it. NaN if a sketch
    is none."""
    first, second = (np.frombuffer(each, dtype="<f4").astype(np.float64) for each in (one, other))
    return float(np.linalg.norm(first - second))


class Agreement:
    """Whether the last partners held the same model.

    Args:
        tolerance: ‖θi − θj‖/‖θi‖ below which two models are the same.
    """

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self.partners: set[PeerId] = set()
        """Those of the last meetings that were within the tolerance, without one in between that was not."""
        self.distance: float | None = None
        """‖θi − θj‖/‖θi‖ at the last meeting, before it; None before the first."""

    def met(self, partner: PeerId, distance: float) -> None:
        """A meeting found this distance."""
        self.distance = distance
        if distance < MARGIN * self._tolerance:
            self.partners.add(partner)
        else:
            self.partners.clear()

    def is_reached(self, num_others: int) -> bool:
        """Whether enough different partners in a row agreed.

        Args:
            num_others: in the swarm, those included who have left since: the rest of a swarm is no majority of it.
        """
        return len(self.partners) >= agreeing_partners(num_others)


class Consolidation:
    """One peer's side of it. Not thread-safe, like the replica.

    Args:
        replica: the trained one. Its φ is averaged in place and is a whole model at any moment between two calls. With fragments,
            what θ has learnt since a fragment's last round is not in φ and is given up.
        tolerance: see `Agreement`.
    """

    def __init__(self, replica: Replica, *, tolerance: float) -> None:
        self.agreement = Agreement(tolerance)
        self._trained, self._tolerance = replica, tolerance
        if not replica.config.outer.keeps_slow:
            # Pair averaging has no slow weights; φ may be as old as its fragment's last round.
            replica.phi.copy_(replica.theta)
        self._averaging = Replica(
            replica.phi,
            ReplicaConfig(
                outer=OuterConfig(algorithm="pair-average"),
                admission=replica.config.admission,
                slow_codec="fp32",
                compiled=replica.config.compiled,
                lag_decay=1.0,  # nobody trains: what a partner some rounds behind holds is not out of date
            ),
        )
        # The partners are known already, but distances begin anew.
        history = replica.admission.state_dict() | {"delta": [], "slow": [], "own": [], "far": {}}
        self._averaging.admission.load_state_dict(history)
        self._bound = FIRST_BOUND * replica.admission.usual_distance or math.inf
        self._norm = 0.0
        self._sketch: bytes | None = None

    @property
    def num_payload_bytes(self) -> int:
        """Bytes sent per partner."""
        return self._averaging.num_payload_bytes

    def pack(self, round: int) -> Update:
        """Our weights for one meeting, in buffers that are valid until the next `pack`."""
        self._norm = float(torch.linalg.vector_norm(self._trained.phi))
        self._averaging.admission.least_progress = max(self._bound, self._tolerance * self._norm)
        return self._averaging.pack(round=round, tokens=0)

    def apply(self, partner: RemoteUpdate) -> tuple[Verdict, float]:
        """Take the mean of the packed weights and the partner's, as far as admission lets it.

        Returns:
            What admission said, and ‖θi − θj‖/‖θi‖ before; infinite if it cannot be told.
        """
        self._sketch = None
        verdict = self._averaging.apply([partner]).verdicts[partner.peer]
        slow = math.inf if verdict.distances is None else verdict.distances.slow
        distance = slow / max(self._norm, _LEAST_NORM) if math.isfinite(slow) else math.inf
        if verdict.kind != "refused":
            self.agreement.met(partner.peer, distance)
            self._bound = SHRINKAGE * (self._bound if math.isfinite(self._bound) else FIRST_BOUND * slow)
        return verdict, distance

    def sketch(self) -> bytes:
        """Of our present weights."""
        if self._sketch is None:
            self._sketch = sketch(self._trained.phi)
        return self._sketch

    def is_near(self, own: bytes, other: bytes) -> bool:
        """Whether another peer's model is ours within the tolerance, as far as the sketches of both tell."""
        return sketched_distance(own, other) <= SKETCH_LEEWAY * self._tolerance * self._norm

    def finish(self) -> None:
        """Let the fast weights be the consolidated ones too; momentum and residual belong to none of them and are dropped."""
        self._trained.replace_slow(self._trained.phi)
