"""How long one whole exchange takes: ours in every codec, beside hivemind's averager, the bare stream and memory.

Two peers in two processes exchange a vector of random weights over libp2p on loopback. One exchange of ours is everything from
the end of a round's last inner step to the new weights: encode, transfer both ways, two-phase commit, admission, outer step; for
hivemind it is the all-reduce of a group of two, matchmaking apart. Time runs from a common start to the slower peer's end.

    python -m tests.benchmarks.sync [--json] [--sizes 25,100] [--repeats 5] [--eager]

The last line is one JSON object, per size in millions of parameters: `ours` and `hivemind` by setting, each with `seconds` (median,
lowest, highest), `bytes` sent per peer, and `cpu_seconds` of one peer with its daemon (on a shared machine the number to trust);
`raw_stream_MBps` per direction of a p2pd stream whose bytes are thrown away, `copy_GBps` of memory, `speedup_vs_hivemind_best`
of `best_setting`, `speedup_at_equal_precision`, and `fraction_of_raw_stream` of the uncompressed exchange (`whole`, and `transfer`:
without encoding and applying).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from averaging.codec import DELTA_CODECS, SLOW_CODECS
from tests.benchmarks.sync_peers.driver import Pair, running

__all__ = ["main"]

Json = dict[str, Any]

OURS = {
    **{f"pair-average {slow}": ("pair-average", "fp32", slow) for slow in SLOW_CODECS},
    **{f"noloco {delta}+{slow}": ("noloco", delta, slow) for delta, slow in (("fp32", "fp32"), ("bf16", "bf16"))},
    **{f"noloco {delta}+bf16": ("noloco", delta, "bf16") for delta in DELTA_CODECS if delta not in ("fp32", "bf16")},
    "theta-only lattice": ("theta-only", "fp32", "lattice"),
    "noloco q8+q8": ("noloco", "q8", "q8"),
    "noloco topk+lattice": ("noloco", "topk", "lattice"),
}
"""Setting → (algorithm, codec of Δ, codec of φ or θ). `theta-only` is noloco in the form that sends θ alone, a run's default."""
UNCOMPRESSED = "pair-average fp32"
USABLE = ("pair-average q8", "pair-average lattice", "theta-only lattice")
"""Lossy settings that do what hivemind's averaging does, with an error that a run does not notice. θ as plain q4 is off by 9 %."""
HIVEMIND = {
    "none": ("none", 1 << 21),
    "none, default parts": ("none", 1 << 19),
    "float16": ("float16", 1 << 19),
    "uniform8": ("uniform8", 1 << 19),
    "blockwise8": ("blockwise8", 1 << 19),
}
"""Setting → (compression, bytes per part)."""
EQUALS = {"32 bit": ("fp32", ("none", "none, default parts")), "16 bit": ("bf16", ("float16",))}
EQUALS |= {"8 bit": ("q8", ("uniform8", "blockwise8"))}
_RAW_BYTES = 200_000_000
_COPY_NUMEL = 64_000_000


def spread(values: list[float]) -> Json:
    """Median and range."""
    ordered = sorted(round(value, 4) for value in values)
    return {"median": statistics.median(ordered), "lowest": ordered[0], "highest": ordered[-1]}


def seconds_of(answers: list[Json], first: int = 0, last: int = -1) -> float:
    """From the first peer's begin of a phase to the last peer's end of one."""
    times = [answer["times_s"] for answer in answers]
    return float(max(each[last] for each in times) - min(each[first] for each in times))


def measure_ours(pair: Pair, setting: str, *, numel: int, repeats: int, eager: bool) -> Json:
    """One setting of ours; the first exchange warms up and is not counted."""
    algorithm, delta, slow = OURS[setting]
    pair.ask("prepare", numel=numel, algorithm=algorithm, delta=delta, slow=slow, eager=eager)
    rounds = []
    for round in range(repeats + 1):
        pair.ask("drift")
        rounds.append(pair.ask_together("exchange", round=round))
    pair.ask("free")
    counted = [answer for answers in rounds[1:] for answer in answers]
    return {
        "seconds": spread([seconds_of(answers) for answers in rounds[1:]]),
        "transfer_seconds": spread([seconds_of(answers, 1, 2) for answers in rounds[1:]]),
        "bytes": max(answer["bytes"] for answer in counted),
        "payload_bytes": counted[0]["payload_bytes"],
        "cpu_seconds": spread([answer["cpu_s"] + answer["daemon_cpu_s"] for answer in counted]),
        "daemon_cpu_seconds": spread([answer["daemon_cpu_s"] for answer in counted]),
        "longest_loop_block_s": spread([answer["longest_block_s"] for answer in counted]),
        "peak_rss_bytes": max(answer["peak_rss_bytes"] for answer in counted),
    }


