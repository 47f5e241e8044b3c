"""A peer that averages its weights with hivemind's `DecentralizedAverager`: the same model, the same padded steps.

Its settings are the ones that suit it best here: 8-bit compression, all peers in one group (it assembles without waiting as soon
as everybody is there), the line's speed made known, so that it gives slow peers less to reduce, and all peers start together.
`blocking` waits for the average after every round, as `averager.step()` does by default. `delayed` starts it and trains on, and
adds the difference when it is done, which is what hivemind's own Optimizer does with `delay_state_averaging`.

Everything it tells is one JSON object per line on standard output.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import hivemind
import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.control import StepControl
from hivemind.compression import Float16Compression, Uniform8BitQuantization
from torch import Tensor

from averaging.flatten import FlatParameters
from model.config import ModelConfig
from model.optim import InnerConfig, build_optimizer
from model.transformer import Transformer
from tests.benchmarks.peers.padded import PaddedSteps

__all__ = ["Work"]

COMPRESSIONS = {"8bit": Uniform8BitQuantization, "float16": Float16Compression}


class Work:
    """A model and its optimizer, trained on random tokens: what a step costs does not depend on them."""

    def __init__(self, model: ModelConfig, *, sequence_tokens: int) -> None:
        self.model = Transformer(model)
        self.flat = FlatParameters(self.model)
        self._optimizer = build_optimizer(self.model, InnerConfig(lr=1e-4, sequence_tokens=sequence_tokens))
        self._batch = torch.randint(0, model.vocab_size, (1, sequence_tokens + 1))

    def step(self) -> None:
        """One inner step."""
        self._optimizer.zero_grad(set_to_none=False)
        self.model.loss(self._batch).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()


class AveragingPeer:
    """Trains and averages for ever.

    Args:
        averager: holds one tensor of the weights' shape.
    """

    def __init__(self, work: Work, steps: PaddedSteps, averager: Any, *, round_steps: int, timeout_s: float) -> None:
        self._work, self._steps, self._averager = work, steps, averager
        self._round_steps, self._timeout_s = round_steps, timeout_s
        self._control: StepControl | None = None
        self._anchor: Tensor = torch.empty_like(work.flat.theta)
        self._started_s = 0.0

    @torch.no_grad()
    def _start(self) -> StepControl:
        with self._averager.get_tensors() as (shared,):
            shared.copy_(self._work.flat.theta)
        self._anchor.copy_(self._work.flat.theta)
        self._started_s = time.monotonic()
        return self._averager.step(wait=False, timeout=self._timeout_s)

    @torch.no_grad()
    def _finish(self, control: StepControl) -> None:
        """Wait for an average, and add what it changed."""
        try:
            group = control.result(self._timeout_s)
        except Exception as error:  # hivemind raises all kinds; each is a failed average
            group = None
            tell("failed", reason=repr(error))
        if group is not None:
            with self._averager.get_tensors() as (shared,):
                self._work.flat.theta.add_(shared).sub_(self._anchor)
        tell("exchange", ok=group is not None, peers=len(group or ()), seconds=time.monotonic() - self._started_s)

    def blocking(self) -> None:
        """Stop for every average."""
        while True:
            for _ in range(self._round_steps):
                self._steps.run(self._work.step)
            self._finish(self._start())

    def delayed(self) -> None:
        """Train on while an average is under way; one that is late is waited for by the next one, not by the steps."""
        since = 0
        while True:
            self._steps.run(self._work.step)
            since += 1
            if self._control is not None and self._control.done():
                self._finish(self._control)
                self._control = None
            if self._control is None and since >= self._round_steps:
                self._control, since = self._start(), 0


def tell(event: str, **fields: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("mode", choices=("blocking", "delayed"))
    parser.add_argument("--host", required=True)
    parser.add_argument("--peer", action="append", default=[])
    parser.add_argument("--model", type=json.loads, required=True)
    parser.add_argument("--sequence-tokens", type=int, required=True)
    parser.add_argument("--step-s", type=float, required=True)
    parser.add_argument("--round-steps", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--bits-per-s", type=float, required=True)
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("--compression", choices=tuple(COMPRESSIONS), default="8bit")
    parser.add_argument("--log", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Start, wait for a line on standard input, then train until killed."""
    options = arguments()
    torch.set_num_threads(1)
    work = Work(ModelConfig(**options.model), sequence_tokens=options.sequence_tokens)
    dht = hivemind.DHT(start=True, host_maddrs=[f"/ip4/{options.host}/tcp/0"], initial_peers=options.peer)
    averager = DecentralizedAverager(
        [torch.zeros_like(work.flat.theta)],
        dht,
        start=True,
        prefix="utilisation",
        target_group_size=options.group,
        compression=COMPRESSIONS[options.compression](),
        bandwidth=options.bits_per_s / 1e6,
        allreduce_timeout=options.timeout_s,
        allow_state_sharing=False,
    )
    tell("ready", addresses=[str(address) for address in dht.get_visible_maddrs()])
    steps = PaddedSteps(options.step_s, options.log)
    peer = AveragingPeer(work, steps, averager, round_steps=options.round_steps, timeout_s=options.timeout_s)
    sys.stdin.readline()
    {"blocking": peer.blocking, "delayed": peer.delayed}[options.mode]()


if __name__ == "__main__":
    main()
