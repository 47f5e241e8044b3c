"""The held-out loss of a model that nobody holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.transformer import Transformer
from node.pipeline.activations import ActivationCodec
from node.pipeline.inference import FORWARD_PROTOCOL, Inference, Request, heldout_microbatches
from node.pipeline.messages import Reply
from node.pipeline.routing import Replica, StageMap
from protocol.memory import MemoryTransport
from protocol.virtual_time import run_virtual
from protocol.wire import read_message, write_message
from tests.node.pipeline.records import peer_id
from tests.node.pipeline.stages import CONFIG, RUN, SEQUENCES, TOKENS, Pipeline, microbatches

SHAPE = (SEQUENCES, TOKENS, CONFIG.hidden_size)


def inferences(pipeline: Pipeline) -> list[Inference]:
    """One per peer, all of them knowing who holds what."""
    stages = StageMap(num_stages=pipeline.num_stages, path_length=pipeline.num_stages)
    stages.update({each.peer: Replica(stage=each.stage) for each in pipeline.peers})
    return [
        Inference(
            RUN,
            transport=each.transport,
            compute=each.compute,
            worker=each.worker,
            codec=ActivationCodec("fp32", SHAPE),
            stages=stages,
            timeout_s=2.0,
        )
        for each in pipeline.peers
    ]


def whole_loss() -> float:
    whole = Transformer(CONFIG)
    whole.load_state_dict(
        {name: p for each in Pipeline(3).peers for name, p in each.worker.stage.named_parameters()}, strict=False
    )
    with torch.no_grad():
        return float(torch.stack([whole.loss(batch) for batch in microbatches(3)]).mean())


def test_it_is_the_unsplit_models_loss_and_leaves_no_trace() -> None:
    async def story() -> None:
        async with Pipeline(3) as pipeline:
            found = await inferences(pipeline)[0].loss(microbatches(3))
            assert found == pytest.approx(whole_loss(), abs=1e-5)
            assert all(each.worker.num_tokens == 0 and not each.worker.visits for each in pipeline.peers)

    run_virtual(story())


def test_a_replica_that_hangs_or_is_gone_is_replaced_and_a_lost_stage_gives_none() -> None:
    async def story() -> None:
        async with Pipeline(3, replicas=2) as pipeline:
            origin = inferences(pipeline)[0]
            first = min(pipeline.at(1, 0), pipeline.at(1, 1), key=lambda each: each.peer)
            first.compute.stalls["_pass"] = 3600.0
            assert await origin.loss(microbatches(3)) == pytest.approx(whole_loss(), abs=1e-5)
            for replica in range(2):
                pipeline.network.crash(pipeline.at(2, replica).peer)
            assert await origin.loss(microbatches(3)) is None

    run_virtual(story())


def test_only_stage_0_may_ask() -> None:
    async def story() -> None:
        async with Pipeline(2) as pipeline, MemoryTransport(pipeline.network, peer_id(77)) as stranger:
            inferences(pipeline)
            async with await stranger.open(pipeline.at(1).peer, FORWARD_PROTOCOL) as stream:
                await write_message(stream, Request(run=RUN))
                assert await read_message(stream, Reply) == Reply(ok=False, reason="not-for-me")

    run_virtual(story())


def test_one_origin_measures_per_round_and_they_take_turns() -> None:
    async def story() -> None:
        async with Pipeline(2, replicas=3) as pipeline:
            everybody = inferences(pipeline)
            turns = [[each.is_our_turn(round) for each in everybody] for round in range(40)]
            assert all(sum(turn) == 1 for turn in turns)
            assert [any(turn[place] for turn in turns) for place in range(6)] == [True] * 3 + [False] * 3

    run_virtual(story())


def test_held_out_microbatches_lie_far_apart() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    found = heldout_microbatches(tokens, sequences=2, sequence_tokens=16)
    assert [batch.shape for batch in found] == [(2, 17)] * 4
    starts = [int(row[0]) for batch in found for row in batch]
    assert starts == sorted(set(starts))
    assert starts[-1] > 800
    assert heldout_microbatches(tokens[:10], sequences=2, sequence_tokens=16) == []
