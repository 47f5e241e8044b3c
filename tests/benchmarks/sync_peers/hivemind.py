"""One peer of hivemind's DecentralizedAverager, averaging the same vector in a group of two.

    python -m tests.benchmarks.sync_peers.hivemind ADDRESS_OF_THE_FIRST_OR_EMPTY

Its matchmaking is over before the clock starts: the step waits for a trigger, and both peers are given it at the same time.
"""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

import psutil
import torch

from tests.benchmarks.sync_peers.driver import Json, read_command, reply, wait_until

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from hivemind.averaging import DecentralizedAverager
    from hivemind.averaging.control import AveragingStage, StepControl
    from hivemind.compression import (
        BlockwiseQuantization,
        Float16Compression,
        NoCompression,
        Uniform8BitQuantization,
    )
    from hivemind.dht import DHT

__all__ = ["main"]

_COMPRESSIONS: dict[str, Any] = {
    "none": NoCompression,
    "float16": Float16Compression,
    "uniform8": Uniform8BitQuantization,
    "blockwise8": BlockwiseQuantization,
}
_TIMEOUT_S = 120.0
_WEIGHT_STD = 0.02
_DRIFT_STD = 1e-4


class Peer:
    """Carries out the benchmark's commands."""

    def __init__(self, dht: DHT) -> None:
        self._dht = dht
        self._averager: DecentralizedAverager | None = None
        self._step: StepControl | None = None
        self._random = torch.Generator().manual_seed(hash(dht.peer_id) % 2**31)

    def serve(self) -> None:
        """Answer commands until there are none."""
        while command := read_command():
            reply(getattr(self, command.pop("do"))(**command) or {})
        self.free()

    def prepare(self, numel: int, compression: str, part_bytes: int, prefix: str) -> None:
        """Start from weights that both peers share."""
        self.free()
        theta = torch.empty(numel).normal_(std=_WEIGHT_STD, generator=torch.Generator().manual_seed(1))
        self._averager = DecentralizedAverager(
            [theta],
            self._dht,
            start=True,
            prefix=prefix,
            target_group_size=2,
            min_group_size=2,
            min_matchmaking_time=2.0,
            request_timeout=1.0,
            compression=_COMPRESSIONS[compression](),
            part_size_bytes=part_bytes,
            allow_state_sharing=False,
        )

    def free(self) -> None:
        """End the averager."""
        if self._averager is not None:
            self._averager.shutdown()
        self._averager = None

    def drift(self) -> None:
        """What a round of training does to the weights, as far as an exchange is concerned."""
        assert self._averager is not None
        with self._averager.get_tensors() as (theta,):
            for start in range(0, theta.numel(), 1 << 20):
                piece = theta[start : start + (1 << 20)]
                piece.add_(torch.empty_like(piece).normal_(std=_DRIFT_STD, generator=self._random))

    def match(self) -> Json:
        """Find the group, and stop there."""
        assert self._averager is not None
        begun_s = time.monotonic()
        self._step = self._averager.step(wait=False, require_trigger=True, timeout=_TIMEOUT_S)
        while self._step.stage != AveragingStage.AWAITING_TRIGGER:
            assert not self._step.done(), "matchmaking failed"
            time.sleep(0.001)
        return {"seconds": time.monotonic() - begun_s}

    def exchange(self, at_s: float) -> Json:
        """The all-reduce of the group."""
        assert self._step is not None
        cpu_s = _cpu_s()
        wait_until(at_s)
        begun_s = time.monotonic()
        self._step.allow_allreduce()
        group = self._step.result(timeout=_TIMEOUT_S)
        assert len(group) == 2, "a group of one"
        ended_s = time.monotonic()
        return {"times_s": [begun_s, ended_s], "cpu_s": _cpu_s() - cpu_s}

    def fingerprint(self) -> Json:
        """Part of the weights, to see that both peers hold the same."""
        assert self._averager is not None
        with self._averager.get_tensors() as (theta,):
            return {"weights": theta[:: max(1, theta.numel() // 64)].tolist()}


def _cpu_s() -> float:
    """Processor time used so far by this peer: its own process, the DHT's, the averager's and p2pd."""
    us = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (us, *us.children(recursive=True)))


def main(first: str) -> None:
    """Run one peer until its standard input ends."""
    dht = DHT(initial_peers=[first] if first else [], host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True)
    reply({"peer": str(dht.peer_id), "address": str(dht.get_visible_maddrs()[0])})
    Peer(dht).serve()
    dht.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
