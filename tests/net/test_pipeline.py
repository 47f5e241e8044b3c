"""Microbatches over real libp2p streams: a pipeline without skips is the unsplit model."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from protocol.identity import Identity
from protocol.libp2p import Libp2pTransport
from tests.node.pipeline.stages import Pipeline, gradients, train_all, whole_gradients

pytestmark = pytest.mark.net
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
