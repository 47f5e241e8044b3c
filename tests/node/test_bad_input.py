"""What a user can get wrong, or a disk can do: one line on standard error, exit code 1, and nothing lost.

Addresses, ports and identities in use are in tests/net/test_bad_input.py, options of commands in test_cli.py.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import node.__main__ as program
from model.errors import DataError
from node.home import Home
from node.join import _find_manifest
from node.terminal import _run
from node.trainer import Trainer
from protocol.blobs import BlobStore
from protocol.errors import UserError
from protocol.identity import Identity
from protocol.manifest import Manifest
from protocol.publication import MANIFEST_PROTOCOL, SignedManifest
from protocol.transport import Stream
from protocol.virtual_time import run_virtual
from protocol.wire import write_frame
from tests.node.homes import checkpoint_files, flip_bit, left_home
from tests.node.runs import tiny_run
from tests.node.swarm import neighbourhood

Run = tuple[SignedManifest, BlobStore]
Refusal = Callable[..., str]
ROOT = Path(program.__file__).parents[1]
ADDRESS = f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.generate(bytes(32)).peer_id}"


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Runs the program in this process; returns the one line that it ends with."""

    def run_program(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["llm-node", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            program.main()
        line = ended.value.code
        assert isinstance(line, str), "a message makes the exit code 1"
        assert line.startswith("llm-node: ")
        assert "\n" not in line
        assert line.isprintable()
        assert capsys.readouterr() == ("", ""), "nothing else is said"
        return line

    return run_program


def separately(*arguments: object, code: str = "", path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own, after `code`, with modules from `path` first."""
    script = f"import sys; {code or 'pass'}; sys.argv[0] = 'llm-node'; from node.__main__ import main; main()"
    folders = [*([str(path)] if path else []), str(ROOT)]
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        timeout=50,
    )


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("llm-node: ")
    return line


# ---- the manifest of an organiser


@pytest.fixture
def organiser(tmp_path: Path) -> tuple[Home, Path]:
    """A home with an identity, a run and its blobs; and the run's file."""
    home = Home.at(tmp_path / "home")
    identity = Identity.load_or_create(home.identity)
    signed, store = tiny_run(tmp_path / "made")
    shutil.copytree(store.root, home.blobs)
    manifest = signed.manifest.model_copy(update={"organiser": identity.peer_id})
    path = tmp_path / "run.toml"
    path.write_text(manifest.to_toml())
    return home, path


def edit(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert text.count(old) == 1
        return text.replace(old, new)

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (edit("alpha = 0.5", "alpha = 0.5\nalhpa = 0.5"), "sync.alhpa: unknown key"),
        (edit("[safety]", "[weather]\nsun = 1\n[safety]"), "weather: unknown key"),
        (edit("alpha = 0.5", "alpha = 0.5\nalpha = 0.5"), "not valid TOML"),
        (edit("[safety]", "[sync]"), "not valid TOML"),
        (edit("num_heads = 2", "num_heads = 3"), "hidden_size 32 is not divisible by num_heads 3"),
        (edit("num_layers = 1", "num_layers = -1"), "model.num_layers"),
        (edit("hidden_size = 32", "hidden_size = 1000000000"), "model.hidden_size"),
        (edit("gamma = 0.7", "gamma = 1.6"), "sync.gamma 1.6 is outside"),
        (edit("gamma = 0.7", "gamma = nan"), "sync.gamma"),
        (edit("alpha = 0.5", 'alpha = "half"'), "sync.alpha"),
        (edit('name = "tiny"', 'name = "../tiny"'), "name"),
        (edit('name = "tiny"', 'name = "tiny'), "not valid TOML"),
        (lambda text: text + "\nx = " + "[" * 5000, "not valid TOML"),
        (lambda text: "", "Field required"),
        (edit('sha256 = "', 'sha256 = "00'), "initial_state.sha256"),
        (lambda text: text.replace("seed = 0", "seed = 1"), "initial_state.sha256 does not fit"),
        (lambda text: text.replace('index = "', 'index = "00')[: text.index("[inner]")], "data.index"),
    ],
)
def test_a_manifest_with_a_mistake(
    organiser: tuple[Home, Path], refusal: Refusal, change: Callable[[str], str], told: str
) -> None:
    home, path = organiser
    path.write_text(change(path.read_text()))
    before = path.read_bytes()
    assert told in refusal("bootstrap", path, "--home", home.root)
    assert path.read_bytes() == before
    assert home.runs() == [], "nothing was published"


def test_a_manifest_whose_data_is_not_here(organiser: tuple[Home, Path], refusal: Refusal) -> None:
    home, path = organiser
    manifest = Manifest.from_toml(path.read_text())
    (home.blobs / manifest.data.heldout).unlink()
    line = refusal("bootstrap", path, "--home", home.root)
    assert manifest.data.heldout[:12] in line
    assert "llm-node init" in line


def test_a_manifest_of_somebody_else(organiser: tuple[Home, Path], refusal: Refusal, tmp_path: Path) -> None:
    home, path = organiser
    shutil.copytree(home.blobs, tmp_path / "other" / "blobs")
    assert "organiser" in refusal("bootstrap", path, "--home", tmp_path / "other")


@pytest.mark.parametrize("kind", ["missing", "a folder", "not text"])
def test_a_manifest_that_cannot_be_read(refusal: Refusal, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run.toml"
    if kind == "a folder":
        path.mkdir()
    elif kind == "not text":
        path.write_bytes(bytes(range(256)))
    assert "llm-node init" in refusal("bootstrap", path, "--home", tmp_path / "home")


def test_it_is_one_line_in_a_real_process_too(organiser: tuple[Home, Path]) -> None:
    home, path = organiser
    path.write_text(path.read_text().replace("gamma = 0.7", "gamma = 1.9"))
    assert "lower gamma or alpha" in one_line(separately("bootstrap", path, "--home", home.root))


# ---- the manifest that a volunteer gets


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "not signed by the organiser"),
        (lambda data: data.replace(b'"alpha":0.5', b'"alpha":0.4'), "not signed by the organiser"),
        (lambda data: data[:64] + b" " + data[64:], "not in canonical form"),
        (lambda data: data[:64] + b"{}", "Field required"),
        (lambda data: data[:20], "manifest"),
        (lambda data: b"", "manifest"),
        (lambda data: data[:64] + data[64:].replace(b'"safety"', b'"sync"'), "manifest"),
        (lambda data: b"\xff\x00" * 5000, "manifest"),
    ],
)
def test_a_peer_that_sends_a_bad_manifest(
    run: Run, tmp_path: Path, damage: Callable[[bytes], bytes], told: str
) -> None:
    async def story() -> None:
        async with neighbourhood(tmp_path, 2) as (own, liar):

            async def serve(stream: Stream) -> None:
                await write_frame(stream, damage(run[0].pack()))

            liar.transport.handle(MANIFEST_PROTOCOL, serve)
            (address,) = await liar.transport.addresses()
            with pytest.raises(UserError, match=told) as caught:
                await _find_manifest(own.transport, Home.at(tmp_path / "home"), (address,), (address,))
            assert "unacceptable manifest" in str(caught.value)
            assert "\n" not in str(caught.value)

    run_virtual(story())


