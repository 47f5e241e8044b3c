"""A swarm of replicas on a noisy quadratic, without a network, for the tests of admission: honest peers, liars, partitions.

A round of an honest peer moves θ a quarter of the way to the optimum 0, and by as much noise of its own; then peers meet in
random pairs. A liar sends whatever its attack says, knowing what the honest ones have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from averaging.admission import AdmissionConfig
from averaging.replica import Replica, ReplicaConfig
from averaging.update import RemoteUpdate
from protocol.ids import PeerId

__all__ = ["ATTACKS", "Attack", "Gossip"]

NUMEL = 512
RATE = 0.25
NOISE = 0.01
TOKENS = 100

Attack = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(φ and Δ of the honest partner, noise) → (φ, Δ) to send to it."""

ATTACKS: dict[str, Attack] = {
    "huge": lambda phi, delta, noise: (phi + 1e4 * noise, 1e4 * noise),
    "opposite": lambda phi, delta, noise: (phi, -10.0 * delta),
    "inconsistent": lambda phi, delta, noise: (phi + 2.5 * delta.norm() * noise / noise.norm(), -delta),
    "pull away": lambda phi, delta, noise: (phi + 8.0 * delta.norm() * phi / phi.norm(), delta),
}


class Gossip:
    """Honest replicas by number, then liars.

    Args:
        num_honest: honest peers; they begin with one φ.
        num_liars: the others.
        attack: what liars send.
        is_open: whether everybody is trusted instead of going through admission.
        rate: how far a round moves θ.
    """

    def __init__(
        self,
        num_honest: int,
        *,
        num_liars: int = 0,
        attack: Attack = ATTACKS["huge"],
        is_open: bool = False,
        rate: float = RATE,
        seed: int = 0,
    ) -> None:
        self._random = torch.Generator().manual_seed(seed)
        start = self._noise() / NOISE
        config = ReplicaConfig(admission=None if is_open else AdmissionConfig(), delta_codec="fp32", slow_codec="fp32")
        self.replicas = [Replica(start.clone(), config) for _ in range(num_honest + num_liars)]
        self.num_honest, self._attack, self._rate = num_honest, attack, rate
        self.kinds: list[Counter[str]] = []
        """Per round, how many meetings of honest peers with honest ones ended how."""
        self.kinds_of_liars: Counter[str] = Counter()

    @property
    def loss(self) -> float:
        """Mean distance of the honest peers from the optimum."""
        return float(torch.stack([replica.phi.norm() for replica in self.replicas[: self.num_honest]]).mean())

    @property
    def spread(self) -> float:
        """Root mean square distance of the honest peers from their mean."""
        stack = torch.stack([replica.phi for replica in self.replicas[: self.num_honest]])
        return float((stack - stack.mean(0)).norm(dim=1).square().mean().sqrt())

    def round(self, groups: Sequence[Sequence[int]] | None = None) -> None:
        """Everybody trains, then pairs within each group (default: all) meet; who is left over steps alone."""
        for replica in self.replicas:
            replica.theta.add_(replica.theta * -self._rate + self._noise())
        self.kinds.append(Counter())
        for group in groups or [range(len(self.replicas))]:
            order = [group[place] for place in torch.randperm(len(group), generator=self._random).tolist()]
            for first, second in zip(order[0::2], order[1::2], strict=False):
                self._meet(first, second)
            if len(order) % 2:
                self.replicas[order[-1]].pack(round=0, tokens=TOKENS)
                self.replicas[order[-1]].apply([])

    def _noise(self) -> Tensor:
        return NOISE * torch.randn(NUMEL, generator=self._random)

    def _meet(self, first: int, second: int) -> None:
        updates = {number: self._send(number, to=other) for number, other in ((first, second), (second, first))}
        for number, other in ((first, second), (second, first)):
            outcome = self.replicas[number].apply([updates[other]])
            if number < self.num_honest:
                kinds = self.kinds[-1] if other < self.num_honest else self.kinds_of_liars
                kinds[outcome.kind] += 1

    def _send(self, number: int, *, to: int) -> RemoteUpdate:
        replica = self.replicas[number]
        if number >= self.num_honest:
            victim = self.replicas[to]
            phi, delta = self._attack(victim.phi, victim.theta - victim.phi, self._noise())
            replica.phi.copy_(phi)
            replica.theta.copy_(phi + delta)
        update = replica.pack(round=0, tokens=TOKENS)
        return RemoteUpdate(
            peer=PeerId(f"peer{number}"),
            round=0,
            tokens=TOKENS,
            delta=memoryview(bytearray(update.delta)),
            slow=memoryview(bytearray(update.slow)),
        )
