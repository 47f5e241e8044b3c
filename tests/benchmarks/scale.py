"""How averaging scales: 16 to 4,096 simulated peers, with the node's own search, exchange and directory in virtual time.

    python -m tests.benchmarks.scale [--json] [--quick]

round_time  All peers end a round at the same moment and look for partners. Their times, in units of the mean latency t, stand
            beside a tree all-reduce with the same log-normal latency per message (std/mean 0 to 2):
            `tree`: binary tree, up and down, a parent waits for both children; Monte Carlo, time until the last peer has it.
            `pair_bare`: two peers, one message each way, twice (reduce and broadcast), the slower counts: the model of the NoLoCo
            paper (arXiv 2506.10911), whose closed form 2t·(1 + erf(σ/2)) is `pair_formula`. `pair_one_message`: once.
            `pair_real`: this project's exchange: search, opening a stream, proposal, answer, offers, payloads, receipts.
loss        Replica spread by round when 0, 10 and 30 % of the exchanges are lost.
growth      Messages and look-ups per peer and round as the swarm grows.

`--quick` takes small swarms only. The whole takes some minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from node.scenario import Scenario
from node.simulate import simulate

__all__ = ["growth", "losses", "main", "pair_times", "round_times", "tree_time"]

LATENCY_S = 0.05
RATIOS = (0.0, 0.5, 1.0, 2.0)
SIZES = (16, 64, 256, 1024, 4096)
MIN_PEERS_SAMPLED = 256
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
    return {
        "pair_bare": 2.0 * float(both.mean()),
        "pair_formula": 2.0 * (1.0 + math.erf(sigma / 2.0)),
        "pair_one_message": float(both.mean()),
    }


def round_times(
    sizes: tuple[int, ...], ratios: tuple[float, ...], *, min_sampled: int = MIN_PEERS_SAMPLED
) -> list[dict[str, Any]]:
    """One row per swarm size and spread of the latency; small swarms are simulated until `min_sampled` peers have exchanged."""
    rows = []
    for ratio in ratios:
        bare = pair_times(ratio)
        for num_peers in sizes:
            real = _real_exchanges(num_peers, ratio, num_seeds=max(1, min_sampled // num_peers))
            tree = tree_time(num_peers, ratio)
            rows.append(
                {
                    "peers": num_peers,
                    "latency_std_over_mean": ratio,
                    "tree": tree,
                    **bare,
                    "pair_real": real["latencies"],
                    "real_success_share": real["success_share"],
                    "tree_over_bare": tree / bare["pair_bare"],
                    "tree_over_real": tree / real["latencies"]["mean"],
                }
            )
            print(
                f"{num_peers:5d} peers, std/mean {ratio:3.1f}: tree {tree:6.1f} t, bare pair {bare['pair_bare']:4.2f} t "
                f"(ratio {tree / bare['pair_bare']:4.1f}), real exchange mean {real['latencies']['mean']:5.1f} t, "
                f"p50 {real['latencies']['p50']:5.1f} t, p95 {real['latencies']['p95']:5.1f} t",
                flush=True,
            )
    return rows


def _real_exchanges(num_peers: int, ratio: float, *, num_seeds: int) -> dict[str, Any]:
    """Times of simultaneous exchanges in units of the mean latency."""
    results = [
        _simulated(
            num_peers,
            rounds=1,
            seed=seed,
            links={"latency_message_ratio": ratio, "bytes_per_s": 1e9},
            sync={"inner_steps": 1},
        )
        for seed in range(num_seeds)
    ]
    names = ("mean", "p50", "p95", "max")
    return {
        "latencies": {
            name: float(np.mean([result["exchange_s"][name] for result in results])) / LATENCY_S for name in names
        },
        "success_share": float(np.mean([result["success_share"] for result in results])),
    }


def losses(num_peers: int, rounds: int, shares: tuple[float, ...] = (0.0, 0.1, 0.3)) -> list[dict[str, Any]]:
    """Replica spread by round, one row per share of exchanges that are lost."""
    rows = []
    for share in shares:
        result = _simulated(num_peers, rounds=rounds, links={"exchange_loss": share})
        total = sum(result["exchanges"].values())
        rows.append(
            {
                "loss": share,
                "measured_loss": result["exchanges"].get("lost", 0) / total,
                "success_share": result["success_share"],
                "spread": result["by_round"]["spread"],
                "replica_loss": result["by_round"]["replica_loss"],
            }
        )
        print(
            f"{100 * share:2.0f} % lost: spread {result['by_round']['spread'][-1]:.4f} after {rounds} rounds, "
            f"{100 * result['success_share']:.1f} % of exchanges averaged",
            flush=True,
        )
    return rows


def growth(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Traffic per peer and round, one row per swarm size."""
    rows = []
    for num_peers in sizes:
        result = _simulated(num_peers, rounds=2)
        each = result["per_peer_and_round"]
        rows.append(
            {
                "peers": num_peers,
                **each,
                "success_share": result["success_share"],
                "exchange_s": result["exchange_s"],
                "round_s": result["round_s"],
            }
        )
        print(
            f"{num_peers:5d} peers, per peer and round: {each['messages']:.1f} messages, {each['dht_gets']:.1f} reads, "
            f"{each['dht_stores']:.1f} stores, {each['dht_hops']:.1f} hops, {each['sent_bytes']:.0f} bytes; "
            f"{100 * result['success_share']:.1f} % averaged",
            flush=True,
        )
    return rows


def _simulated(
    num_peers: int,
    *,
    rounds: int,
    seed: int = 0,
    links: dict[str, float] | None = None,
    sync: dict[str, Any] | None = None,
) -> dict[str, Any]:
    scenario = {
        "swarm": {"peers": num_peers, "rounds": rounds, "parameters": 64, "seed": seed, "heartbeat_s": 10.0},
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
    sizes = SIZES[:2] if arguments.quick else SIZES
    began_s = time.perf_counter(), time.process_time()
    result = {
        "round_time": round_times(sizes, RATIOS[::3] if arguments.quick else RATIOS),
        "loss": losses(32, 5) if arguments.quick else losses(64, 16),
        "growth": growth(sizes),
        "wall_s": time.perf_counter() - began_s[0],
        "cpu_s": time.process_time() - began_s[1],
    }
    print(f"{result['wall_s']:.0f} s, of which {result['cpu_s']:.0f} s on the processor")
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
