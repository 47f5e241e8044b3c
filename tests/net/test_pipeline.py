"""Pipelines over real libp2p streams: without skips the unsplit model; and a whole run by real processes, to an exported model."""

from __future__ import annotations

import functools
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from model.transformer import Transformer
from model.weights import decode_weights
from node.demo_check import compare_with_transformers
from node.role import MEMORY_MARGIN, memory_needed
from node.training_state import model_config
from protocol.identity import Identity
from protocol.libp2p import Libp2pTransport
from protocol.manifest import Manifest
from tests.net.swarm import RUN_SETTINGS, Swarm
from tests.node.pipeline.stages import Pipeline, gradients, train_all, whole_gradients

pytestmark = pytest.mark.net
MEMORY_GIB = 0.022
"""What each peer may take: room for one stage, not for the whole model, which `join` would refuse."""
ROUNDS = 6
"""Enough iterations for a plan to be made, and to reach the bootstrap node, on a fast machine as well."""
LOCALHOST = ["/ip4/127.0.0.1/tcp/0"]


async def test_over_libp2p_the_gradients_are_the_unsplit_models(tmp_path: Path) -> None:
    transports: list[Libp2pTransport] = []
    async with AsyncExitStack() as stack:
        for number in range(3):
            folder = tmp_path / str(number)
            folder.mkdir()
            known = await transports[0].addresses() if transports else []
            transport = Libp2pTransport(
                identity=Identity.load_or_create(folder / "key"),
                runtime_dir=folder / "run",
                listen=LOCALHOST,
                initial_peers=known,
                validator=lambda *_: True,
            )
            transports.append(await stack.enter_async_context(transport))
        for one in transports:
            for other in transports:
                if other is not one:
                    await one.learn(other.peer_id, await other.addresses())
        pipeline = Pipeline(3, transports=transports, hop_timeout_s=30.0)
        losses = await train_all(pipeline, [pipeline.path(0, 1, 2)] * 4)
        expected_loss, expected = whole_gradients(4)
        assert sum(losses) / 4 == pytest.approx(expected_loss, abs=1e-5)  # type: ignore[arg-type]
        found = gradients(pipeline)
        assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-5


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("num_stages", "num_peers"), [(2, 3), pytest.param(3, 6, marks=pytest.mark.slow)], ids=["three", "six"]
)
def test_processes_train_a_model_that_none_of_them_holds(tmp_path: Path, num_stages: int, num_peers: int) -> None:
    """init, bootstrap, and joins with little memory; the bootstrap node's home exports the whole, and transformers loads it."""
    settings = RUN_SETTINGS | {
        "model.num_layers": 8,
        "model.hidden_size": 96,
        "model.num_heads": 4,
        "model.intermediate_size": 256,
        "pipeline.stages": num_stages,
        "pipeline.skip_ratio": 0.0,
        "pipeline.microbatches": 3,
        "pipeline.microbatch_sequences": 2,
        "pipeline.slots": 3,
        "sync.inner_steps": 8,
        "sync.total_rounds": ROUNDS,
        "sync.round_target_s": 5.0,
        "sync.snapshot_rounds": 1,
    }
    with Swarm(tmp_path, settings) as swarm:
        bootstrap = swarm.bootstrap()
        peers = [
            swarm.join(f"peer-{number}", f"--peer={bootstrap.address}", f"--memory={MEMORY_GIB}")
            for number in range(num_peers)
        ]
        stages = sorted(peer.wait_for("stage")["stage"] for peer in peers)
        assert stages in ([0, 0, 1], [0, 1, 1], [0, 0, 1, 1, 2, 2])
        for stage in range(num_stages):
            is_last = functools.partial(_is_archived, stage=stage, round=ROUNDS)
            bootstrap.wait_for("stage_archived", is_last)
        summaries = [peer.wait_for("summary") for peer in peers]
        outcomes = [(e["round"], e["outcome"]) for peer in peers for e in peer.events if e["event"] == "exchange"]
        assert any(summary["exchanges_ok"] for summary in summaries), outcomes
        agreed = [e["agreed"] for peer in peers for e in peer.events if e["event"] == "consolidated"]
        assert agreed == [True] * 2 * (num_peers - num_stages), "the stages with two replicas"
        losses = [e["loss"] for peer in peers for e in peer.events if e["event"] == "step" and e["loss"] is not None]
        assert losses[-1] < losses[0] - 0.3
        plan = bootstrap.wait_for("plan")
        shown = swarm.command("plan", f"--peer={bootstrap.address}")
        assert shown.returncode == 0, shown.stderr
        assert f"…{plan['planner'][-8:]}" in shown.stdout
        done = swarm.command("export", str(tmp_path / "exported"), f"--home={bootstrap.home}")
        assert done.returncode == 0, done.stderr
        found = compare_with_transformers(tmp_path / "exported", Path(bootstrap.home), "def main(")
        assert found["transformers_max_delta"] is None or found["transformers_max_delta"] < 1e-3
        refused = swarm.command("export", str(tmp_path / "nothing"), f"--home={peers[0].home}")
        assert refused.returncode != 0
        assert "export from the home of the bootstrap node" in refused.stderr
    manifest = Manifest.from_toml((tmp_path / "run.toml").read_text())
    assert memory_needed(manifest, None) * MEMORY_MARGIN > MEMORY_GIB * 2**30
    whole = Transformer(model_config(manifest))
    expected = {name: tuple(p.shape) for name, p in whole.named_parameters()}
    assert decode_weights((tmp_path / "exported" / "model.safetensors").read_bytes(), expected)


def _is_archived(event: dict[str, Any], *, stage: int, round: int) -> bool:
    return bool(event["stage"] == stage and event["round"] == round)
