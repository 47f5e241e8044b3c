"""The final state of a stage on its way to whoever collects the whole model, before its last holders are gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from node.pipeline.rebuild import ask_kept
from node.service import Service
from protocol.manifest import Manifest

__all__ = ["hand_over"]

HANDOVER_S = 12.0
"""A few heartbeats: one for the record, one for the copies and their votes, one for the archive."""
HANDOVER_BYTES_PER_S, MAX_HANDOVER_S = 250_000.0, 1800.0
"""And as long as a slow line takes, while a bootstrap node has an older state."""
LOOK_AGAIN_S = 2.0


async def hand_over(
    stage: int, *, manifest: Manifest, num_parameters: int, service: Service, publish: Callable[[], Awaitable[None]]
) -> None:
    """Publish the stage's final state, and stay until others have had the time to fetch it: nobody else holds it.

    Args:
        stage: which.
        num_parameters: of the stage.
        publish: makes the snapshot and tells of it in this peer's record.
    """
    loop = asyncio.get_running_loop()
    most_s = min(HANDOVER_S + 4 * num_parameters / HANDOVER_BYTES_PER_S, MAX_HANDOVER_S)
    service.events.emit("handing_over", stage=stage, seconds=round(most_s, 1))
    await publish()
    await service.beat()
    ends_at_s = loop.time() + most_s
    await asyncio.sleep(HANDOVER_S)
    while loop.time() < ends_at_s and await _is_awaited(stage, manifest=manifest, service=service):
        await service.beat()
        await asyncio.sleep(LOOK_AGAIN_S)


async def _is_awaited(stage: int, *, manifest: Manifest, service: Service) -> bool:
    """Whether a bootstrap node does not have the stage's final state yet."""
    nodes = [peer for peer, record in service.directory.peers.items() if record.role == "bootstrap"]
    asked = [ask_kept(peer, stage=stage, run=manifest.run_id, transport=service.transport) for peer in nodes]
    kept = await asyncio.gather(*asked)
    return any(ref is not None and ref.round < manifest.sync.total_rounds for ref in kept)
