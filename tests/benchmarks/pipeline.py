"""How much sooner is an iteration over when stages are skipped? Real processes behind unequal lines; and was it foreseen?

Every peer is a process of its own, with its own libp2p daemon and the real executor, in a network namespace whose line passes 10,
25 or 50 Mbit/s each way (tc tbf), 2 to 60 ms from the others (tests/net/delay.py); needs root. A microbatch's activations are a
quarter of a megabyte, as of a much larger model; the weights are tiny, so that a few cores carry all peers, and a pass lasts a
given time per peer, of which it works a little and sleeps the rest. Two swarms: four stages, of which a microbatch visits three,
and six, of which it visits four. Stage 0 has three peers and every other one two (as in SkipPipe's smallest case, arXiv
2502.19913), and what falls to whom is a lot; so there are three drawn worlds of each. The same peers, lines and executor serve four
methods:

    full      every stage, by the planner's best plan
    random    a random order of the allowed stages, and a random peer of each; another plan for every iteration
    ours      the planner's best plan with stages skipped
    live      the plan of the node's own planner (node/pipeline/planning.py), with stages skipped, out of the peers' own records:
              the links and speeds that they have measured, in the other methods' iterations and by a probe per heartbeat

The first three are planned with the numbers by which the swarm was built, but for the links: what a payload takes on each, after a
pause and with everybody else silent, is measured before, and how many bytes of the lines it takes with its packets' headers. From
the second method on, the planner also knows what the iterations before took, as in a live swarm (node/pipeline/calibration.py);
`random` runs first, so that the others' predictions have something to go by, and never what they predict.

    python -m tests.benchmarks.pipeline [--json] [--worlds 3] [--iterations 2] [--planning 6] [--only NAME …] [--traces FILE]

Per method, each number the median over the worlds or, of what is counted, the sum: `iteration_s`, the median iteration, and in
`worlds_s` that of each world; `quartiles_s` of all iterations over their world's median, times `iteration_s`; `predicted_s`, the
planner's own simulation of the plan, made before, and `errors`, measured over predicted less 1, of each world, of which `error` is
the median size; `transfer_factor`, by which the links were taken to be slower; `bound_s`, below which no plan is by that
simulation; `less_than_full`, and of each world `less_per_world`; microbatches `returned` and `lost`, bytes on the lines, processor
time as a share of all cores, and `overruns`, the share of passes whose work took longer than the given time. Trust the times only
where these are rare: elsewhere other programs had the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from node.pipeline.bounds import lower_bound
from node.pipeline.calibration import Ran, calibrated, transfer_factor
from node.pipeline.case import Case
from node.pipeline.live_case import live_case
from node.pipeline.plan import Plan
from node.pipeline.planning import MAX_EVALUATIONS, search
from node.pipeline.replay import replay
from node.pipeline.solver import replan, solve
from node.pipeline.variants import expected_s
from protocol.ids import PeerId
from protocol.manifest_sections import PipelineSpec
from protocol.records import PeerRecord
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
METHODS = ("random", "full", "ours", "live")
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
PROBES = 2
"""Payloads per link before all methods."""
BOUND_S = 2.0
"""Most time for a bound."""
PAYLOAD_BYTES = 4 * 16 * 64 * 64


@dataclass(frozen=True, slots=True)
class Planned:
    """One plan for all iterations, or one for each.

    Args:
        measured: the case as its links were measured.
        factor: that transfers are taken to be slower by.
        peers: the number of each of the case's nodes among the world's peers.
    """

    measured: Case
    factor: float
    plans: list[Plan]
    peers: Sequence[int]

    @property
    def case(self) -> Case:
        """What was planned for."""
        return calibrated(self.measured, self.factor)

    def ran(self, seconds: Sequence[float]) -> list[Ran]:
        """With what the counted iterations took."""
        if len(self.plans) == 1:
            return [Ran(self.measured, self.plans[0], statistics.median(seconds))]
        return [Ran(self.measured, plan, each) for plan, each in zip(self.plans[WARM_UP:], seconds, strict=True)]

    def predicted_s(self) -> float:
        """By the planner's simulation, of the iterations that are counted."""
        counted = self.plans if len(self.plans) == 1 else self.plans[WARM_UP:]
        return statistics.median(expected_s(self.case, plan) for plan in counted)


