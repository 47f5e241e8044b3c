"""What a run leaves behind: samples and an exported folder, and every way in which it may be incomplete."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.errors import CheckpointError
from node.artifacts import load_run, load_trained
from node.home import Home, keep_manifest
from node.trainer import Trainer
from protocol.blobs import BlobStore
from protocol.errors import UserError
from protocol.publication import SignedManifest
from tests.node.homes import checkpoint_files, flip_bit, left_home
from tests.node.runs import ORGANISER

Run = tuple[SignedManifest, BlobStore]


@pytest.fixture
def home(tmp_path: Path, run: Run, trainer: Trainer) -> Home:
    """A home with two checkpoints of the tiny run."""
    return left_home(tmp_path / "home", run, trainer)


def sample(home: Home, prompt: str = "def ", **changes: float) -> str:
    options = {"max_tokens": 20, "temperature": 0.8, "top_p": 0.95, "seed": 0} | changes
    return "".join(load_trained(home, None).sample(prompt, **options))  # type: ignore[arg-type]  # ints where ints belong


def test_the_newest_slow_weights_are_loaded(home: Home, trainer: Trainer) -> None:
    trained = load_trained(home, None)
    assert trained.round == 2
    mine = torch.cat([p.detach().reshape(-1) for p in trained.model.parameters()])
    assert torch.equal(mine, trainer.replica.phi)


def test_samples_depend_on_the_seed_alone(home: Home) -> None:
    assert sample(home) == sample(home)
    assert sample(home) != sample(home, seed=1)
    assert sample(home, temperature=0.0) == sample(home, temperature=0.0, seed=1)


def test_samples_end_after_so_many_tokens(home: Home) -> None:
    trained = load_trained(home, None)
    pieces = list(trained.sample("x", max_tokens=30, temperature=1.5, top_p=1.0, seed=3))
    assert 0 < len(pieces) <= 30
    assert not any(piece.endswith("\N{REPLACEMENT CHARACTER}") for piece in pieces), "no piece ends inside a character"


@pytest.mark.parametrize("prompt", ["", "ü€\N{GRINNING FACE}", "\0", "x" * 5000], ids=["empty", "wide", "zero", "long"])
def test_any_prompt_will_do(home: Home, prompt: str) -> None:
    assert isinstance(sample(home, prompt), str)


def test_the_export_is_the_model(home: Home, tmp_path: Path) -> None:
    trained = load_trained(home, None)
    trained.export(tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(exported[name], p) for name, p in trained.model.named_parameters())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 32
    trained.export(tmp_path / "out")  # again, over the old one


def test_an_export_that_cannot_be_written(home: Home, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((UserError, CheckpointError), match="another folder"):
        load_trained(home, None).export(tmp_path / "file")


# ---- choosing the run


def test_a_run_is_named_by_its_name_or_id(home: Home, run: Run) -> None:
    manifest = run[0].manifest
    for name in (None, "tiny", manifest.run_id, manifest.run_id[:8]):
        assert load_run(home, name)[0] == manifest
    for name in ("tin", "ffff", ""):
        if not manifest.run_id.startswith(name):
            with pytest.raises(UserError, match="no run"):
                load_run(home, name)


def test_two_runs_of_one_name_are_told_apart(home: Home, run: Run) -> None:
    other = SignedManifest.sign(
        run[0].manifest.model_copy(update={"inner": run[0].manifest.inner.model_copy(update={"lr": 0.5})}), ORGANISER
    )
    keep_manifest(home.run(other.manifest.run_id), other)
    with pytest.raises(UserError, match=f"several runs.*{other.manifest.run_id[:12]}"):
        load_run(home, "tiny")
    assert load_run(home, other.manifest.run_id)[0] == other.manifest
    assert load_run(home, run[0].manifest.run_id)[0] == run[0].manifest


def test_no_run_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run in .*join one first"):
        load_run(Home.at(tmp_path), None)


def test_a_damaged_manifest_is_no_obstacle_to_other_runs(home: Home, run: Run) -> None:
    broken = home.root / "runs" / ("ab" * 32)
    broken.mkdir()
    (broken / "manifest.bin").write_bytes(b"garbage")
    assert load_run(home, None)[0] == run[0].manifest
    shutil.rmtree(home.root / "runs" / run[0].manifest.run_id)
    with pytest.raises(UserError, match="damaged"):
        load_run(home, None)


# ---- damage


@pytest.mark.parametrize("which", [0, 1], ids=["weights", "description"])
@pytest.mark.parametrize(
    "damage",
    [flip_bit, lambda path: path.write_bytes(path.read_bytes()[:-9]), lambda path: path.write_bytes(b""), Path.unlink],
    ids=["flipped", "truncated", "emptied", "lost"],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    home: Home, which: int, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    damage(checkpoint_files(home, 2)[which])
    with caplog.at_level(logging.WARNING):
        assert load_trained(home, None).round == 1
    assert len(caplog.records) == 1, "and it is said"
    assert "checkpoint 2" in str(vars(caplog.records[0])["reason"])


def test_a_checkpoint_that_cannot_be_read_gives_way_too(home: Home) -> None:
    weights = checkpoint_files(home, 2)[0]
    weights.unlink()
    weights.mkdir()
    assert load_trained(home, None).round == 1


def test_when_all_are_damaged_it_says_so_in_one_line(home: Home) -> None:
    for generation in (1, 2):
        flip_bit(checkpoint_files(home, generation)[0])
    with pytest.raises(UserError, match=r"no checkpoint .* is whole .*move the folder away") as caught:
        load_trained(home, None)
    assert "\n" not in str(caught.value)


def test_no_checkpoint_yet(tmp_path: Path, run: Run, trainer: Trainer) -> None:
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_trained(left_home(tmp_path, run, trainer, num_checkpoints=0), None)


def test_a_checkpoint_of_another_model(home: Home, run: Run) -> None:
    """The folder was copied by hand to another run's."""
    spec = run[0].manifest.model.model_copy(update={"num_layers": 2})
    other = SignedManifest.sign(run[0].manifest.model_copy(update={"model": spec}), ORGANISER)
    keep_manifest(home.run(other.manifest.run_id), other)
    target = home.root / "runs" / other.manifest.run_id / "checkpoints"
    shutil.copytree(home.root / "runs" / run[0].manifest.run_id / "checkpoints", target)
    with pytest.raises(UserError, match="does not fit"):
        load_trained(home, other.manifest.run_id)


@pytest.mark.parametrize("is_there", [True, False], ids=["damaged", "lost"])
def test_the_tokenizer_is_damaged_or_lost(home: Home, run: Run, is_there: bool) -> None:
    path = BlobStore(home.blobs).path(run[0].manifest.tokenizer_blob)
    if is_there:
        flip_bit(path)
    else:
        path.unlink()
    with pytest.raises(UserError, match="fetch it") as caught:
        load_trained(home, None)
    assert "\n" not in str(caught.value)