@pytest.mark.parametrize(
    "address", ["nonsense", "", "/ip4/1.2.3.4/tcp/1", ADDRESS.replace("/tcp/1", "/tcp/0"), "\x1b[2J\n"]
)
def test_a_malformed_peer_address(refusal: Refusal, tmp_path: Path, address: str) -> None:
    assert "is not an address" in refusal("join", "--peer", address, "--home", tmp_path)


@pytest.mark.parametrize("command", [("join", "--peer"), ("join", "--listen"), ("bootstrap", "run.toml", "--listen")])
def test_a_wrong_address_is_told_before_anything_slow_is_imported(command: tuple[str, ...]) -> None:
    tell = "import atexit; atexit.register(lambda: print({'torch', 'hivemind'} & set(sys.modules)))"
    done = separately(*command, "nonsense", code=tell)
    assert (done.returncode, done.stdout) == (1, "set()\n")
    assert "address; use one like" in done.stderr


def test_the_kept_manifest_is_damaged(run: Run, trainer: Trainer, refusal: Refusal, tmp_path: Path) -> None:
    home = left_home(tmp_path, run, trainer)
    flip_bit(home.runs()[0] / "manifest.bin")
    for command in (["generate", "x"], ["export", tmp_path / "out"]):
        line = refusal(*command, "--home", home.root)
        assert "manifest.bin is damaged" in line
        assert "--peer" in line


# ---- keys


@pytest.mark.parametrize("kind", ["garbage", "empty", "a folder", "readable by all"])
def test_an_identity_that_cannot_be_used(refusal: Refusal, tmp_path: Path, kind: str) -> None:
    home = Home.at(tmp_path)
    if kind == "a folder":
        home.identity.mkdir()
    else:
        Identity.create(home.identity)
        if kind == "readable by all":
            home.identity.chmod(0o644)
        else:
            home.identity.write_bytes(b"" if kind == "empty" else os.urandom(68))
    before = None if kind == "a folder" else home.identity.read_bytes()
    line = refusal("join", "--peer", ADDRESS, "--home", tmp_path)
    assert str(home.identity) in line
    assert refusal("identity", "show", "--home", tmp_path) == line
    assert before is None or home.identity.read_bytes() == before, "it is never overwritten"


