"""The page's server over real sockets on loopback: what it answers, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from bootstrap.document import parse_document
from bootstrap.summary import swarm_status
from bootstrap.web import CONTENT_SECURITY_POLICY, MAX_HEADER_BYTES, serve_web
from protocol.errors import UserError
from tests.bootstrap.samples import NOW_S, busy_store, document_of, manifest, peer_id, record

pytestmark = pytest.mark.net

DOCUMENT = document_of(record(1, name="<img src=x onerror=alert(1)>", val_loss=3.0, val_round=7), record(2))


@pytest_asyncio.fixture
async def url() -> AsyncIterator[str]:
    async with serve_web("127.0.0.1", 0, lambda: DOCUMENT, event_interval_s=0.05, header_timeout_s=0.3) as address:
        yield address


async def _raw(url: str, data: bytes) -> bytes:
    host, port = url.removeprefix("http://").rstrip("/").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    try:
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        writer.close()


async def test_status_is_the_document(url: str) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{url}api/v1/status") as response:
        assert response.status == 200
        assert response.content_type == "application/json"
        assert "Access-Control-Allow-Origin" not in response.headers
        assert parse_document(await response.read()) == DOCUMENT


@pytest.mark.parametrize(
    "path", ["", "static/app.js", "static/nothing.js", "api/v1/status", "api/v1/events", "metrics", "nowhere"]
)
async def test_every_answer_carries_the_policy(url: str, path: str) -> None:
    async with aiohttp.ClientSession() as session, session.get(url + path) as response:
        assert response.status == (404 if "no" in path else 200)
        assert response.headers["Content-Security-Policy"] == CONTENT_SECURITY_POLICY
        assert response.headers["X-Content-Type-Options"] == "nosniff"


async def test_every_static_file_is_served_and_revalidated(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        for file in files("bootstrap.static").iterdir():
            if file.name.startswith("__"):
                continue
            path = url if file.name == "index.html" else f"{url}static/{file.name}"
            async with session.get(path) as response:
                assert response.status == 200, file.name
                assert await response.read() == file.read_bytes()
                tag = response.headers["ETag"]
            async with session.get(path, headers={"If-None-Match": tag}) as response:
                assert response.status == 304


def test_the_page_has_no_inline_script_or_style_and_loads_nothing_from_elsewhere() -> None:
    page = files("bootstrap.static").joinpath("index.html").read_text()
    assert "style=" not in page
    assert "<style" not in page
    assert not re.search(r"\son\w+\s*=", page)
    assert "http://" not in page
    assert "https://" not in page
    script = "".join(
        files("bootstrap.static").joinpath(name).read_text() for name in ("app.js", "chart.js", "format.js")
    )
    for risky in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http://", "https://"):
        assert risky not in script


async def test_events_repeat_the_document(url: str) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{url}api/v1/events") as response:
        assert response.content_type == "text/event-stream"
        for _ in range(3):
            line = await response.content.readline()
            assert json.loads(line.removeprefix(b"data: ")) == DOCUMENT
            assert await response.content.readline() == b"\n"


async def test_closing_ends_open_event_streams_at_once() -> None:
    async with aiohttp.ClientSession() as session, asyncio.timeout(5):
        async with serve_web("127.0.0.1", 0, lambda: DOCUMENT, event_interval_s=3600.0) as url:
            response = await session.get(f"{url}api/v1/events")
            assert (await response.content.readline()).startswith(b"data: ")
        assert (await response.content.read()).strip() == b""


async def test_event_streams_are_counted(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bootstrap.web.MAX_EVENT_STREAMS", 2)
    async with aiohttp.ClientSession() as session:
        first = await session.get(f"{url}api/v1/events")
        second = await session.get(f"{url}api/v1/events")
        async with session.get(f"{url}api/v1/events") as third:
            assert (first.status, second.status, third.status) == (200, 200, 503)
        first.close()
        async with asyncio.timeout(5):
            while True:
                async with session.get(f"{url}api/v1/events") as again:
                    if again.status == 200:
                        break
        second.close()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
@pytest.mark.parametrize("path", ["", "api/v1/status", "nowhere"])
async def test_other_methods_are_refused(url: str, method: str, path: str) -> None:
    async with aiohttp.ClientSession() as session, session.request(method, url + path) as response:
        assert response.status == 405
        assert response.headers["Allow"] == "GET,HEAD"


@pytest.mark.parametrize("path", ["", "static/style.css", "api/v1/status", "api/v1/events", "metrics"])
async def test_head_answers_without_a_body(url: str, path: str) -> None:
    async with aiohttp.ClientSession() as session, session.head(url + path) as response:
        assert response.status == 200
        assert await response.read() == b""


@pytest.mark.parametrize(
    "path",
    ["static/../web.py", "static/..%2fweb.py", "static/%2e%2e/web.py", "static//etc/passwd", "static/__init__.py"],
)
async def test_no_way_out_of_the_static_table(url: str, path: str) -> None:
    answer = await _raw(url, f"GET /{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 404 ")


async def test_large_headers_are_refused(url: str) -> None:
    many = "".join(f"X-Pad-{i}: {'y' * 400}\r\n" for i in range(25)).encode()
    one = b"X-Pad: " + b"y" * (MAX_HEADER_BYTES + 100) + b"\r\n"
    for headers, codes in ((many, (b"431",)), (one, (b"400", b"431"))):
        answer = await _raw(url, b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + headers + b"\r\n")
        assert answer.split(b" ")[1] in codes
    answer = await _raw(url, b"GET /" + b"a" * (MAX_HEADER_BYTES + 100) + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.split(b" ")[1] in (b"400", b"414")


async def test_malformed_requests_leave_no_trace_in_the_log_but_our_own_failures_do(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("a bug of ours")

    async with serve_web("127.0.0.1", 0, fail) as url:
        for junk in (b"\x16\x03\x01\x02", b"GET\r\n", b"GET / HTTP/9.9\r\n", b"GET / HTTP/1.1\r\nbad header\r\n"):
            assert b" 400 " in await _raw(url, junk + b"\r\n\r\n")
        assert caplog.records == []
        answer = await _raw(url, b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert b" 500 " in answer
    assert b"a bug of ours" not in answer
    assert len(caplog.records) == 1


async def test_unfinished_headers_are_cut_off(url: str) -> None:
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    assert await _raw(url, b"GET / HTTP/1.1\r\nHost: x\r\n") == b""
    assert await _raw(url, b"") == b""
    assert loop.time() - start_s < 5.0


async def test_dripping_headers_do_not_extend_the_deadline(url: str) -> None:
    host, port = url.removeprefix("http://").rstrip("/").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET / HTTP/1.1\r\n")
    ended = asyncio.ensure_future(reader.read())
    async with asyncio.timeout(5):
        while not ended.done():
            writer.write(b"X-Drip: 1\r\n")
            await asyncio.wait([ended], timeout=0.05)
    assert not isinstance(ended.exception(), TimeoutError)
    writer.close()


async def test_a_port_in_use_is_one_line(url: str) -> None:
    port = int(url.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(UserError, match=f"127.0.0.1:{port} is already in use") as caught:
        async with serve_web("127.0.0.1", port, lambda: DOCUMENT):
            pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("host", "port"), [("203.0.113.7", 0), ("127.0.0.1", 70_000)])
async def test_an_impossible_address_is_one_line(host: str, port: int) -> None:
    with pytest.raises(UserError) as caught:
        async with serve_web(host, port, lambda: DOCUMENT):
            pass
    assert "\n" not in str(caught.value)


async def test_metrics_parse_and_equal_the_document() -> None:
    with busy_store() as store:
        document = swarm_status(store, manifest(), now_s=NOW_S)
    async with (
        serve_web("127.0.0.1", 0, lambda: document) as url,
        aiohttp.ClientSession() as session,
        session.get(f"{url}metrics") as response,
    ):
        text = await response.text()
    samples = {
        (sample.name, sample.labels.get("peer")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["llm_node_swarm_tokens_total", None] == document["swarm"]["tokens"]
    assert samples["llm_node_swarm_val_loss", None] == pytest.approx(document["swarm"]["val_loss"])
    assert samples["llm_node_peer_tokens_per_s", peer_id(2)] == 2960.0
    assert "kitchen-laptop" not in text
