"""How much sooner is an iteration over when stages are skipped? Real processes behind unequal lines; and was it foreseen?

Every peer is a process of its own, with its own libp2p daemon and the real executor, in a network namespace whose line passes 10,
25 or 50 Mbit/s each way (tc tbf), 2 to 60 ms from the others (tests/net/delay.py); needs root. A microbatch's activations are a
quarter of a megabyte, as of a much larger model; the weights are tiny, so that a few cores carry all peers, and a pass lasts a
given time per peer, of which it works a little and sleeps the rest. Two swarms: four stages, of which a microbatch visits three,
and six, of which it visits four. Stage 0 has three peers and every other one two (as in SkipPipe's smallest case, arXiv
2502.19913), and what falls to whom is a lot. The same peers, lines and executor serve three methods:

    full      every stage, by the planner's best plan
    random    a random order of the allowed stages, and a random peer of each; another plan for every iteration
    ours      the planner's best plan with stages skipped

    python -m tests.benchmarks.pipeline [--json] [--iterations 8] [--planning 8] [--only NAME …] [--traces FILE]

Per method `iteration_s` with its quartiles; `predicted_s`, the event simulation of the same plan with the numbers by which the
swarm was built (nothing measured goes in), and `error`; `fair_s` and `fair_error` of a simulation in which transfers share their
lines as TCP shares them (tests/benchmarks/pipeline_peers/fair_lines.py) and the last answers are waited for; microbatches
`returned` and `lost`, bytes on the lines, processor time as a share of all cores, and `overruns`, the share of passes whose work
took longer than the given time. Trust the times only where these are rare: elsewhere other programs had the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

from node.pipeline.case import Case
from node.pipeline.plan import Plan
from node.pipeline.replay import replay
from node.pipeline.solver import replan, solve
from tests.benchmarks.pipeline_peers.fair_lines import replay_fairly
from tests.benchmarks.pipeline_peers.world import (
    BACKWARD_MULTIPLIER,
    LOSS_MULTIPLIER,
    World,
    draw_world,
    random_plan,
)
from tests.benchmarks.sync_peers.driver import Json, Pair, running
from tests.net.namespaces import Namespaces, obstacle
from tests.node.runs import tiny_run

__all__ = ["main"]

SWARMS = {"25 %": ((3, 2, 2, 2), 3), "33 %": ((3, 2, 2, 2, 2, 2), 4)}
"""By the share of stages that is skipped: peers of each stage, and stages that a microbatch visits."""
SLOTS, MICROBATCHES = 3, 6
METHODS = ("full", "random", "ours")
WARM_UP = 1
"""Iterations that are not counted: connections begin slowly."""
SETTINGS: dict[str, Any] = {
    "model__hidden_size": 64,
    "model__intermediate_size": 64,
    "inner__sequence_tokens": 64,
    "pipeline__microbatch_sequences": 16,
    "pipeline__codec": "fp32",
    "pipeline__slots": SLOTS,
    "pipeline__microbatches": MICROBATCHES,
}
PAYLOAD_BYTES = 4 * 16 * 64 * 64


class Swarm:
    """The peers of one world, each with its stage.

    Args:
        folder: takes their files; a short path.
    """

    def __init__(self, world: World, folder: Path, stack: ExitStack) -> None:
        self.world = world
        signed, _ = tiny_run(folder, model__num_layers=world.num_stages, pipeline__stages=world.num_stages, **SETTINGS)
        self.lines = stack.enter_context(Namespaces(world.rates_bits_per_s, latency_s=world.latency_s))
        indices = range(len(world.stages))
        self._pair = self._start(folder, stack)
        self.peers = [greeting["peer"] for greeting in self._pair.greetings]
        addresses = {greeting["peer"]: greeting["addresses"] for greeting in self._pair.greetings}
        self._pair.ask("meet", peers=addresses)
        holders = dict(zip(self.peers, world.stages, strict=True))
        told = self._pair.ask_each(
            "prepare",
            [
                {
                    "manifest": signed.manifest.to_toml(),
                    "stage": world.stages[index],
                    "holders": holders,
                    "durations_s": _durations_s(world.forward_s[index]),
                }
                for index in indices
            ],
        )
        assert {answer["payload_bytes"] for answer in told} == {PAYLOAD_BYTES}

    def _start(self, folder: Path, stack: ExitStack) -> Pair:
        arguments = [(str(folder / str(index)), host) for index, host in enumerate(self.lines.hosts)]
        for home, _ in arguments:
            Path(home).mkdir()
        prefixes = [self.lines.inside(index) for index in range(len(arguments))]
        return stack.enter_context(running("pipeline_peers.peer", arguments, prefixes=prefixes))

    def probe(self, times: int) -> list[list[list[float]]]:
        """Round trip and payload time from each peer to each other, measured with everybody else silent."""
        found = []
        for peer in range(len(self.peers)):
            options = [
                {"peers": self.peers if other == peer else [], "times": times} for other in range(len(self.peers))
            ]
            answer = self._pair.ask_each("probe", options)[peer]["found"]
            found.append([answer.get(other, [0.0, 0.0]) for other in self.peers])
        return found

    def run(self, plans: Sequence[Plan], iterations: int) -> tuple[list[float], list[Json]]:
        """Seconds of each iteration, and what every peer tells of them."""
        options = [
            {"iterations": iterations, "plans": [self._own(plan, peer) for plan in plans]}
            for peer in range(len(self.peers))
        ]
        told = self._pair.ask_each("train", options)
        ends_s = [max(answer["ends_s"][number] for answer in told) for number in range(iterations)]
        return [after - before for before, after in pairwise(ends_s)][WARM_UP - 1 :], told

    def _own(self, plan: Plan, peer: int) -> list[tuple[list[str], int]]:
        """A peer's microbatches in a plan, and their ranks among all."""
        ranked = sorted(plan.microbatches, key=lambda each: each.priority)
        own = [(each, rank) for rank, each in enumerate(ranked) if each.path[0] == peer]
        return [([self.peers[node] for node in each.path], rank) for each, rank in own]


