"""How much of the wall time do peers behind slow lines train? Ours with and without overlap, and hivemind's averager likewise.

Four peers in network namespaces: three lines pass 50 Mbit/s each way, one 10 (tc tbf; needs root). The model has 9.6 million
parameters, a round 60 s of inner steps. A step's work is real, and then it sleeps: its duration is fixed to what the cores can
sustain for all peers, so waiting is all that differs. Counted is the share of the wall time inside steps, from the moment
when all peers have begun to the moment when the first log ends, so it includes packing, applying, evaluation, checkpoints,
matchmaking and every wait.

    python -m tests.benchmarks.utilisation [--json] [--minutes 3] [--only ours_overlap …]

The last line is one JSON object, `utilisation`: for each variant the `share` of every peer (the last one has the slow line), its
`median` and `spread`, the same as `undisturbed_…` without the time between steps in which the training thread stood in the queue
for a core, rounds, exchanges, bytes on each line, and `overruns`, the share of steps whose work took longer than the fixed
duration. Trust the shares only where overruns are rare: elsewhere other programs had the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from tests.benchmarks.peers.hivemind_peer import Work
from tests.benchmarks.peers.padded import Step, read_steps
from tests.benchmarks.peers.started import JsonProcess, start_hivemind
from tests.net.namespaces import Namespaces, obstacle
from tests.net.process import has_averaged
from tests.net.swarm import RUN_SETTINGS, Swarm

__all__ = ["main"]

RATES_BITS_PER_S = (50_000_000, 50_000_000, 50_000_000, 10_000_000)
ROUND_S = 60.0
MIN_STEP_S = 1.0
HEADROOM = 2.0
"""A step lasts so many times what its work takes when all peers share the cores."""
TIMEOUT_S = 60.0
SEQUENCE_TOKENS = 16
SETTINGS: dict[str, Any] = RUN_SETTINGS | {
    "model.vocab_size": 512,
    "model.hidden_size": 384,
    "model.intermediate_size": 1024,
    "model.num_layers": 6,
    "model.num_heads": 6,
    "model.num_kv_heads": 2,
    "inner.sequence_tokens": SEQUENCE_TOKENS,
    "inner.lr": 1e-4,
    "sync.round_target_s": ROUND_S,
    "sync.exchange_timeout_s": TIMEOUT_S,
    "sync.snapshot_rounds": 20,
}
"""Small batches, since what a step learns is not the question, and few snapshots, since hivemind's averager gives none at all."""


def model() -> ModelConfig:
    """The model of the run, for peers of the other kind."""
    return ModelConfig(**{key.removeprefix("model."): v for key, v in SETTINGS.items() if key.startswith("model.")})


def calibrate() -> float:
    """The steps' duration in s."""
    torch.set_num_threads(1)
    work = Work(model(), sequence_tokens=SEQUENCE_TOKENS)
    seconds = []
    for _ in range(6):
        started_s = time.monotonic()
        work.step()
        seconds.append(time.monotonic() - started_s)
    crowding = max(1.0, len(RATES_BITS_PER_S) / (os.cpu_count() or 1))
    return round(max(MIN_STEP_S, HEADROOM * crowding * statistics.median(seconds)), 2)


def watch(logs: Sequence[Path], *, minutes: float) -> list[list[Step]]:
    """Wait until all peers train, and for so long again."""
    deadline_s = time.monotonic() + 240
    while not all(log.exists() and read_steps(log) for log in logs):
        if time.monotonic() > deadline_s:
            raise SystemExit("the peers have not begun to train within 4 minutes; is the machine very busy?")
        time.sleep(0.5)
    time.sleep(60 * minutes)
    return [read_steps(log) for log in logs]


def shares(steps: list[list[Step]], *, step_s: float) -> dict[str, Any]:
    """The share of the common time that each peer spent in steps."""
    begin_s, end_s = max(own[0].began_s for own in steps), min(own[-1].ended_s for own in steps)
    inside = [sum(max(0.0, min(s.ended_s, end_s) - max(s.began_s, begin_s)) for s in own) for own in steps]
    queued = [sum(s.queued_s for s in own if begin_s < s.began_s <= end_s) for own in steps]
    share = [seconds / (end_s - begin_s) for seconds in inside]
    undisturbed = [seconds / (end_s - begin_s - lost) for seconds, lost in zip(inside, queued, strict=True)]
    computed = [step.computed_s for own in steps for step in own]
    return {
        "share": [round(value, 4) for value in share],
        "median": round(statistics.median(share), 4),
        "spread": round(max(share) - min(share), 4),
        "undisturbed_share": [round(value, 4) for value in undisturbed],
        "undisturbed_median": round(statistics.median(undisturbed), 4),
        "seconds": round(end_s - begin_s, 1),
        "steps": [len(own) for own in steps],
        "step_work_s": round(statistics.median(computed), 3),
        "overruns": round(sum(seconds > step_s for seconds in computed) / len(computed), 4),
    }