class Swarm:
    """The peers of one world, each with its stage.

    Args:
        folder: takes their files; a short path.
    """

    def __init__(self, world: World, folder: Path, stack: ExitStack) -> None:
        self.world = world
        self.ran: list[Ran] = []
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
        self.probe()

    def _start(self, folder: Path, stack: ExitStack) -> Pair:
        arguments = [(str(folder / str(index)), host) for index, host in enumerate(self.lines.hosts)]
        for home, _ in arguments:
            Path(home).mkdir()
        prefixes = [self.lines.inside(index) for index in range(len(arguments))]
        return stack.enter_context(running("pipeline_peers.peer", arguments, prefixes=prefixes))

    def probe(self) -> None:
        """Measure every link, each line with one payload at a time in each direction."""
        count = len(self.peers)
        self.link_s = [[0.0] * count for _ in range(count)]
        before_bytes = self.sent_bytes()
        for shift in range(1, count):
            receivers = [(peer + shift) % count for peer in range(count)]
            options = [{"peer": self.peers[receiver], "times": PROBES} for receiver in receivers]
            for sender, answer in enumerate(self._pair.ask_each("probe", options)):
                self.link_s[sender][receivers[sender]] = answer["link_s"]
        self.wire_bytes = (self.sent_bytes() - before_bytes) / (PROBES * count * (count - 1))

    def sent_bytes(self) -> int:
        """By all peers, headers included."""
        return sum(self.lines.sent_bytes(index) for index in range(len(self.peers)))

    def run(self, planned: Planned, iterations: int) -> tuple[list[float], list[Json]]:
        """Seconds of each iteration, and what every peer tells of them."""
        names = [self.peers[peer] for peer in planned.peers]
        options = [
            {"iterations": iterations, "plans": [_own(plan, names, peer) for plan in planned.plans]}
            for peer in self.peers
        ]
        told = self._pair.ask_each("train", options)
        ends_s = [max(answer["ends_s"][number] for answer in told) for number in range(iterations)]
        return [after - before for before, after in pairwise(ends_s)][WARM_UP - 1 :], told

    def live_plan(self, path_length: int) -> Planned:
        """What a planner among them would make of their records."""
        told = zip(self.peers, self._pair.ask("record"), strict=True)
        records = {PeerId(peer): PeerRecord.model_validate(record) for peer, record in told}
        world = self.world
        spec = PipelineSpec(
            stages=world.num_stages,
            skip_ratio=1.0 - path_length / world.num_stages,
            slots=world.slots,
            microbatches=world.microbatches,
        )
        problem = live_case(records, spec=spec, payload_bytes=PAYLOAD_BYTES)
        assert problem is not None, "all stages are held"
        case, members = problem
        factor = transfer_factor(self.ran)
        plan, _ = search(calibrated(case, factor), None, seed=1, max_evaluations=MAX_EVALUATIONS)
        return Planned(case, factor, [plan], [self.peers.index(peer) for peer in members])


def _own(plan: Plan, names: Sequence[str], peer: str) -> list[tuple[list[str], int]]:
    """A peer's microbatches in a plan whose nodes are called so, and their ranks among all."""
    ranked = sorted(plan.microbatches, key=lambda each: each.priority)
    paths = [[names[node] for node in each.path] for each in ranked]
    return [(path, rank) for rank, path in enumerate(paths) if path[0] == peer]


def _durations_s(forward_s: float) -> dict[str, float]:
    return {
        "_run_forward": forward_s,
        "_run_loss": LOSS_MULTIPLIER * forward_s,
        "_run_backward": BACKWARD_MULTIPLIER * forward_s,
    }


def plan_for(case: Case, *, seconds: float) -> Plan:
    """The planner's best, for peers that take backward passes first."""
    first = solve(case, seconds=0.4 * seconds).plan
    found = [
        replan(case, first, dispatch="backward_first", seed=seed, seconds=0.3 * seconds, max_evaluations=sys.maxsize)
        for seed in (0, 100)
    ]
    return min(found, key=lambda plan: expected_s(case, plan))


def plans_for(method: str, swarm: Swarm, path_length: int, *, seconds: float, iterations: int) -> Planned:
    """What a method goes by."""
    if method == "live":
        return swarm.live_plan(path_length)
    world = swarm.world
    measured = world.case(world.num_stages if method == "full" else path_length, swarm.wire_bytes, swarm.link_s)
    factor = transfer_factor(swarm.ran)
    case = calibrated(measured, factor)
    if method == "random":
        # A plan that could stop for ever, since microbatches wait for each other's slots, is no method at all.
        drawn = (random_plan(case, seed=seed) for seed in range(1000))
        finite = (plan for plan in drawn if replay(case, plan)[0] < float("inf"))
        plans = [next(finite) for _ in range(iterations)]
    else:
        plans = [plan_for(case, seconds=seconds)]
    return Planned(measured, factor, plans, range(case.num_nodes))