def _durations_s(forward_s: float) -> dict[str, float]:
    return {
        "_run_forward": forward_s,
        "_run_loss": LOSS_MULTIPLIER * forward_s,
        "_run_backward": BACKWARD_MULTIPLIER * forward_s,
    }


def plan_for(case: Case, *, seconds: float) -> Plan:
    """The planner's best, for peers that take backward passes first."""
    first = solve(case, seconds=0.6 * seconds).plan
    return replan(case, first, dispatch="backward_first", seed=0, seconds=0.4 * seconds, max_evaluations=sys.maxsize)


def plans_for(
    method: str, world: World, path_length: int, *, seconds: float, iterations: int
) -> tuple[Case, list[Plan]]:
    """One plan for all iterations, or one for each."""
    case = world.case(world.num_stages if method == "full" else path_length, PAYLOAD_BYTES)
    if method != "random":
        return case, [plan_for(case, seconds=seconds)]
    # A plan that could stop for ever, since microbatches wait for each other's slots, is no method at all.
    drawn = (random_plan(case, seed=seed) for seed in range(1000))
    finite = (plan for plan in drawn if replay(case, plan)[0] < float("inf"))
    return case, [next(finite) for _ in range(iterations)]


def measure(swarm: Swarm, method: str, path_length: int, options: argparse.Namespace) -> tuple[Json, list[Json]]:
    """One method."""
    iterations = options.iterations + WARM_UP
    case, plans = plans_for(method, swarm.world, path_length, seconds=options.planning, iterations=iterations)
    counted = plans if len(plans) == 1 else plans[WARM_UP:]
    expected_s = statistics.median(replay(case, plan)[0] for plan in counted)
    fair_s = statistics.median(replay_fairly(case, plan) for plan in counted)
    hosts = range(len(swarm.peers))
    before_bytes = sum(swarm.lines.sent_bytes(index) for index in hosts)
    seconds, told = swarm.run(plans, iterations)
    sent_bytes = sum(swarm.lines.sent_bytes(index) for index in hosts) - before_bytes
    quartiles = statistics.quantiles(seconds, n=4)
    passes = [each for answer in told for each in answer["passes"]]
    middle = statistics.median(seconds)
    wall_s = max(answer["ends_s"][-1] for answer in told) - min(p[1] for p in passes)
    return {
        "iteration_s": round(middle, 3),
        "quartiles_s": [round(quartiles[0], 3), round(quartiles[2], 3)],
        "predicted_s": round(expected_s, 3),
        "error": round(middle / expected_s - 1.0, 3),
        "fair_s": round(fair_s, 3),
        "fair_error": round(middle / fair_s - 1.0, 3),
        "iterations": len(seconds),
        "returned": sum(sum(answer["returned"]) for answer in told),
        "lost": sum(sum(answer["lost"]) for answer in told),
        "incomplete": sum(not each for answer in told for each in answer["complete"]),
        "MB_per_iteration": round(sent_bytes / iterations / 1e6, 1),
        "processors_busy": round(sum(answer["cpu_s"] for answer in told) / wall_s / (os.cpu_count() or 1), 3),
        "overruns": round(_overruns(swarm.world, told), 4),
        "failures": dict(sum((Counter(answer["failures"]) for answer in told), Counter())),
        "load": round(os.getloadavg()[0], 1),
    }, [{"case": case.model_dump(mode="json"), "plans": [plan.to_json() for plan in plans], "told": told}]


