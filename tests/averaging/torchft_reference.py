"""Makes tests/averaging/data/torchft.json: trajectories of torchft's own DiLoCo, which test_torchft.py compares ours with.

Run by hand, where torchft is installed (`pip install torchft-nightly`, made with 2026.10.26; it is no dependency of ours):

    python -m tests.averaging.torchft_reference

torchft.local_sgd.DiLoCo runs as it is, with torch.optim.SGD as the outer optimizer, in one thread per replica. Only its Manager
(processes, quorum, transport) is replaced by one whose all-reduce takes the mean over the threads. torchft's wheel does not
hold the fixtures of its own regression test, and that test's outer step is plain SGD, so it would not show momentum.

The model is F layers of 8 weights, the inner steps are plain SGD towards a target of each replica's own.
"""

from __future__ import annotations

import importlib
import json
import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["DATA", "INNER_LR", "NUM_WEIGHTS", "SETTINGS", "start_and_targets"]

DATA = Path(__file__).parent / "data" / "torchft.json"
NUM_WEIGHTS = 8
"""Weights per layer."""
INNER_LR = 0.1
INNER_STEPS = 3
NUM_REPLICAS = 2
NUM_ROUNDS = 8
SETTINGS: dict[str, dict[str, Any]] = {
    "nesterov": {"lr": 0.7, "momentum": 0.9, "nesterov": True, "fragments": 1, "blend": 0.0},
    "heavy-ball": {"lr": 0.7, "momentum": 0.3, "nesterov": False, "fragments": 1, "blend": 0.0},
    "plain": {"lr": 1.0, "momentum": 0.0, "nesterov": False, "fragments": 1, "blend": 0.0},
    "two fragments": {"lr": 0.7, "momentum": 0.9, "nesterov": True, "fragments": 2, "blend": 0.0},
    "two fragments, blended": {"lr": 0.7, "momentum": 0.9, "nesterov": True, "fragments": 2, "blend": 0.5},
    "four fragments, blended": {"lr": 0.7, "momentum": 0.3, "nesterov": False, "fragments": 4, "blend": 0.25},
}


def start_and_targets(num_layers: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Initial weights [layers, 8] and the optimum of each replica."""
    generator = torch.Generator().manual_seed(num_layers)
    shape = num_layers, NUM_WEIGHTS
    return torch.randn(shape, generator=generator), [
        torch.randn(shape, generator=generator) for _ in range(NUM_REPLICAS)
    ]


class _Layer(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())


class _Board:
    """Where the replicas' threads meet."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(NUM_REPLICAS)
        self.tensors: list[torch.Tensor] = [torch.empty(0)] * NUM_REPLICAS


class _Done:
    def wait(self) -> None:
        pass


class _Manager:
    """What DiLoCo asks of torchft's Manager, without processes: everybody takes part in every round."""

    _use_async_quorum = False

    def __init__(self, rank: int, board: _Board) -> None:
        self._rank, self._board, self._step = rank, board, 0

    def register_state_dict_fn(self, *_args: object) -> None:
        pass

    def allow_state_dict_read(self) -> None:
        pass

    def disallow_state_dict_read(self) -> None:
        pass

    def start_quorum(self) -> None:
        pass

    def current_step(self) -> int:
        return self._step

    def should_commit(self) -> bool:
        self._step += 1
        return True

    def allreduce(self, tensor: torch.Tensor, should_quantize: bool = False) -> _Done:
        assert not should_quantize
        self._board.tensors[self._rank] = tensor.clone()
        self._board.barrier.wait()
        mean = torch.stack(self._board.tensors).mean(0)
        self._board.barrier.wait()
        tensor.copy_(mean)
        return _Done()


def trajectory(setting: dict[str, Any]) -> list[list[Any]]:
    """Weights [rounds, replicas, layers, 8] after every round."""
    diloco_class = importlib.import_module("torchft.local_sgd").DiLoCo
    num_layers = setting["fragments"]
    start, targets = start_and_targets(num_layers)
    board, result = _Board(), [[None] * NUM_REPLICAS for _ in range(NUM_ROUNDS)]

    def live(rank: int) -> None:
        layers = nn.ModuleList(_Layer(weight) for weight in start)
        inner = torch.optim.SGD(layers.parameters(), lr=INNER_LR)
        options = {name: setting[name] for name in ("lr", "momentum", "nesterov")}
        outer = [torch.optim.SGD(layer.parameters(), **options) for layer in layers]
        sync_every = INNER_STEPS * num_layers  # torchft counts one whole turn of the fragments
        with diloco_class(
            _Manager(rank, board),
            list(layers),
            inner,
            outer,
            sync_every,
            pin_memory=False,
            fragment_update_alpha=setting["blend"],
        ):
            for step in range(NUM_ROUNDS * INNER_STEPS):
                for layer, target in zip(layers, targets[rank], strict=True):
                    weight = layer.get_parameter("weight")
                    weight.grad = weight.detach() - target
                inner.step()
                if step % INNER_STEPS == INNER_STEPS - 1:
                    result[step // INNER_STEPS][rank] = [layer.get_parameter("weight").tolist() for layer in layers]  # type: ignore[call-overload]

    threads = [threading.Thread(target=live, args=(rank,)) for rank in range(NUM_REPLICAS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return result


if __name__ == "__main__":
    DATA.parent.mkdir(exist_ok=True)
    DATA.write_text(json.dumps({name: trajectory(setting) for name, setting in SETTINGS.items()}) + "\n")
