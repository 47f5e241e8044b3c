"""Keys, ids and signatures: libp2p's own vectors, the file's mode, and what happens when files are bad."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import UserError
from protocol.identity import Identity, backup, hold_identity, is_peer_id, restore, verify
from protocol.ids import PeerId
from tests.protocol.samples import damaged, identity

# https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md, "Test vectors"
SPEC_PRIVATE = bytes.fromhex(
    "080112407e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
)
SPEC_PEER_ID = "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert text.isprintable()
    assert text
    return text


def test_the_specification_s_key_file_and_peer_id(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_bytes(SPEC_PRIVATE)
    loaded = Identity.load(path)
    assert loaded.peer_id == SPEC_PEER_ID
    backup(path, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == SPEC_PRIVATE


@pytest.mark.net
def test_hivemind_reads_the_key_file_and_finds_the_same_peer_id(tmp_path: Path) -> None:
    """In a process of its own: it must not be imported beside the light client's libp2p."""
    own = Identity.create(tmp_path / "key")
    program = (
        "import sys, base58\n"
        "from hivemind.proto import crypto_pb2\n"
        "from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID\n"
        "key = crypto_pb2.PrivateKey.FromString(open(sys.argv[1], 'rb').read())\n"
        "public = crypto_pb2.PublicKey(key_type=key.key_type, data=key.data[32:]).SerializeToString()\n"
        "print(PeerID(b'\\x00' + bytes([len(public)]) + public).to_base58())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(own.path)], capture_output=True, text=True, timeout=50, check=True
    )
    assert result.stdout.split()[-1] == own.peer_id


def test_sign_and_verify() -> None:
    a, b = identity(1), identity(2)
    signature = a.sign("record", b"data")
    assert verify(a.peer_id, "record", b"data", signature)
    assert not verify(b.peer_id, "record", b"data", signature)
    assert not verify(a.peer_id, "manifest", b"data", signature)
    assert not verify(a.peer_id, "record", b"datA", signature)
    assert not verify(a.peer_id, "record", b"data", signature[:-1] + bytes([signature[-1] ^ 1]))
    assert not verify(a.peer_id, "record", b"data", signature + b"\0")


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(peer=st.text(max_size=60) | st.from_regex(r"12D3KooW[1-9A-HJ-NP-Za-km-z]{44}", fullmatch=True), data=st.binary())
def test_verify_never_raises(peer: str, data: bytes) -> None:
    assert not verify(PeerId(peer), "record", data, data[:64].ljust(64, b"\1"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12D3KooW",
        SPEC_PEER_ID + "1",
        SPEC_PEER_ID[:-1],
        SPEC_PEER_ID + "\n",
        " " + SPEC_PEER_ID,
        SPEC_PEER_ID.lower(),
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",  # an RSA key's
        "12D3KooW" + "1" * 44,
        "12D3KooW" + "z" * 44,
        "1" * 100_000,
    ],
)
def test_what_is_no_peer_id(text: str) -> None:
    assert not is_peer_id(text)


def test_generate_is_determined_by_the_seed() -> None:
    assert Identity.generate(bytes(32)) == Identity.generate(bytes(32))
    assert Identity.generate() != Identity.generate()
    assert is_peer_id(Identity.generate().peer_id)


def test_the_key_is_not_shown() -> None:
    assert "Private" not in repr(Identity.generate())


def test_created_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    for umask in (0o000, 0o077):
        path = tmp_path / f"{umask:o}" / "deep" / "identity.key"
        path.parent.parent.mkdir()
        old = os.umask(umask)
        try:
            created = Identity.create(path)
        finally:
            os.umask(old)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert Identity.load(path) == created == Identity.load_or_create(path)


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    first = Identity.load_or_create(path)
    with pytest.raises(UserError) as error:
        Identity.create(path)
    assert "never overwritten" in one_line(error)
    assert Identity.load(path) == first


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    Identity.create(path)
    path.chmod(0o644)
    with pytest.raises(UserError) as error:
        Identity.load_or_create(path)
    assert f"chmod 600 {path}" in one_line(error)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(data=damaged(SPEC_PRIVATE))
def test_a_damaged_key_file_is_a_user_error(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("key") / "key"
    path.touch(0o600)
    path.write_bytes(data)
    if data == SPEC_PRIVATE:
        return
    with pytest.raises(UserError) as error:
        Identity.load_or_create(path)
    assert "backup" in one_line(error)
    assert path.read_bytes() == data


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        Identity.load(tmp_path / "none")
    assert "no identity" in one_line(error)
    with pytest.raises(UserError) as error:
        Identity.load(tmp_path)
    assert "can not read" in one_line(error)
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as error:
        Identity.load_or_create(tmp_path / "file" / "key")
    one_line(error)


def test_backup_and_restore(tmp_path: Path) -> None:
    own = Identity.create(tmp_path / "home" / "key")
    assert own.path is not None
    assert backup(own.path, tmp_path / "stick" / "key.bak") == own.peer_id
    (tmp_path / "stick" / "key.bak").chmod(0o777)
    restored = tmp_path / "new" / "key"
    assert restore(tmp_path / "stick" / "key.bak", restored) == own.peer_id
    assert Identity.load(restored).peer_id == own.peer_id
    assert stat.S_IMODE(restored.stat().st_mode) == 0o600


def test_backup_and_restore_refuse_to_overwrite_and_bad_keys(tmp_path: Path) -> None:
    path, other = tmp_path / "key", tmp_path / "other"
    Identity.create(path)
    Identity.create(other)
    before = other.read_bytes()
    for action in (backup, restore):
        with pytest.raises(UserError) as error:
            action(path, other)
        assert "never overwritten" in one_line(error)
    assert other.read_bytes() == before
    with pytest.raises(UserError) as error:
        restore(tmp_path / "none", tmp_path / "new")
    assert "no backup" in one_line(error)
    (tmp_path / "bad").write_bytes(b"not a key")
    with pytest.raises(UserError) as error:
        restore(tmp_path / "bad", tmp_path / "new")
    assert "not a sound" in one_line(error)
    assert not (tmp_path / "new").exists()


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "home" / "key"
    with hold_identity(path):
        with pytest.raises(UserError) as error, hold_identity(path):
            pass
        assert "another process" in one_line(error)
    with hold_identity(path):
        pass


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "key"
    program = (
        "import os, sys, pathlib\n"
        "from protocol.identity import hold_identity\n"
        "with hold_identity(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    os._exit(1)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError), hold_identity(path):
            pass
        process.communicate("\n", timeout=30)
    with hold_identity(path):
        pass
