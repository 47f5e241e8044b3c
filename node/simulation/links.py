"""The links of a simulated swarm: drawn per pair of peers, or read from a table of measured ones.

Peers are spread in turn over the sites of a table. What a pair's link is like depends on the seed and the pair alone.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from node.simulation.scenario import LineClass, LinksSection, Scenario
from protocol.errors import UserError
from protocol.ids import PeerId
from protocol.memory import MemoryNetwork
from protocol.memory_links import Chance, LinkTable, RandomLink

__all__ = ["Sites", "link_table", "network_of", "read_matrix", "typical_link"]

COLUMNS = ["from", "to", "latency_ms", "mbit_per_s"]
WRITES_TO_AGREE = 2
"""Propose or Answer, and the Offer: what each end writes before the pair is final (averaging/exchange_messages.py). The stream
breaks when both have begun with their payloads, so each holds the other's Offer, and neither looks for another partner."""
MAX_LATENCY_MS = 60_000.0
"""As in the scenario; a clock of centuries does not tell seconds apart."""
_BYTES_PER_MBIT = 125_000.0
_CACHED_LINKS = 1 << 16

Sites = dict[tuple[str, str], tuple[float, float]]
"""(from, to) → latency in seconds and bytes per second, for every ordered pair of sites, a site with itself included."""


def read_matrix(path: Path) -> Sites:
    """Read measured links; a direction or a pair of peers of one site that is not given is taken from the other direction, or
    from the site's fastest link.

    Raises:
        UserError: it can not be read, or a line is not as it should be, or a pair of sites is missing.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a CSV file"
        raise UserError(f"cannot read {path}: {reason}; check links.matrix") from None
    if not rows or [cell.strip() for cell in rows[0]] != COLUMNS:
        raise UserError(f"{path}: the first line must be {','.join(COLUMNS)}; mend it")
    sites: Sites = {}
    for number, row in enumerate(rows[1:], start=2):
        if row:
            source, target, *values = _cells(row, path=path, number=number)
            sites[str(source), str(target)] = (float(values[0]) / 1e3, float(values[1]) * _BYTES_PER_MBIT)
    return _completed(sites, path)


def link_table(links: LinksSection, *, seed: int, sites: Sites | None, number_of: Callable[[PeerId], int]) -> LinkTable:
    """What the network asks for every link.

    Args:
        links: the scenario's section.
        seed: of the draws per pair.
        sites: the measured table, if the section names one.
        number_of: the peer's number, which decides its site.
    """
    chance = Chance(seed)
    names = sorted({source for source, _ in sites}) if sites else []

    def measured(source: PeerId, target: PeerId) -> tuple[float, float]:
        assert sites is not None
        return sites[names[number_of(source) % len(names)], names[number_of(target) % len(names)]]

    def drawn(source: PeerId, target: PeerId) -> tuple[float, float]:
        pair = sorted((source, target))
        latency_s = chance.log_normal(links.latency_s, links.latency_pair_ratio, "latency", pair)
        bytes_per_s = links.bytes_per_s
        if links.classes:
            sending, receiving = (_line_of(links.classes, chance, peer) for peer in (source, target))
            bytes_per_s = min(sending.up_bytes_per_s, receiving.down_bytes_per_s)
            latency_s += sending.latency_s + receiving.latency_s
        return latency_s, chance.log_normal(bytes_per_s, links.bytes_per_s_ratio, "bandwidth", source, target)

    @lru_cache(_CACHED_LINKS)
    def table(source: PeerId, target: PeerId) -> RandomLink:
        latency_s, bytes_per_s = measured(source, target) if sites else drawn(source, target)
        return _link(links, latency_s=latency_s, bytes_per_s=bytes_per_s)

    return table


def _line_of(classes: Sequence[LineClass], chance: Chance, peer: PeerId) -> LineClass:
    left = chance.uniform("line", peer)
    for each in classes:
        left -= each.share
        if left < 0.0:
            return each
    return classes[-1]


def typical_link(links: LinksSection, sites: Sites | None) -> RandomLink:
    """A link of mean latency, for look-ups in the DHT."""
    latency_s = sum(latency for latency, _ in sites.values()) / len(sites) if sites else links.latency_s
    return _link(links, latency_s=latency_s, bytes_per_s=links.bytes_per_s)


def network_of(scenario: Scenario, folder: Path, *, number_of: Callable[[PeerId], int]) -> MemoryNetwork:
    """The scenario's network.

    Args:
        folder: where the scenario's link matrix is looked for.
        number_of: the peer's number.

    Raises:
        UserError: the link matrix is unusable.
    """
    links, seed = scenario.links, scenario.swarm.seed
    sites = read_matrix(folder / links.matrix) if links.matrix else None
    return MemoryNetwork(
        seed=seed,
        link=typical_link(links, sites),
        links=link_table(links, seed=seed, sites=sites, number_of=number_of),
    )


def _link(links: LinksSection, *, latency_s: float, bytes_per_s: float) -> RandomLink:
    return RandomLink(
        latency_s=latency_s,
        latency_ratio=links.latency_message_ratio,
        bytes_per_s=bytes_per_s,
        loss=links.write_loss,
        stream_loss=links.exchange_loss,
        spared_writes=WRITES_TO_AGREE,
    )


def _cells(row: list[str], *, path: Path, number: int) -> tuple[str, str, float, float]:
    cells = [cell.strip() for cell in row]
    try:
        source, target, latency_ms, mbit_per_s = cells[0], cells[1], float(cells[2]), float(cells[3])
        if (
            len(cells) == 4
            and source
            and target
            and 0.0 <= latency_ms <= MAX_LATENCY_MS
            and 0.0 < mbit_per_s < math.inf
        ):
            return source, target, latency_ms, mbit_per_s
    except (IndexError, ValueError):
        pass
    raise UserError(
        f"{path}: line {number} is not {','.join(COLUMNS)} with positive numbers and at most a minute; mend it"
    )


def _completed(sites: Sites, path: Path) -> Sites:
    names = sorted({name for pair in sites for name in pair})
    if not names:
        raise UserError(f"{path} holds no link; add a line per pair of sites")
    whole: Sites = {}
    for source in names:
        for target in names:
            known = sites.get((source, target)) or sites.get((target, source))
            if known is None and source == target:  # peers of one site are at least as near as its nearest other site
                own = [value for pair, value in sites.items() if source in pair]
                known = (min(latency for latency, _ in own), max(bandwidth for _, bandwidth in own))
            if known is None:
                raise UserError(f"{path}: the link between {source!a} and {target!a} is missing; add a line for it")
            whole[source, target] = known
    return whole
