"""Does a swarm beat a peer that trains alone? The same model, text and number of steps per peer, over several seeds.

Both train in virtual time on the memory transport, so the machine's cores decide nothing: in the same (virtual) wall time every
peer takes the same steps, and the only difference is whether it has partners.

    python -m tests.benchmarks.swarm [--json] [--seeds 3] [--peers 3] [--rounds 18]

The last line is one JSON object: `single` and `swarm` hold the held-out loss of every seed with mean and standard deviation,
`gain` the difference of the means in nats per token, `seeds_won` the number of seeds in which the swarm was better, and
`tokens_per_peer` shows that all took the same steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from node.demo import run_demo
from node.demo_settings import DemoOptions

__all__ = ["main"]


def losses(peers: int, *, seeds: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Held-out loss at the end, for every seed."""
    results = []
    for seed in range(seeds):
        options = DemoOptions(peers=peers, rounds=rounds, seed=seed, folder=folder / f"{peers}-{seed}", memory=True)
        result = run_demo(options)
        results.append(result)
        print(
            f"{peers} peers, seed {seed}: held-out {result['val_loss_start']:.3f} → {result['val_loss_end']:.3f}, "
            f"spread {result['replica_spread']:.3f}, {result['exchanges_ok']} exchanges, {result['seconds']:.0f} s",
            flush=True,
        )
    ends = [result["val_loss_end"] for result in results]
    return {
        "peers": peers,
        "val_loss_end": ends,
        "mean": round(statistics.mean(ends), 4),
        "std": round(statistics.stdev(ends), 4) if len(ends) > 1 else 0.0,
        "tokens_per_peer": [result["tokens"] // peers for result in results],
        "exchanges_failed": sum(result["exchanges_failed"] for result in results),
        "bytes_sent": [result["bytes_sent"] for result in results],
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--peers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=18)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        single = losses(1, seeds=arguments.seeds, rounds=arguments.rounds, folder=Path(folder))
        swarm = losses(arguments.peers, seeds=arguments.seeds, rounds=arguments.rounds, folder=Path(folder))
    pairs = zip(single["val_loss_end"], swarm["val_loss_end"], strict=True)
    result = {
        "single": single,
        "swarm": swarm,
        "gain": round(single["mean"] - swarm["mean"], 4),
        "seeds_won": sum(together < alone for alone, together in pairs),
        "rounds": arguments.rounds,
    }
    print(
        f"alone {single['mean']:.3f} ± {single['std']:.3f}, together {swarm['mean']:.3f} ± {swarm['std']:.3f} nats per token"
    )
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