def counted(exchanges: list[list[dict[str, Any]]], ok: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """How many exchanges succeeded, and how long these took."""
    seconds = [event["seconds"] for own in exchanges for event in own if ok(event)]
    return {
        "rounds": [len(own) for own in exchanges],
        "exchanges_ok": len(seconds),
        "exchanges_failed": sum(map(len, exchanges)) - len(seconds),
        "exchange_s": [round(value, 1) for value in (min(seconds), statistics.median(seconds), max(seconds))]
        if seconds
        else None,
    }


def ours(swarm: Swarm, lines: Namespaces, *, step_s: float, minutes: float) -> dict[str, Any]:
    """Real nodes; the bootstrap node sits beside the first peer."""
    prefix = [sys.executable, "-m", "tests.benchmarks.peers.padded", str(step_s)]
    listen = [f"--listen=/ip4/{host}/tcp/0" for host in lines.hosts]
    manifest = str(swarm.folder / "run.toml")
    bootstrap = swarm.start("bootstrap", "bootstrap", manifest, listen[0], prefix=lines.inside(0))
    logs = [swarm.folder / f"{host}.steps" for host in lines.hosts]
    peers = [
        swarm.start(
            f"peer-{index}",
            "join",
            f"--peer={bootstrap.address}",
            listen[index],
            "--threads=1",
            "--sequences=1",
            prefix=(*lines.inside(index), *prefix, str(logs[index])),
        )
        for index in range(len(logs))
    ]
    result = shares(watch(logs, minutes=minutes), step_s=step_s)
    exchanges = [[event for event in list(peer.events) if event["event"] == "exchange"] for peer in peers]
    told = [[event for event in list(peer.events) if event["event"] == "validation"][-1] for peer in peers]
    return result | counted(exchanges, has_averaged) | {"told": [event.get("training_share") for event in told]}


def theirs(folder: Path, lines: Namespaces, *, mode: str, step_s: float, minutes: float) -> dict[str, Any]:
    """hivemind's averager."""
    logs = [folder / f"{host}.steps" for host in lines.hosts]
    options = [
        f"--model={json.dumps(asdict(model()))}",
        f"--sequence-tokens={SEQUENCE_TOKENS}",
        f"--step-s={step_s}",
        f"--round-steps={round(ROUND_S / step_s)}",
        f"--group={len(logs)}",
        f"--timeout-s={TIMEOUT_S}",
    ]
    peers: list[JsonProcess] = []
    try:
        for index, log in enumerate(logs):
            own = [f"--host={lines.hosts[index]}", f"--bits-per-s={RATES_BITS_PER_S[index]}", f"--log={log}"]
            via = [f"--peer={address}" for address in (peers[0].wait_for("ready")["addresses"] if peers else ())]
            peers.append(
                start_hivemind(
                    mode, *options, *own, *via, prefix=lines.inside(index), folder=folder, name=f"peer-{index}"
                )
            )
        for peer in peers:
            peer.wait_for("ready")
        for peer in peers:
            peer.begin()
        result = shares(watch(logs, minutes=minutes), step_s=step_s)
        exchanges = [[event for event in list(peer.events) if event["event"] == "exchange"] for peer in peers]
    finally:
        for peer in peers:
            peer.kill()
    return result | counted(exchanges, lambda event: bool(event["ok"]))


VARIANTS = ("ours_overlap", "ours_blocking", "hivemind_blocking", "hivemind_delayed")


def measure(variant: str, *, step_s: float, minutes: float) -> dict[str, Any]:
    """One variant, in namespaces of its own."""
    who, _, mode = variant.partition("_")
    with tempfile.TemporaryDirectory(prefix="util-") as place, Namespaces(RATES_BITS_PER_S) as lines:
        folder = Path(place)
        if who == "hivemind":
            result = theirs(folder, lines, mode=mode, step_s=step_s, minutes=minutes)
        else:
            settings = SETTINGS | {"sync.inner_steps": round(ROUND_S / step_s), "sync.overlap": mode == "overlap"}
            with Swarm(folder, settings) as swarm:
                result = ours(swarm, lines, step_s=step_s, minutes=minutes)
        hosts = range(len(lines.hosts))
        result["sent_bytes"] = [lines.sent_bytes(index) for index in hosts]
        result["received_bytes"] = [lines.received_bytes(index) for index in hosts]
    return result


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--minutes", type=float, default=3.0, help="of each variant, once all peers train")
    parser.add_argument("--only", choices=VARIANTS, nargs="+", default=VARIANTS)
    arguments = parser.parse_args()
    if reason := obstacle():
        raise SystemExit(f"utilisation: {reason}; run it as root on a Linux machine with iproute2")
    results: dict[str, Any] = {"step_s": calibrate()}
    for variant in arguments.only:
        result = results[variant] = measure(variant, step_s=results["step_s"], minutes=arguments.minutes)
        print(
            f"{variant}: {100 * result['median']:.1f} % of the time in steps (per peer "
            f"{', '.join(f'{100 * share:.1f}' for share in result['share'])}; on free cores "
            f"{100 * result['undisturbed_median']:.1f}), "
            f"{result['exchanges_ok']} exchanges, {result['exchanges_failed']} failed",
            flush=True,
        )
    if arguments.json:
        print(json.dumps({"utilisation": results}))


if __name__ == "__main__":
    main()