def measure(swarm: Swarm, method: str, path_length: int, options: argparse.Namespace) -> tuple[Json, Json]:
    """One method in one world: what was measured, and its trace."""
    iterations = options.iterations + WARM_UP
    planned = plans_for(method, swarm, path_length, seconds=options.planning, iterations=iterations)
    before_bytes = swarm.sent_bytes()
    seconds, told = swarm.run(planned, iterations)
    swarm.ran += planned.ran(seconds)
    sent_bytes = swarm.sent_bytes() - before_bytes
    wall_s = max(answer["ends_s"][-1] for answer in told) - min(each[1] for answer in told for each in answer["passes"])
    case, plans = planned.case, planned.plans
    return {
        "seconds": seconds,
        "predicted_s": planned.predicted_s(),
        "transfer_factor": planned.factor,
        "bound_s": lower_bound(case, plans[0], seconds=BOUND_S) if method != "random" else None,
        "returned": sum(sum(answer["returned"]) for answer in told),
        "lost": sum(sum(answer["lost"]) for answer in told),
        "incomplete": sum(not each for answer in told for each in answer["complete"]),
        "failed_hops": sum(sum(answer["failures"].values()) for answer in told),
        "MB_per_iteration": sent_bytes / iterations / 1e6,
        "processors_busy": sum(answer["cpu_s"] for answer in told) / wall_s / (os.cpu_count() or 1),
        "overruns": _overruns(swarm.world, told),
        "load": os.getloadavg()[0],
    }, {"case": case.model_dump(mode="json"), "plans": [plan.to_json() for plan in plans], "told": told}


def merged(worlds: Sequence[Json], full: Sequence[Json]) -> Json:
    """One method in all worlds, beside the full pipeline in the same ones, if that was measured."""
    middles = [statistics.median(world["seconds"]) for world in worlds]
    relative = [each / middle for world, middle in zip(worlds, middles, strict=True) for each in world["seconds"]]
    low, _, high = statistics.quantiles(relative, n=4)
    middle = statistics.median(middles)
    errors = [middle / world["predicted_s"] - 1.0 for world, middle in zip(worlds, middles, strict=True)]
    less = [
        1.0 - middle / statistics.median(each["seconds"])
        for each, middle in zip(full, middles if full else [], strict=True)
    ]

    def median(field: str, digits: int) -> float:
        return round(float(statistics.median(world[field] for world in worlds)), digits)

    found: Json = {
        "iteration_s": round(middle, 3),
        "quartiles_s": [round(low * middle, 3), round(high * middle, 3)],
        "worlds_s": [round(each, 3) for each in middles],
        "predicted_s": median("predicted_s", 3),
        "transfer_factor": median("transfer_factor", 3),
        "error": round(statistics.median(map(abs, errors)), 3),
        "errors": [round(each, 3) for each in errors],
        "bound_s": median("bound_s", 3) if worlds[0]["bound_s"] is not None else None,
        "iterations": sum(len(world["seconds"]) for world in worlds),
    }
    found |= {name: sum(world[name] for world in worlds) for name in ("returned", "lost", "incomplete", "failed_hops")}
    found |= {"MB_per_iteration": median("MB_per_iteration", 1), "processors_busy": median("processors_busy", 3)}
    found |= {"overruns": round(statistics.mean(world["overruns"] for world in worlds), 4), "load": median("load", 1)}
    if less:
        found |= {
            "less_than_full": round(statistics.median(less), 3),
            "less_per_world": [round(each, 3) for each in less],
        }
    return found


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


def _measure_world(name: str, methods: Sequence[str], seed: int, options: argparse.Namespace) -> dict[str, Json]:
    """All methods in one drawn world."""
    sizes, path_length = SWARMS[name]
    world = draw_world(sizes, slots=SLOTS, microbatches=MICROBATCHES, seed=seed)
    found: dict[str, Json] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pipe-")))
        swarm = Swarm(world, folder, stack)
        for method in methods:
            found[method], trace = measure(swarm, method, path_length, options)
            print(name, seed, method, json.dumps(merged([found[method]], [])), flush=True)
            if options.traces:
                Path(f"{options.traces}.{name[:2]}.{seed}.{method}.json").write_text(json.dumps(trace))
    return found


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--worlds", type=int, default=3, help="drawn ones, of each size")
    parser.add_argument(
        "--iterations",
        type=int,
        default=2,
        choices=range(2, 100),
        metavar="N",
        help="counted ones, per method and world",
    )
    parser.add_argument("--planning", type=float, default=6.0, help="seconds per plan")
    parser.add_argument("--only", choices=[*SWARMS, *METHODS], nargs="+", default=[*SWARMS, *METHODS])
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
        worlds = [_measure_world(name, methods, seed, options) for seed in range(options.worlds)]
        full = [world["full"] for world in worlds if "full" in world]
        results[name] = {
            method: merged([world[method] for world in worlds], full if method != "full" else []) for method in methods
        }
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