# ---- checkpoints


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(run: Run, trainer: Trainer, tmp_path: Path) -> None:
    home = left_home(tmp_path, run, trainer)
    flip_bit(checkpoint_files(home, 2)[0])
    done = separately("export", tmp_path / "out", "--home", home.root)
    assert done.returncode == 0
    assert "after round 1" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("llm-node: warning: ")
    assert "is damaged" in line


def test_all_checkpoints_are_damaged(run: Run, trainer: Trainer, refusal: Refusal, tmp_path: Path) -> None:
    home = left_home(tmp_path, run, trainer)
    for generation in (1, 2):
        flip_bit(checkpoint_files(home, generation)[0])
    assert "move the folder away" in refusal("generate", "x", "--home", home.root)


# ---- data


@pytest.mark.parametrize("kind", ["missing", "empty", "not text"])
def test_a_data_folder_without_text(refusal: Refusal, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "data"
    if kind != "missing":
        folder.mkdir()
    if kind == "not text":
        (folder / "x.txt").write_bytes(b"\xff\xfe" * 1000)
    target = tmp_path / "run.toml"
    line = refusal("init", target, "--data", folder, "--model", "1m", "--home", tmp_path / "home")
    assert str(folder) in line
    assert not target.exists()


# ---- how errors come out of the event loop


def test_an_error_deep_inside_tasks_comes_out_alone() -> None:
    async def deep(error: Exception) -> None:
        async with asyncio.TaskGroup() as outer:
            outer.create_task(asyncio.sleep(3600))
            async with asyncio.TaskGroup() as inner:
                inner.create_task(raising(error))

    async def raising(error: Exception) -> None:
        raise error

    for error in (UserError("mend it"), DataError("mend it")):
        with pytest.raises(type(error), match=r"^mend it$"):
            _run(deep(error))


def test_a_bug_beside_an_expected_error_is_never_hidden() -> None:
    async def both() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(raising(UserError("mend it")))
            tasks.create_task(raising(ZeroDivisionError()))

    async def raising(error: Exception) -> None:
        raise error

    with pytest.raises(ExceptionGroup) as caught:
        _run(both())
    assert caught.value.subgroup(ZeroDivisionError) is not None


def test_an_interrupted_command_has_its_own_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupted() -> None:
        raise asyncio.CancelledError

    with pytest.raises(KeyboardInterrupt):
        _run(interrupted())

    def press(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("node.demo.run_demo", press)
    monkeypatch.setattr(sys, "argv", ["llm-node", "demo"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 130


# ---- the machine


@pytest.mark.parametrize("version", [(3, 10, 14), (3, 6), (2, 7, 18)])
def test_an_old_python(version: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, refusal: Refusal) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    monkeypatch.setattr(sys, "version", ".".join(map(str, version)) + " (main)")
    line = refusal("join")
    assert "Python 3.11 or newer" in line
    assert ".".join(map(str, version)) in line


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("typer", ["--help"]),
        ("rich", ["--help"]),
        ("pydantic", ["--help"]),
        ("torch", ["generate", "x"]),
        ("tokenizers", ["init", "run.toml"]),
        ("hivemind", ["join", "--peer", ADDRESS]),
        ("libp2p", ["status", "--peer", ADDRESS]),
    ],
)
def test_a_missing_package(package: str, arguments: list[str], tmp_path: Path) -> None:
    home = [] if arguments[0] in ("--help", "status") else ["--home", tmp_path]
    line = one_line(separately(*arguments, *home, code=f"sys.modules[{package!r}] = None"))
    assert f"the package {package} is missing; install it with" in line
    assert not (tmp_path / "run.toml").exists()


@pytest.fixture
def broken_wheel(tmp_path: Path) -> Path:
    """A package that is there, but was built for another machine."""
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "tokenizers.py").write_text(
        "raise ImportError('libc.so.6: version `GLIBC_2.99` not found\\n(required by it)', name='tokenizers')\n"
    )
    return tmp_path / "wheels"


def test_a_package_built_for_another_machine(broken_wheel: Path, tmp_path: Path) -> None:
    line = one_line(separately("generate", "x", "--home", tmp_path / "home", path=broken_wheel))
    assert "the package tokenizers cannot be loaded on this machine" in line
    assert "GLIBC_2.99" in line
