"""Who holds which stage, and which way to send a microbatch while there is no plan.

The greedy rule is that of swarm parallelism (Ryabinin et al., arXiv 2301.11913): at every stage the replica that is expected to
be free first. What a peer expects of the others is what they say of themselves (their speed, in the signed record) and what it
has itself sent them in this iteration. Orders of stages, and ties, go by a lot that differs from iteration to iteration, so
that over time every replica meets all origins and all patterns of skipping.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from node.pipeline.rules import is_order
from protocol.ids import PeerId

__all__ = ["Replica", "StageMap"]

MAX_SPEEDUP = 16.0
"""A peer counts as at most so many times as fast as the median."""
_TRIES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """What is known of one stage peer.

    Args:
        stage: which stage it holds.
        forward_s: its forward pass of one microbatch; 0 if nobody has measured it yet.
        is_new: others may not know yet that it holds that stage, and would refuse a path through it.
    """

    stage: int
    forward_s: float = 0.0
    is_new: bool = False


class StageMap:
    """The live stage peers, as this peer sees them; a `node.pipeline.handover.Router`.

    Args:
        num_stages: of the run.
        path_length: stages that a microbatch visits.
    """

    def __init__(self, *, num_stages: int, path_length: int) -> None:
        self.num_stages, self.path_length = num_stages, path_length
        self._peers: Mapping[PeerId, Replica] = {}
        self._given: Counter[PeerId] = Counter()

    def update(self, peers: Mapping[PeerId, Replica]) -> None:
        """Take over what the directory shows now, ourselves included."""
        known = sorted(each.forward_s for each in peers.values() if each.forward_s > 0.0)
        usual = known[len(known) // 2] if known else 0.0
        # Nobody is believed to be absurdly fast, or everything would go there.
        self._peers = {
            peer: replace(each, forward_s=max(each.forward_s, usual / MAX_SPEEDUP) if each.forward_s else 0.0)
            for peer, each in peers.items()
            if 0 <= each.stage < self.num_stages
        }

    @property
    def has_paths(self) -> bool:
        """Whether enough stages are held for a path of full length."""
        return len({known.stage for known in self._peers.values()} | {0}) >= self.path_length

    def begin_iteration(self) -> None:
        """What was sent to others before does not keep them busy any more."""
        self._given.clear()

    def stage_of(self, peer: PeerId) -> int | None:
        """The stage that a peer holds; None for a stranger."""
        known = self._peers.get(peer)
        return None if known is None else known.stage

    def holders(self, stage: int) -> list[PeerId]:
        """The live peers of a stage, in a fixed order."""
        return sorted(peer for peer, known in self._peers.items() if known.stage == stage)

    @property
    def everybody(self) -> list[PeerId]:
        """All live stage peers."""
        return sorted(self._peers)

    def replicas(self, peer: PeerId) -> list[PeerId]:
        """The other peers of that peer's stage, those expected to be free first in front."""
        stage = self.stage_of(peer)
        others = [] if stage is None else [other for other in self.holders(stage) if other != peer]
        return sorted(others, key=self._expected_s)

    def path(self, origin: PeerId, *, lot: str) -> list[PeerId]:
        """A path for one microbatch, and remember that it was given to those on it.

        Stages that nobody holds are left out, so that a path may be shorter than `path_length`.

        Args:
            origin: a peer of stage 0.
            lot: names the microbatch; another lot, another choice among equals.
        """
        rng = random.Random(lot)
        held = [stage for stage in range(self.num_stages) if stage == 0 or self.holders(stage)]
        length = min(self.path_length, len(held))
        path = [origin]
        for stage in _draw_order(rng, held[1:], length - 1):
            best = min(
                self.holders(stage),
                key=lambda peer: (self._peers[peer].is_new, self._expected_s(peer), rng.random()),
            )
            path.append(best)
            self._given[best] += 1
        return path

    def mended(self, planned: Sequence[PeerId], stages: Sequence[int], *, lot: str) -> list[PeerId]:
        """A planned path for the swarm as it is now: whoever does not hold the planned stage any more is replaced by the best
        who does. Where nobody does, the path is drawn anew.

        Args:
            planned: peers; the first is the origin.
            stages: that they were planned for.
            lot: see `path`.
        """
        path = [planned[0]]
        for peer, stage in zip(planned[1:], stages[1:], strict=True):
            if self.stage_of(peer) != stage:
                others = self.holders(stage)
                if not others:
                    return self.path(planned[0], lot=lot)
                peer = min(others, key=self._expected_s)
            path.append(peer)
        self._given.update(path[1:])
        return path

    def _expected_s(self, peer: PeerId) -> float:
        """When a peer has done what we gave it, if that is all that it does; an unmeasured one is taken for an average one."""
        known = [each.forward_s for each in self._peers.values() if each.forward_s > 0.0]
        usual = sum(known) / len(known) if known else 1.0
        return (self._given[peer] + 1) * (self._peers[peer].forward_s or usual)


def _draw_order(rng: random.Random, held: list[int], length: int) -> list[int]:
    """Some stages that are held, in an order that the rules allow, neighbours exchanged now and then; all of them in order.

    Drawn, and not chosen from all orders: a pipeline of two dozen stages has millions.
    """
    for _ in range(_TRIES):
        order = sorted(rng.sample(held, length))
        place = rng.randrange(2 * length) if 1 < length < len(held) else 0
        if 0 < place < length:
            order[place - 1], order[place] = order[place], order[place - 1]
        if is_order((0, *order)):
            return order
    return held[:length]  # the first ones: a gap that is too wide for the rules comes as late as can be