def _overruns(world: World, told: Sequence[Json]) -> float:
    """Share of the passes whose work took longer than it should last."""
    late: list[bool] = [
        worked_s > _durations_s(forward_s)[name]
        for forward_s, answer in zip(world.forward_s, told, strict=True)
        for name, _, _, worked_s in answer["passes"]
        if name in _durations_s(forward_s)
    ]
    return sum(late) / max(len(late), 1)


def _end(*_: object) -> None:
    """Leave all blocks, once: a second signal must not cut that short."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit("pipeline: ended by a signal")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--iterations", type=int, default=8, help="counted ones, per method")
    parser.add_argument("--planning", type=float, default=8.0, help="seconds per plan")
    parser.add_argument("--only", choices=[*SWARMS, *METHODS], nargs="+", default=[*SWARMS, *METHODS])
    parser.add_argument("--seed", type=int, default=0, help="of the lot")
    parser.add_argument("--probe", action="store_true", help="measure all links, too")
    parser.add_argument("--traces", type=Path, help="takes every pass of every peer")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    if reason := obstacle():
        raise SystemExit(f"pipeline: {reason}; run it as root on a Linux machine with iproute2 and /dev/net/tun")
    swarms = [name for name in SWARMS if name in options.only] or list(SWARMS)
    methods = [name for name in METHODS if name in options.only] or list(METHODS)
    results: dict[str, Json] = {}
    for name in swarms:
        sizes, path_length = SWARMS[name]
        world = draw_world(sizes, slots=SLOTS, microbatches=MICROBATCHES, seed=options.seed)
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pipe-")))
            swarm = Swarm(world, folder, stack)
            if options.probe:
                print(json.dumps(swarm.probe(3)))
            found = results[name] = {}
            for method in methods:
                found[method], trace = measure(swarm, method, path_length, options)
                print(name, method, json.dumps(found[method]), flush=True)
                if options.traces:
                    Path(f"{options.traces}.{name[:2]}.{method}.json").write_text(json.dumps(trace))
        if "full" in found:
            for method in set(methods) - {"full"}:
                found[method]["less_than_full"] = round(
                    1.0 - found[method]["iteration_s"] / found["full"]["iteration_s"], 3
                )
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
