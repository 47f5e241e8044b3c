"""The planning problem of a live swarm, out of its peers' signed records.

What a record does not tell is taken from the others: the usual speed, the usual latency, the usual line. A peer that lies
about itself harms the plans that count on it, and those who find such plans slow do not follow them (node/pipeline/published.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from node.pipeline.case import Case
from node.pipeline.links import tail_of
from protocol.ids import PeerId
from protocol.manifest_sections import PipelineSpec
from protocol.records import PeerRecord

__all__ = ["MAX_MEMBERS", "SPREAD", "closing_s", "live_case"]

MAX_MEMBERS = 512
"""Peers that one plan is for."""

USUAL_LATENCY_S = 0.05
LEAST_PASS_S, LEAST_BYTES_PER_S = 1e-6, 1.0
"""What lies below is taken for this: anything may stand in a record."""
BACKWARD_MULTIPLIER = 3.0
"""A backward pass runs the forward pass again."""
SPREAD = 0.25
"""Of what transfers on one link take, see `Case.spread`: between real processes it was 0.26 and 0.29 (docs/LOG.md)."""
FARTHEST = 4.0
"""Times the usual latency: nobody counts as further away at an iteration's end."""
ALONE = 4.0
"""Times the next best: one receiver's word makes no uplink faster than that."""
SPARE_VISITS = 3.0
"""A peer is visited at most so many times as often as if its stage shared visits evenly: a bound of the search, not of the peer."""


def live_case(
    records: Mapping[PeerId, PeerRecord], *, spec: PipelineSpec, payload_bytes: int
) -> tuple[Case, list[PeerId]] | None:
    """The case, its partition given, and the peer behind each node.

    Args:
        records: of all peers, our own included.
        payload_bytes: of a microbatch's activations.

    Returns:
        None while a stage has no peer, or there are too many peers for a plan.
    """
    held = {p: r for p, r in records.items() if r.stage is not None and r.stage < spec.stages and r.state == "training"}
    members = sorted(held)
    partition = tuple(
        tuple(node for node, peer in enumerate(members) if held[peer].stage == stage) for stage in range(spec.stages)
    )
    if not all(partition) or len(members) > MAX_MEMBERS:
        return None
    rows = [held[peer] for peer in members]
    forward_s = [max(each, LEAST_PASS_S) for each in _filled([row.forward_s for row in rows], 1.0)]
    latency_s, line_s = _links(rows, members, payload_bytes)
    total = spec.microbatches * len(partition[0])
    share = total * (spec.path_length - 1) / max(spec.stages - 1, 1)
    visits = [min(total, math.ceil(SPARE_VISITS * share / len(nodes)) + 1) for nodes in partition]
    visits[0] = spec.microbatches
    nodes = range(len(members))
    case = Case(
        name="swarm",
        num_nodes=len(members),
        stage_sizes=tuple(len(nodes) for nodes in partition),
        path_length=spec.path_length,
        swaps=spec.path_length < spec.stages,  # with nothing skipped, the pipeline is the unsplit model
        slots_per_node=(spec.slots,) * len(members),
        rounds=1,
        microbatches_per_node=spec.microbatches,
        max_visits=tuple(visits[row.stage or 0] for row in rows),
        forward_s=tuple(forward_s),
        backward_multiplier=_ratio([(row.backward_s, row.forward_s) for row in rows], BACKWARD_MULTIPLIER),
        loss_multiplier=_ratio([(row.loss_s, row.forward_s) for row in rows if row.stage == 0], 1.0),
        link_s=tuple(tuple(latency_s[a][b] + line_s[a][b] for b in nodes) for a in nodes),
        uplink_s=tuple(_fastest([line_s[a][b] for b in nodes if b != a]) for a in nodes),
        downlink_s=tuple(min((line_s[a][b] for a in nodes if a != b), default=0.0) for b in nodes),
        closing_s=closing_s(latency_s),
        spread=SPREAD,
        partition=partition,
    )
    return case, members


def closing_s(latency_s: Sequence[Sequence[float]]) -> float:
    """How long the end of an iteration takes on these one-way ways: the origin asks whether its last backward pass counts, and
    everybody hears that it was the last (node/pipeline/iterations.py). One peer's word does not make it as long as it likes."""
    ways_s = [way_s for a, row in enumerate(latency_s) for b, way_s in enumerate(row) if a != b]
    usual_s = median(ways_s) if ways_s else 0.0
    return 2.0 * usual_s + min(max(ways_s, default=0.0), FARTHEST * usual_s)


def _links(
    rows: Sequence[PeerRecord], members: Sequence[PeerId], payload_bytes: int
) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds on the way from row to column, and seconds that a microbatch holds the line."""
    number = {tail_of(peer): index for index, peer in enumerate(members)}
    size = len(rows)
    latency_s = [[0.0] * size for _ in range(size)]
    line_s = [[0.0] * size for _ in range(size)]
    for receiver, row in enumerate(rows):
        for note in row.links:
            sender = number.get(note.peer)
            if sender is not None and sender != receiver:
                both = [each for each in (latency_s[receiver][sender], note.latency_s) if each > 0.0]
                latency_s[sender][receiver] = latency_s[receiver][sender] = min(both, default=0.0)
                if note.bytes_per_s > 0.0:
                    line_s[sender][receiver] = payload_bytes / max(note.bytes_per_s, LEAST_BYTES_PER_S)
    pairs = [(a, b) for a in range(size) for b in range(size) if a != b]
    usual_s = median([latency_s[a][b] for a, b in pairs if latency_s[a][b]] or [USUAL_LATENCY_S])
    up_s = _filled([_fastest(line_s[a]) for a in range(size)], 0.0)
    down_s = _filled([_least(column) for column in zip(*line_s, strict=True)], 0.0)
    for a, b in pairs:
        latency_s[a][b] = latency_s[a][b] or usual_s
        line_s[a][b] = line_s[a][b] or max(up_s[a], down_s[b])
    return latency_s, line_s


def _fastest(values: Sequence[float]) -> float:
    """What a payload takes of an uplink, by what receivers say; zeros say nothing. The smallest, but one that is far below all the
    others may be boasting."""
    known = sorted(value for value in values if value > 0.0)
    return max(known[0], known[1] / ALONE) if len(known) > 1 else sum(known)


def _least(values: Sequence[float]) -> float:
    return min((value for value in values if value > 0.0), default=0.0)


def _filled(values: Sequence[float], otherwise: float) -> list[float]:
    """Zeros replaced by the median of the others."""
    usual = median([value for value in values if value > 0.0] or [otherwise])
    return [value or usual for value in values]


def _ratio(pairs: Sequence[tuple[float, float]], otherwise: float) -> float:
    ratio = median([a / b for a, b in pairs if a > 0.0 and b > 0.0] or [otherwise])
    return min(max(ratio, 0.01), 100.0)
