"""The status document as Prometheus text, for `/metrics`.

Nothing is counted here: each scrape translates the document of that moment, so the numbers equal those on the page.
Totals of the swarm are counters; a peer's own numbers are gauges labelled by its id, and its name is left out, since
label values of strangers' choosing would let one peer make endless series.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE", "prometheus_text"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SWARM_GAUGES = {
    "peers": "Trainers heard of lately",
    "training": "Trainers that are training",
    "round": "Round that half of the trainers have reached",
    "tokens_per_s": "Tokens trained per second by all live peers",
    "val_loss": "Mean validation loss in nats per token at the newest measured round",
}
_SWARM_COUNTERS = {
    "tokens": "Tokens trained in this run",
    "exchanges_ok": "Exchanges that ended in an average, as counted by each side",
    "exchanges_failed": "Exchanges that did not",
    "sent_bytes": "Payload bytes sent by all peers",
    "received_bytes": "Payload bytes received by all peers",
}
_STAGE_GAUGES = {
    "peers": "Trainers of a pipeline stage heard of lately",
    "microbatches_per_s": "Forward passes per second that they could do together",
}
_PEER_GAUGES = {
    "round": "Round the peer is in",
    "tokens_per_s": "Tokens trained per second",
    "train_loss": "Training loss in nats per token",
    "val_loss": "Validation loss in nats per token",
    "age_s": "Seconds since the peer's newest record arrived",
}


def prometheus_text(document: Mapping[str, Any]) -> bytes:
    """Translate a status document into Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_DocumentCollector(document))
    return generate_latest(registry)


class _DocumentCollector(Collector):
    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        document = self._document
        run, swarm, peers = document["run"], document["swarm"], document["peers"]
        info = GaugeMetricFamily("llm_node_run_info", "The run", labels=["run", "name", "algorithm"])
        info.add_metric([run["id"], run["name"], run["algorithm"]], 1)
        yield info
        for field, text in _SWARM_GAUGES.items():
            if swarm[field] is not None:
                yield GaugeMetricFamily(f"llm_node_swarm_{field}", text, value=swarm[field])
        for field, text in _SWARM_COUNTERS.items():
            yield CounterMetricFamily(f"llm_node_swarm_{field}", text, value=swarm[field])
        for field, text in _STAGE_GAUGES.items():
            family = GaugeMetricFamily(f"llm_node_stage_{field}", text, labels=["stage"])
            for stage in document["stages"]:
                family.add_metric([str(stage["stage"])], stage[field])
            yield family
        for field, text in _PEER_GAUGES.items():
            family = GaugeMetricFamily(f"llm_node_peer_{field}", text, labels=["peer", "role"])
            for peer in peers:
                if peer[field] is not None:
                    family.add_metric([peer["peer"], peer["role"]], peer[field])
            yield family
