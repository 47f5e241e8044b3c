"""Small planning problems for the tests."""

from __future__ import annotations

import random
from typing import Any

from node.pipeline.case import Case

__all__ = ["drawn_case", "drawn_document"]


def drawn_document(seed: int, **fields: Any) -> dict[str, Any]:
    """A problem of some ten nodes in three to five stages, as decoded JSON."""
    rng = random.Random(seed)
    num_stages = rng.randint(3, 5)
    size = rng.randint(2, 3)
    stage_sizes = [size] * num_stages
    num_nodes = sum(stage_sizes)
    document = {
        "name": f"drawn {seed}",
        "num_nodes": num_nodes,
        "stage_sizes": stage_sizes,
        "path_length": num_stages - 1,
        "slots_per_node": rng.randint(1, 3),
        "rounds": rng.randint(1, 2),
        "forward_s": [round(rng.uniform(0.5, 3.0), 2) for _ in range(num_nodes)],
        "backward_multiplier": 1.5,
        "loss_multiplier": 0.25,
        "gap_s": 0.13,
        "gap_first_s": 0.09,
        "link_s": [
            [0.0 if a == b else round(rng.uniform(0.1, 2.0), 2) for b in range(num_nodes)] for a in range(num_nodes)
        ],
    }
    return document | fields


def drawn_case(seed: int, **fields: Any) -> Case:
    """The same, validated."""
    return Case.model_validate(drawn_document(seed, **fields))
