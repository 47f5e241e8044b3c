"""The [sync] section: defaults by algorithm, and combinations that can not work, each one line before anything starts."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from averaging.codec import DELTA_CODECS, SLOW_CODECS
from averaging.outer import Algorithm, OuterConfig
from averaging.replica import ReplicaConfig
from protocol.errors import UserError
from protocol.manifest import Manifest, PipelineSpec, SyncSpec, describe_fields
from protocol.sync_spec import FRAGMENT_BLOCK
from tests.protocol.samples import manifest

ALGORITHMS = get_args(SyncSpec.model_fields["algorithm"].annotation)


def from_toml(**sync: Any) -> Manifest:
    """As an organiser writes it: only what differs from the defaults."""
    text = manifest().to_toml()
    head, rest = text.split("[sync]\n")
    tail = rest[rest.index("[safety]") :]
    lines = [f"{key} = {json.dumps(value)}" for key, value in sync.items()]
    return Manifest.from_toml("\n".join([head, "[sync]", *lines, tail]))


@pytest.mark.parametrize(
    ("sync", "expected"),
    [
        ({}, {"group": "pair", "momentum": "heavy-ball", "alpha": 0.5, "beta": 0.7, "gamma": 0.7, "max_lag_rounds": 1}),
        ({"algorithm": "local"}, {"group": "none"}),
        ({"algorithm": "pair-average"}, {"group": "pair"}),
        ({"algorithm": "diloco"}, {"group": "all", "momentum": "nesterov", "alpha": 0.9, "beta": 0.7}),
        ({"algorithm": "diloco", "momentum": "heavy-ball"}, {"group": "all", "alpha": 0.3}),
        ({"algorithm": "diloco", "alpha": 0.8, "group": "pair"}, {"group": "pair", "alpha": 0.8}),
        (
            {"algorithm": "sparseloco"},
            {"group": "all", "alpha": 0.0, "beta": 1.0, "gamma": 0.0, "delta_codec": "topk", "error_decay": 0.95},
        ),
        ({"fragments": 4}, {"max_lag_rounds": 0, "blend": 0.0}),
        ({}, {"early_slow": False, "slow_codec": "lattice", "theta_only": True}),
        ({"early_slow": True}, {"slow_codec": "bf16", "theta_only": False}),
        ({"early_slow": True, "slow_codec": "q8", "algorithm": "diloco", "group": "pair"}, {"slow_codec": "q8"}),
    ],
)
def test_what_is_left_out_follows_the_algorithm_and_is_written_out(
    sync: dict[str, Any], expected: dict[str, Any]
) -> None:
    original = from_toml(**sync)
    written = json.loads(original.canonical())["sync"]
    assert {key: written[key] for key in expected} == expected
    assert set(written) == set(SyncSpec.model_fields)
    assert Manifest.from_canonical(original.canonical()) == original
    assert Manifest.from_toml(original.to_toml()) == original


def test_a_default_that_is_left_out_of_the_canonical_form_is_refused() -> None:
    fields = json.loads(from_toml(algorithm="sparseloco").canonical())
    del fields["sync"]["gamma"]
    with pytest.raises(UserError, match="canonical"):
        Manifest.from_canonical(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())


@pytest.mark.parametrize(
    ("sync", "reason"),
    [
        ({"gamma": 1.5}, "lower gamma or alpha"),
        ({"algorithm": "diloco", "gamma": 2.0}, "below 2 for diloco"),
        ({"algorithm": "sparseloco", "gamma": 2.5}, "below 2 for sparseloco"),
        ({"algorithm": "diloco", "group": "pair", "gamma": 0.0}, "in pairs needs sync.gamma > 0"),
        ({"algorithm": "sparseloco", "group": "pair"}, "in pairs needs sync.gamma > 0"),
        ({"momentum": "nesterov"}, "nesterov is diloco's"),
        ({"algorithm": "sparseloco", "momentum": "nesterov"}, "nesterov is diloco's"),
        ({"algorithm": "sparseloco", "alpha": 0.5}, "has no outer momentum"),
        ({"algorithm": "pair-average", "momentum_clip": 1.0}, "has no outer momentum"),
        ({"algorithm": "pair-average", "theta_only": True}, "form of noloco"),
        ({"theta_only": True, "gamma": 0.5}, "set sync.gamma to 0.7"),
        ({"algorithm": "local", "group": "pair"}, "leave group out"),
        ({"group": "none"}, "leave group out"),
        ({"blend": 0.5}, "needs sync.fragments > 1"),
        ({"algorithm": "local", "fragments": 2}, "local, which exchanges nothing"),
        ({"fragments": 2, "max_lag_rounds": 1}, "max_lag_rounds must be 0"),
        ({"fragments": 4, "total_rounds": 10}, "must be a multiple of sync.fragments 4"),
        ({"fragments": 64}, "too many for"),
        ({"fragment_choice": "random"}, "needs sync.fragments > 1"),
        ({"fragments": 2, "fragment_choice": "random", "theta_only": False}, "needs pair-average"),
        ({"fragments": 2, "fragment_choice": "random", "algorithm": "diloco"}, "needs pair-average"),
        (
            {"fragments": 2, "fragment_choice": "random", "algorithm": "pair-average", "group": "all"},
            "in pairs; set it to turn",
        ),
        ({"fragments": 2, "fragment_choice": "random", "max_lag_rounds": 1}, "max_lag_rounds must be 0"),
        ({"fragments": 2, "fragment_choice": "often"}, "sync.fragment_choice"),
        ({"early_slow": True, "theta_only": True}, "needs pairs that exchange φ apart from Δ"),
        ({"early_slow": True, "algorithm": "pair-average"}, "needs pairs that exchange φ apart from Δ"),
        ({"early_slow": True, "algorithm": "diloco"}, "needs pairs that exchange φ apart from Δ"),
        ({"early_slow": True, "algorithm": "local"}, "needs pairs that exchange φ apart from Δ"),
        ({"early_slow": True, "slow_codec": "lattice"}, "take bf16"),
        ({"algorithm": "diloco", "slow_codec": "lattice"}, "lattice would move the equal replicas of diloco"),
        ({"algorithm": "sparseloco", "gamma": 0.5, "slow_codec": "lattice"}, "take bf16"),
        ({"delta_codec": "lattice"}, "sync.delta_codec"),
        ({"delta_codec": "zip"}, "sync.delta_codec"),
        ({"slow_codec": "topk"}, "sync.slow_codec"),
        ({"slow_codec": "e3m0"}, "sync.slow_codec"),
        ({"fragments": 0}, "sync.fragments"),
        ({"fragments": 2, "blend": 1.0}, "sync.blend"),
        ({"fragments": "2"}, "sync.fragments"),
        ({"group": "everyone"}, "sync.group"),
        ({"algorithm": ["noloco"]}, "sync.algorithm"),
        ({"staleness_penalty": 0.0}, "sync.staleness_penalty"),
        ({"momentum_clip": -1.0}, "sync.momentum_clip"),
        ({"lag_decay": 0.0}, "sync.lag_decay"),
        ({"error_decay": 1.5}, "sync.error_decay"),
    ],
)
def test_what_can_not_work_is_one_line(sync: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as error:
        from_toml(**sync)
    assert reason in str(error.value)
    assert str(error.value).isprintable()


def test_the_smallest_stage_must_hold_the_fragments() -> None:
    """Each stage is a vector of its own, and those without embedding and head are smaller."""
    shape = manifest().model
    fragments = shape.num_parameters // FRAGMENT_BLOCK
    fields = {name: getattr(manifest(), name) for name in Manifest.model_fields}
    fields["sync"] = SyncSpec(fragments=fragments)
    Manifest(**fields)
    with pytest.raises(ValueError, match="of the smallest stage, of which a fragment"):
        Manifest(**fields | {"pipeline": PipelineSpec(stages=2)})


def test_the_same_codecs_and_algorithms_are_known_everywhere() -> None:
    fields = SyncSpec.model_fields
    assert get_args(fields["delta_codec"].annotation) == DELTA_CODECS
    assert get_args(fields["slow_codec"].annotation) == SLOW_CODECS
    assert get_args(Algorithm) == ALGORITHMS


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_the_manifest_takes_the_replica_takes(algorithm: str) -> None:
    sync = from_toml(algorithm=algorithm).sync
    outer = OuterConfig(
        algorithm=sync.algorithm, momentum=sync.momentum, alpha=sync.alpha, beta=sync.beta, gamma=sync.gamma
    )
    config = ReplicaConfig(outer=outer, delta_codec=sync.delta_codec, slow_codec=sync.slow_codec)
    assert (sum(config.payload_bytes(10_000)) > 0) == (algorithm != "local")


def test_new_fields_are_explained() -> None:
    text = describe_fields()
    for name in SyncSpec.model_fields:
        assert f"`{name}`" in text
