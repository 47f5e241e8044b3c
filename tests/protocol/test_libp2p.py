"""The real transport: its addresses, its processes and its files."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import uvloop

from protocol.errors import StreamClosedError, UserError
from protocol.identity import Identity
from protocol.libp2p_addresses import check_port_is_free, dialable, split_address, with_known_port
from protocol.libp2p_hivemind import P2PDaemonError, PeerID, dht_pb2
from protocol.transport import Stream
from tests.protocol.eventually import eventually
from tests.protocol.nodes import answers, transport_in, victim
from tests.protocol.victim import ECHO

ROOT = Path(__file__).parents[2]
PEER = Identity.generate(b"\1" * 32).peer_id
net = pytest.mark.net


def daemon_process(folder: Path) -> psutil.Process:
    return psutil.Process(int((folder / "run" / "p2pd.pid").read_text().split()[0]))


# ---- addresses ----


def test_only_dialable_addresses_are_shown() -> None:
    own = [
        "/ip4/127.0.0.1/tcp/1",
        "/ip4/0.0.0.0/tcp/1",
        "/ip4/192.0.2.7/tcp/1",
        "/ip4/192.0.2.7/udp/1/quic-v1",
        "/ip6/::1/tcp/1",
    ]
    assert dialable(own, PEER) == [f"/ip4/192.0.2.7/tcp/1/p2p/{PEER}"]
    assert dialable(own[:2], PEER) == [f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}"]
    relay = f"/dns4/relay.example/tcp/4001/p2p/{PEER}/p2p-circuit"
    assert dialable([*own, relay], PEER)[-1] == f"{relay}/p2p/{PEER}"


@pytest.mark.parametrize(
    "address",
    [
        f"/ip4/1.2.3.4/tcp/70000/p2p/{PEER}",
        f"/ip4/1.2.3.4/tcp/0/p2p/{PEER}",
        f"/ip4/1.2.3.400/tcp/1/p2p/{PEER}",
        f"/ip6/1.2.3.4/tcp/1/p2p/{PEER}",
        f"/ip4/1.2.3.4/udp/1/quic-v1/p2p/{PEER}",
        f"/ip4/1.2.3.4/tcp/1/p2p/{PEER[:-1]}",
        f"/unix/tmp/x/p2p/{PEER}",
        f"/ip4/1.2.3.4/tcp/1/p2p/{PEER}\n",
    ],
)
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(UserError):
        split_address(address)


def test_a_restart_keeps_the_port_it_got() -> None:
    actual = ["/ip4/192.0.2.7/tcp/4567", "/ip6/2001:db8::1/tcp/4568"]
    assert with_known_port("/ip4/0.0.0.0/tcp/0", actual) == "/ip4/0.0.0.0/tcp/4567"
    assert with_known_port("/ip6/::/tcp/0", actual) == "/ip6/::/tcp/4568"
    assert with_known_port("/ip4/0.0.0.0/tcp/9", actual) == "/ip4/0.0.0.0/tcp/9"


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} .*choose another port"):
            check_port_is_free(f"/ip4/127.0.0.1/tcp/{port}")
    check_port_is_free(f"/ip4/127.0.0.1/tcp/{port}")


# ---- processes and files ----


@net
async def test_nothing_is_left_after_the_end(tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    num_files = psutil.Process().num_fds()
    async with transport_in(tmp_path) as transport:
        assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700
        daemon = daemon_process(tmp_path)
        assert daemon.is_running()
        assert await transport.addresses()
    assert not daemon.is_running()
    assert set(psutil.Process().children(recursive=True)) == before
    assert list((tmp_path / "run").glob("*.sock")) == []
    assert psutil.Process().num_fds() <= num_files + 2  # asyncio's own, made on first use


@net
@pytest.mark.parametrize("num_ticks", range(4))
async def test_a_stream_that_comes_in_at_the_very_end_is_closed(tmp_path: Path, num_ticks: int) -> None:
    async with transport_in(tmp_path):
        late = socket.socket(socket.AF_UNIX)
        late.connect(str(tmp_path / "run" / "streams.sock"))
        for _ in range(num_ticks):  # from not even accepted to handed to a task that has not begun
            await asyncio.sleep(0)
    late.settimeout(5)
    with late:
        assert late.recv(1) == b""


@net
async def test_every_way_out_of_a_failed_start_is_clean(tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=str(port)):
            await transport_in(tmp_path, listen=[f"/ip4/127.0.0.1/tcp/{port}"]).__aenter__()
    async with transport_in(tmp_path) as running:
        with pytest.raises(UserError, match="another node runs"):
            await transport_in(tmp_path).__aenter__()
        assert await running.addresses()
        port = int(split_address((await running.addresses())[0])[0].rsplit("/", 1)[1])
        with pytest.raises(UserError, match=str(port)):  # p2pd alone would share it
            await transport_in(tmp_path / "second", listen=[f"/ip4/127.0.0.1/tcp/{port}"]).__aenter__()
    with pytest.raises(UserError, match="shorter"):
        await transport_in(tmp_path / ("long" * 30)).__aenter__()
    assert set(psutil.Process().children(recursive=True)) == before


@net
def test_p2pd_dies_with_its_parent(tmp_path: Path) -> None:
    with victim(tmp_path) as (process, _, daemon):
        assert daemon.is_running()
        process.send_signal(signal.SIGKILL)
        process.wait()
        daemon.wait(timeout=5)


@net
async def test_what_a_crash_left_behind_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "control.sock").touch()
    stale = await asyncio.create_subprocess_exec("sleep", "100")
    other = await asyncio.create_subprocess_exec("sleep", "100")
    pid_file = tmp_path / "run" / "p2pd.pid"
    pid_file.write_text(f"{stale.pid} {psutil.Process(stale.pid).create_time()!r}")
    async with transport_in(tmp_path):
        assert await stale.wait() == -signal.SIGKILL
    pid_file.write_text(f"{other.pid} 12345.0")  # the number has gone to another process since
    async with transport_in(tmp_path):
        assert other.returncode is None
    other.kill()
    assert await other.wait() == -signal.SIGKILL


@net
async def test_a_killed_p2pd_is_back_within_two_seconds(tmp_path: Path) -> None:
    async with transport_in(tmp_path / "a") as a:
        invitation = await a.addresses()
        async with transport_in(tmp_path / "b", initial_peers=invitation) as b:
            assert await answers(b, a.peer_id)
            stream = await b.open(a.peer_id, ECHO)
            daemon_process(tmp_path / "a").kill()
            with pytest.raises(StreamClosedError):
                await stream.read_exactly(1)
            await stream.close()

            async def is_back() -> bool:
                return a.daemon.num_respawns == 1

            await eventually(is_back, timeout_s=2.0)
            assert await a.addresses() == invitation  # same identity, same port
            assert await answers(b, a.peer_id)

            async def shares_the_table_again() -> bool:
                return await b.dht.store("run/x", "me", b"me", ttl_s=60) and bool(await a.dht.get("run/x"))

            await eventually(shares_the_table_again, timeout_s=10)


@net
async def test_a_newcomer_joins_through_peers_that_are_not_up_yet(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    first = transport_in(tmp_path / "a", listen=[f"/ip4/127.0.0.1/tcp/{port}"])
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{first.peer_id}"
    async with transport_in(tmp_path / "b", initial_peers=[address]) as second:
        assert second.dht.num_neighbours == 0

        async def has_joined() -> bool:
            return second.dht.num_neighbours > 0

        async with first:
            await eventually(has_joined, timeout_s=15)
            assert await answers(second, first.peer_id)


@net
async def test_listening_everywhere_shows_real_addresses(tmp_path: Path) -> None:
    async with transport_in(tmp_path, listen=["/ip4/0.0.0.0/tcp/0"]) as transport:
        shown = await transport.addresses()
    assert shown
    assert all("/0.0.0.0/" not in address and "/tcp/" in address for address in shown)
    has_network = any(
        not info.address.startswith("127.")
        for name, infos in psutil.net_if_addrs().items()
        for info in infos
        if info.family == socket.AF_INET and psutil.net_if_stats()[name].isup
    )
    assert has_network == all("/127." not in address for address in shown)


@net
def test_it_runs_under_uvloop(tmp_path: Path) -> None:
    async def scenario() -> None:
        async def swallow(stream: Stream) -> None:
            await stream.read_exactly(16 << 20)
            await stream.write(b"k")

        async with transport_in(tmp_path / "a") as a:
            a.handle("/llm-node/sink/1", swallow)
            async with transport_in(tmp_path / "b", initial_peers=await a.addresses()) as b:
                async with await b.open(a.peer_id, "/llm-node/sink/1") as stream:
                    await stream.write(bytes(16 << 20))
                    assert await stream.read_exactly(1) == b"k"
                assert await b.dht.store("run/x", "me", b"me", ttl_s=60)
                assert len(await a.dht.get("run/x")) == 1
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())


@net
async def test_calls_under_way_fail_when_p2pd_dies(tmp_path: Path) -> None:
    async with transport_in(tmp_path) as transport:
        call = asyncio.ensure_future(
            transport.daemon.call_protobuf_handler(
                PeerID.from_base58(PEER), "DHTProtocol.rpc_ping", dht_pb2.PingRequest(), dht_pb2.PingResponse
            )
        )
        os.kill(daemon_process(tmp_path).pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            with pytest.raises(P2PDaemonError):
                await call


def test_importing_the_transport_is_silent() -> None:
    code = "import logging, protocol.libp2p; assert logging.getLevelName(30) == 'WARNING', logging.getLevelName(30)"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@net
async def test_a_relay_starts_and_serves(tmp_path: Path) -> None:
    async with (
        transport_in(tmp_path / "relay", relay_service=True) as relay,
        transport_in(tmp_path / "peer", initial_peers=await relay.addresses()) as peer,
    ):
        assert await answers(peer, relay.peer_id)
