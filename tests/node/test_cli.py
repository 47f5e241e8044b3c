"""Commands that need no network, in this process."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from node.cli import app
from node.home import Home
from node.trainer import Trainer
from protocol.blobs import BlobStore
from protocol.errors import UserError
from protocol.identity import is_peer_id
from protocol.manifest import Manifest
from protocol.publication import SignedManifest
from tests.node.homes import left_home
from tests.node.runs import TINY, write_corpus

Run = tuple[SignedManifest, BlobStore]

COMMANDS = [
    ["init"],
    ["bootstrap"],
    ["join"],
    ["status"],
    ["generate"],
    ["export"],
    ["demo"],
    ["simulate"],
    ["plan"],
    ["identity"],
    ["identity", "show"],
    ["identity", "backup"],
    ["identity", "restore"],
]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: object) -> str:
    """Standard output of a command that works."""
    result = invoke(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def refused(*arguments: object) -> str:
    """The one line of a command that does not."""
    result = invoke(*arguments)
    assert isinstance(result.exception, UserError), (result.output, result.exception)
    assert "\n" not in str(result.exception)
    assert result.stdout == ""
    return str(result.exception)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


# ---- help and usage


def test_every_command_is_covered_here() -> None:
    group = typer.main.get_command(app)
    names = set(group.commands)  # type: ignore[attr-defined]
    assert names == {command[0] for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(command: list[str]) -> None:
    shown = done(*command, "--help")
    assert "Usage" in shown
    assert len(shown.splitlines()) > 5


def test_help_explains_every_field_of_the_manifest() -> None:
    shown = " ".join(done("init", "--help").split())
    for section, field in Manifest.model_fields.items():
        names = getattr(field.annotation, "model_fields", {section: None})
        assert all(name in shown for name in names), section


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert done("--version") == f"llm-node {project['version']}\n"


def test_without_a_command_the_help_is_shown() -> None:
    assert "Usage" in invoke().output


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["init", "--colour", "blue"],
        ["join", "--sequences", "-1"],
        ["join", "--rounds", "many"],
        ["status"],
        ["export"],
        ["demo", "--peers", "0"],
        ["generate", "--top-p", "0"],
        ["generate", "--max-tokens", "0"],
    ],
    ids=" ".join,
)
def test_usage_errors_are_told_by_the_option_parser(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr


# ---- init


def settings() -> list[str]:
    return [f"--set={key}={json.dumps(value)}" for key, value in TINY.items()]


def test_init_writes_a_manifest_that_can_be_read(home: Path, tmp_path: Path) -> None:
    corpus, target = write_corpus(tmp_path / "corpus"), tmp_path / "run.toml"
    common = [target, f"--home={home}", f"--data={corpus}", "--model=1m", "--heldout-tokens=512", *settings()]
    shown = done("init", *common, "--name=first")
    manifest = Manifest.from_toml(target.read_text())
    assert manifest.name == "first"
    assert manifest.sync.inner_steps == TINY["sync.inner_steps"]
    assert manifest.organiser == done("identity", "show", f"--home={home}").strip()
    assert f"llm-node bootstrap {target}" in shown
    # An existing file is only replaced on request.
    before = target.read_bytes()
    assert "--force" in refused("init", *common, "--name=second")
    assert target.read_bytes() == before
    done("init", *common, "--name=second", "--force")
    assert Manifest.from_toml(target.read_text()).name == "second"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--set=sync.alpha"], "section.field=value"),
        (["--set=alpha=0.5"], "section.field=value"),
        (["--set=sync.alpha=1.5"], "sync.alpha"),
        (["--set=sync.alpha=0.9"], "lower gamma or alpha"),
        (["--set=sync.wings=2"], "wings"),
        (["--set=ground.level=2"], "ground.level"),
        (["--model=7m"], "choose one of"),
        (["--name=Not a name"], "name"),
        (["--data=local"], "--heldout"),
    ],
)
def test_init_refuses(home: Path, tmp_path: Path, arguments: list[str], told: str) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    target = tmp_path / "run.toml"
    assert told in refused("init", target, f"--home={home}", f"--data={corpus}", "--model=1m", *settings(), *arguments)
    assert not target.exists()


def test_init_into_a_folder_that_is_not_there(home: Path, tmp_path: Path) -> None:
    corpus, target = write_corpus(tmp_path / "corpus"), tmp_path / "no" / "run.toml"
    line = refused(
        "init", target, f"--home={home}", f"--data={corpus}", "--model=1m", "--heldout-tokens=512", *settings()
    )
    assert "cannot write" in line


# ---- options of the long-running commands, refused before anything starts


@pytest.mark.parametrize("http", ["8080", "localhost", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:http", ":80"])
def test_a_malformed_http_address(home: Path, http: str) -> None:
    for command in (["join"], ["bootstrap", "run.toml"]):
        assert "HOST:PORT" in refused(*command, f"--http={http}", f"--home={home}")


def test_an_unknown_transport_of_the_demo(tmp_path: Path) -> None:
    assert "choose libp2p or memory" in refused("demo", "--transport=pigeon", f"--dir={tmp_path / 'demo'}")


def test_the_demo_never_empties_a_folder_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "--dir" in refused("demo", "--transport=memory", f"--dir={tmp_path}")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


# ---- identity


def test_an_identity_is_made_shown_backed_up_and_restored(home: Path, tmp_path: Path) -> None:
    peer = done("identity", "show", f"--home={home}").strip()
    assert is_peer_id(peer)
    assert done("identity", "show", f"--home={home}").strip() == peer
    done("identity", "backup", tmp_path / "key", f"--home={home}")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert peer in done("identity", "restore", tmp_path / "key", f"--home={tmp_path / 'other'}")
    assert done("identity", "show", f"--home={tmp_path / 'other'}").strip() == peer


def test_an_identity_is_never_overwritten(home: Path, tmp_path: Path) -> None:
    peer = done("identity", "show", f"--home={home}").strip()
    done("identity", "backup", tmp_path / "key", f"--home={home}")
    assert "exists" in refused("identity", "backup", tmp_path / "key", f"--home={home}")
    assert "exists" in refused("identity", "restore", tmp_path / "key", f"--home={home}")
    assert done("identity", "show", f"--home={home}").strip() == peer


def test_a_backup_that_is_none(home: Path, tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(bytes(68))
    assert "not a sound" in refused("identity", "restore", tmp_path / "noise", f"--home={home}")
    assert "no backup" in refused("identity", "restore", tmp_path / "nothing", f"--home={home}")
    assert "no identity" in refused("identity", "backup", tmp_path / "key", f"--home={home}")
    assert not (home / "identity.key").exists()


# ---- what a run leaves behind


@pytest.fixture
def trained(home: Path, run: Run, trainer: Trainer) -> Home:
    return left_home(home, run, trainer)


def test_generate(trained: Home) -> None:
    first = done("generate", "def main(", f"--home={trained.root}", "--max-tokens=10", "--seed=3")
    assert first.startswith("def main(")
    assert first.endswith("\n")
    assert done("generate", "def main(", f"--home={trained.root}", "--max-tokens=10", "--seed=3") == first


def test_export(trained: Home, tmp_path: Path) -> None:
    shown = done("export", tmp_path / "model", f"--home={trained.root}", "--run=tiny")
    assert "tiny after round 2" in shown
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_generate_and_export_without_a_run(home: Path, tmp_path: Path) -> None:
    assert "join one first" in refused("generate", f"--home={home}")
    assert "'other'" in refused("export", tmp_path / "model", f"--home={home}", "--run=other")
    assert not (tmp_path / "model").exists()