def measure_hivemind(pair: Pair, setting: str, *, numel: int, repeats: int) -> Json:
    """One setting of hivemind; the first exchange warms up and is not counted."""
    compression, part_bytes = HIVEMIND[setting]
    prefix = f"{numel}-{compression}-{part_bytes}"
    pair.ask("prepare", numel=numel, compression=compression, part_bytes=part_bytes, prefix=prefix)
    seconds: list[float] = []
    cpu_s: list[float] = []
    matchmaking_s: list[float] = []
    num_bytes: list[int] = []
    for _ in range(repeats + 1):
        pair.ask("drift")
        matchmaking_s.append(max(answer["seconds"] for answer in pair.ask("match")))
        before_bytes = _loopback_bytes()
        answers = pair.ask_together("exchange")
        num_bytes.append((_loopback_bytes() - before_bytes) // 2)
        seconds.append(seconds_of(answers))
        cpu_s.extend(answer["cpu_s"] for answer in answers)
    first, second = (answer["weights"] for answer in pair.ask("fingerprint"))
    pair.ask("free")
    return {
        "seconds": spread(seconds[1:]),
        "bytes": min(num_bytes),  # of the whole machine's loopback: others can only add to it
        "cpu_seconds": spread(cpu_s[2:]),
        "matchmaking_s": spread(matchmaking_s[1:]),
        "largest_difference": max(abs(a - b) for a, b in zip(first, second, strict=True)),
    }


def measure_raw(pair: Pair, *, both_ways: bool) -> Json:
    """A stream of p2pd without anything around it: MB/s per direction, and processor seconds per peer and 100 MB."""
    options = [{"num_bytes": _RAW_BYTES, "dials": dials, "both_ways": both_ways} for dials in (True, False)]
    return pair.ask_each("raw", options)[0]


def measure_copy() -> Json:
    """GB/s of copying memory with one thread."""
    source, target = torch.ones(_COPY_NUMEL), torch.ones(_COPY_NUMEL)
    rates = []
    for _ in range(5):
        begun_s = time.perf_counter()
        target.copy_(source)
        rates.append(4e-9 * _COPY_NUMEL / (time.perf_counter() - begun_s))
    return spread(rates)


def run_ours(sizes: list[int], settings: list[str], *, repeats: int, eager: bool) -> Json:
    """All sizes and settings of ours, and the bare stream before each of them."""
    results: Json = {}
    with tempfile.TemporaryDirectory() as folder:
        homes = [Path(folder) / name for name in ("a", "b")]
        for home in homes:
            home.mkdir()
        with running("sync_peers.ours", [[str(home)] for home in homes]) as pair:
            first, second = pair.greetings
            meet = [
                {"partner": second["peer"], "address": second["address"]},
                {"partner": first["peer"], "address": ""},
            ]
            pair.ask_each("connect", meet)
            for size in sizes:
                raw: dict[bool, list[Json]] = {True: [], False: []}
                ours = {}
                for setting in settings:
                    for both_ways, measured in raw.items():
                        measured.append(measure_raw(pair, both_ways=both_ways))
                    numel = size * 1_000_000
                    ours[setting] = measure_ours(pair, setting, numel=numel, repeats=repeats, eager=eager)
                    _say(f"{size}M ours {setting}", ours[setting])
                results[str(size)] = {"ours": ours, **_raw_rates(raw)}
    return results


def run_hivemind(sizes: list[int], *, repeats: int) -> Json:
    """All sizes and settings of hivemind."""
    results: Json = {}
    with running("sync_peers.hivemind", [[""]]) as lonely:
        address = lonely.greetings[0]["address"]
        with running("sync_peers.hivemind", [[address]]) as other:
            pair = lonely.joined(other)
            for size in sizes:
                results[str(size)] = {}
                for setting in HIVEMIND:
                    measured = measure_hivemind(pair, setting, numel=size * 1_000_000, repeats=repeats)
                    results[str(size)][setting] = measured
                    _say(f"{size}M hivemind {setting}", measured)
    return results


def compare(ours: Json, hivemind: Json, *, raw_MBps: float, numel: int) -> Json:  # a unit
    """The ratios of one size."""

    def fastest(results: Json, settings: tuple[str, ...] | list[str]) -> str:
        return min((name for name in settings if name in results), key=lambda name: results[name]["seconds"]["median"])

    def ratio(our_setting: str, their_setting: str) -> Json:
        numbers = {}
        for unit in ("seconds", "cpu_seconds"):
            theirs, mine = hivemind[their_setting][unit]["median"], ours[our_setting][unit]["median"]
            numbers[unit] = round(theirs / mine, 3)
        return {"ours": our_setting, "hivemind": their_setting, **numbers}

    result: Json = {}
    if UNCOMPRESSED in ours:
        rate_of: Callable[[str], float] = lambda key: 4e-6 * numel / ours[UNCOMPRESSED][key]["median"]  # noqa: E731
        result["fraction_of_raw_stream"] = {
            "whole": round(rate_of("seconds") / raw_MBps, 3),
            "transfer": round(rate_of("transfer_seconds") / raw_MBps, 3),
        }
    if hivemind and any(setting in ours for setting in USABLE):
        best = ratio(fastest(ours, USABLE), fastest(hivemind, list(hivemind)))
        result["best_setting"], result["speedup_vs_hivemind_best"] = best["ours"], best
        result["speedup_at_equal_precision"] = {
            name: ratio(f"pair-average {codec}", fastest(hivemind, theirs))
            for name, (codec, theirs) in EQUALS.items()
            if f"pair-average {codec}" in ours
        }
    return result


def _raw_rates(raw: dict[bool, list[Json]]) -> Json:
    rates = {
        both_ways: spread([_RAW_BYTES / 1e6 / each["seconds"] for each in measured])
        for both_ways, measured in raw.items()
    }
    cpu_s = spread([each["cpu_s"] / (_RAW_BYTES / 1e8) for each in raw[True]])
    return {
        "raw_stream_MBps": {"both_ways": rates[True], "one_way": rates[False]},
        "raw_stream_cpu_seconds_per_100MB": cpu_s,
    }


def _loopback_bytes() -> int:
    return int(psutil.net_io_counters(pernic=True)["lo"].bytes_sent)


def _say(what: str, measured: Json) -> None:
    seconds, cpu_s = measured["seconds"], measured["cpu_seconds"]["median"]
    print(
        f"{what}: {seconds['median']:.3f} s ({seconds['lowest']:.3f}–{seconds['highest']:.3f}), "
        f"{measured['bytes'] / 1e6:.1f} MB, {cpu_s:.2f} s of processor per peer",
        file=sys.stderr,
        flush=True,
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--sizes", default="25,100", help="millions of parameters")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--settings", default="", help="only our settings that contain one of these words")
    parser.add_argument(
        "--eager", action="store_true", help="without compiled code, which nodes use from 16M parameters on"
    )
    parser.add_argument("--no-hivemind", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [int(size) for size in arguments.sizes.split(",")]
    words = arguments.settings.split(",")
    settings = [setting for setting in OURS if any(word in setting for word in words)]
    results = run_ours(sizes, settings, repeats=arguments.repeats, eager=arguments.eager)
    theirs = {} if arguments.no_hivemind else run_hivemind(sizes, repeats=arguments.repeats)
    for size, result in results.items():
        hivemind = theirs.get(size, {})
        raw_MBps = result["raw_stream_MBps"]["both_ways"]["median"]  # a unit
        result |= {"hivemind": hivemind, "copy_GBps": measure_copy()}
        result |= compare(result["ours"], hivemind, raw_MBps=raw_MBps, numel=int(size) * 1_000_000)
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
