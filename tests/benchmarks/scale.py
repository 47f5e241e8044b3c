"""How averaging scales: 16 to 4,096 simulated peers, with the node's own search, exchange and directory in virtual time.

    python -m tests.benchmarks.scale [--json] [--quick]

round_time      All peers end a round at the same moment and look for partners. Seconds, by std/mean of the latency per message
                (log-normal, mean LATENCY_S) and number of peers:
                `pair_s`, `pair_p95_s`: this project's exchange: search, stream, proposal, answer, offers, payloads, receipts.
                `tree_s`: binary tree, up and down, a parent waits for both children; Monte Carlo, time until the last peer has it.
                `bare_pair_s`: two peers, one message each way, twice (reduce and broadcast), the slower counts: the model of the
                NoLoCo paper (arXiv 2506.10911), whose closed form 2t·(1 + erf(σ/2)) is `paper_pair_s`.
tree_over_pair  Times of the tree over those of the bare and of the real pair.
averaged_share  Share of the real exchanges that averaged, for the same swarms.
spread          Replica spread by round when 0, 10 and 30 % of the exchanges are lost.
messages        Messages, look-ups and bytes per peer and round as the swarm grows.

`--quick` takes small swarms only. The whole takes less than eight minutes on one core, most of it for the largest swarm.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from node.simulation.run import simulate
from node.simulation.scenario import Scenario

__all__ = ["exchange_times", "main", "measure", "messages_per_round", "pair_times", "spread_by_loss", "tree_time"]

LATENCY_S = 0.05
RATIOS = (0.0, 0.5, 1.0, 2.0)
LOSSES = (0.0, 0.1, 0.3)
SIZES = (16, 64, 256, 1024, 4096)
MIN_PEERS_SAMPLED = 128
"""Small swarms are simulated with several seeds, until so many peers have exchanged."""
MONTE_CARLO_TRIALS = 300

Array = NDArray[np.float64]


def draw(rng: np.random.Generator, shape: tuple[int, ...], ratio: float) -> Array:
    """Log-normal latencies of mean 1 and standard deviation `ratio`."""
    sigma = math.sqrt(math.log1p(ratio * ratio))
    return np.exp(sigma * rng.standard_normal(shape) - sigma * sigma / 2.0)


def tree_time(num_peers: int, ratio: float, *, trials: int = MONTE_CARLO_TRIALS) -> float:
    """Mean time of a tree all-reduce, in units of the mean latency. `num_peers` is a power of two."""
    rng = np.random.default_rng(0)
    done = np.zeros((trials, num_peers))
    while done.shape[1] > 1:  # both children send, their parent waits for the later
        arrived = done + draw(rng, done.shape, ratio)
        done = np.maximum(arrived[:, 0::2], arrived[:, 1::2])
    while done.shape[1] < num_peers:
        done = np.repeat(done, 2, axis=1)
        done = done + draw(rng, done.shape, ratio)
    return float(done.max(axis=1).mean())


def pair_times(ratio: float, *, trials: int = 200_000) -> dict[str, float]:
    """Mean times of a bare pair, in units of the mean latency."""
    both = draw(np.random.default_rng(1), (trials, 2), ratio).max(axis=1)
    sigma = math.sqrt(math.log1p(ratio * ratio))
    return {"bare_pair": 2.0 * float(both.mean()), "paper_pair": 2.0 * (1.0 + math.erf(sigma / 2.0))}


def measure(
    sizes: Sequence[int] = SIZES,
    ratios: Sequence[float] = RATIOS,
    losses: Sequence[float] = LOSSES,
    *,
    loss_peers: int = 64,
    loss_rounds: int = 16,
) -> dict[str, Any]:
    """The whole result but its own cost; numbers of peers and shares are keys, as text."""
    result: dict[str, Any] = {"latency_s": LATENCY_S, "round_time": {}, "tree_over_pair": {}, "averaged_share": {}}
    for ratio in ratios:
        for parts, num_peers in ((exchange_times(num_peers, ratio), num_peers) for num_peers in sizes):
            for part, row in parts.items():
                result[part].setdefault(str(ratio), {})[str(num_peers)] = row
    result["spread_peers"] = loss_peers
    result["spread"] = {str(loss): spread_by_loss(loss_peers, loss_rounds, loss) for loss in losses}
    result["messages"] = {str(num_peers): messages_per_round(num_peers) for num_peers in sizes}
    return result


def exchange_times(num_peers: int, ratio: float, *, min_sampled: int = MIN_PEERS_SAMPLED) -> dict[str, Any]:
    """Entries of `round_time`, `tree_over_pair` and `averaged_share`; small swarms are simulated until so many peers exchanged."""
    results = [
        _simulated(
            {"peers": num_peers, "rounds": 1, "seed": seed, "heartbeat_s": 30.0},
            links={"latency_message_ratio": ratio, "bytes_per_s": 1e9},
            sync={"inner_steps": 1},
        )
        for seed in range(max(1, min_sampled // num_peers))
    ]
    pair_s, pair_p95_s = (float(np.mean([r["exchange_s"][name] for r in results])) for name in ("mean", "p95"))
    tree_s = LATENCY_S * tree_time(num_peers, ratio)
    models = {f"{name}_s": LATENCY_S * value for name, value in pair_times(ratio).items()}
    over = {"bare_pair": tree_s / models["bare_pair_s"], "pair": tree_s / pair_s}
    print(
        f"{num_peers:5d} peers, std/mean {ratio:3.1f}: tree {tree_s:6.3f} s, bare pair {models['bare_pair_s']:5.3f} s "
        f"({over['bare_pair']:4.1f} times), real exchange {pair_s:5.3f} s, of 95 % {pair_p95_s:5.3f} s",
        flush=True,
    )
    return {
        "round_time": {"pair_s": pair_s, "pair_p95_s": pair_p95_s, "tree_s": tree_s, **models},
        "tree_over_pair": over,
        "averaged_share": float(np.mean([result["success_share"] for result in results])),
    }


def spread_by_loss(num_peers: int, rounds: int, loss: float) -> list[float]:
    """Replica spread by round when this share of exchanges is lost."""
    result = _simulated({"peers": num_peers, "rounds": rounds}, links={"exchange_loss": loss})
    spread: list[float] = result["by_round"]["spread"]
    share = result["exchanges"].get("lost", 0) / sum(result["exchanges"].values())
    print(
        f"{100 * share:.0f} % lost of {100 * loss:.0f} % asked for: spread {spread[-1]:.4f} after {rounds} rounds, "
        f"{100 * result['success_share']:.1f} % of exchanges averaged",
        flush=True,
    )
    return spread


def messages_per_round(num_peers: int) -> dict[str, float]:
    """Traffic per peer and round."""
    each: dict[str, float] = _simulated({"peers": num_peers, "rounds": 2})["per_peer_and_round"]
    print(
        f"{num_peers:5d} peers, per peer and round: {each['messages']:.1f} messages, {each['dht_gets']:.1f} reads, "
        f"{each['dht_stores']:.1f} stores, {each['dht_hops']:.1f} hops, {each['sent_bytes']:.0f} bytes",
        flush=True,
    )
    return each


def _simulated(
    swarm: dict[str, Any], *, links: dict[str, float] | None = None, sync: dict[str, Any] | None = None
) -> dict[str, Any]:
    scenario = {
        "swarm": {"parameters": 64, "heartbeat_s": 10.0, **swarm},
        "links": {"latency_s": LATENCY_S, **(links or {})},
        "sync": {"inner_steps": 20, "round_target_s": 20.0, **(sync or {})},
    }
    return simulate(Scenario.model_validate(scenario))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--quick", action="store_true", help="small swarms only")
    arguments = parser.parse_args()
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    result = measure(SIZES[:2], RATIOS[::3], loss_peers=32, loss_rounds=5) if arguments.quick else measure()
    result |= {"wall_s": time.perf_counter() - began_s, "cpu_s": time.process_time() - began_cpu_s}
    print(f"{result['wall_s']:.0f} s, of which {result['cpu_s']:.0f} s on the processor")
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
