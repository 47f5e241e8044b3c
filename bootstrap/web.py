"""The status page and its interfaces over HTTP: read-only, offline, and small enough to expose to strangers.

    GET /                 the page; /static/* its script, style and chart library, all served from memory by a fixed table
    GET /api/v1/status    the status document as JSON
    GET /api/v1/events    the same document as server-sent events, every few seconds
    GET /metrics          the same numbers for Prometheus

There is no way to change anything here, so there is nothing to authenticate. What strangers could abuse is bounded: other
methods are refused, headers are limited to 8 KiB and must arrive within 5 s, event streams are counted, and a reader that
stalls is dropped. Names in the document are strangers' text; the page writes them with `textContent` only, and a
Content-Security-Policy without inline script or style stands behind that. No cross-origin access is granted.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from bootstrap.document import encode_document
from bootstrap.metrics import CONTENT_TYPE, prometheus_text
from protocol.errors import UserError

__all__ = ["CONTENT_SECURITY_POLICY", "HEADER_TIMEOUT_S", "MAX_HEADER_BYTES", "serve_web"]

MAX_HEADER_BYTES = 8192
HEADER_TIMEOUT_S = 5.0
MAX_EVENT_STREAMS = 64

CONTENT_SECURITY_POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_STATIC_TYPES = {
    "index.html": "text/html",
    "app.js": "text/javascript",
    "chart.js": "text/javascript",
    "format.js": "text/javascript",
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
    "uplot.js": "text/javascript",
    "uplot.css": "text/css",
    "uplot-LICENSE.txt": "text/plain",
}
_DOCUMENT_AGE_S = 1.0
_WRITE_TIMEOUT_S = 10.0

GetDocument = Callable[[], dict[str, Any]]
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serve_web(
    host: str,
    port: int,
    get_document: GetDocument,
    *,
    event_interval_s: float = 2.0,
    header_timeout_s: float = HEADER_TIMEOUT_S,
) -> AsyncIterator[str]:
    """Serve the page while the context is open.

    Args:
        host: address to listen on.
        port: TCP port, 0 for any free one.
        get_document: returns the current status document; called at most about once a second.
        event_interval_s: seconds between two events of a stream.
        header_timeout_s: a connection that has not sent a whole request head by then is closed, idle ones too.

    Yields:
        The page's address, with the port listened on.

    Raises:
        UserError: the port is in use, or the address is not ours.
    """
    runner = web.AppRunner(
        _Site(get_document, event_interval_s).application(),
        access_log=None,
        logger=_request_logger(),
        # aiohttp starts this clock when a connection opens, and again after each answer, and stops it only when a whole
        # head has arrived: so it is also the deadline for slow headers.
        keepalive_timeout=header_timeout_s,
        max_line_size=MAX_HEADER_BYTES,
        max_field_size=MAX_HEADER_BYTES,
        max_headers=64,
        handler_cancellation=True,
        shutdown_timeout=1.0,
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except (OSError, OverflowError) as error:
            raise _listen_error(host, port, error) from None
        yield _url(host, int(runner.addresses[0][1]))
    finally:
        await runner.cleanup()


def _request_logger() -> logging.Logger:
    """aiohttp's place for failures, without a traceback for every malformed request that a stranger sends."""
    logger = logging.getLogger(f"{__name__}.requests")
    logger.addFilter(_is_our_fault)
    return logger


def _is_our_fault(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


def _url(host: str, port: int) -> str:
    if host in ("", "0.0.0.0", "::"):
        host = socket.gethostname()  # the wildcard is no address to dial
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def _listen_error(host: str, port: int, error: OSError | OverflowError) -> UserError:
    where = f"{host}:{port}"
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return UserError(f"HTTP address {where} is already in use; stop the other program or choose another port")
    if number == errno.EACCES:
        return UserError(f"HTTP address {where} needs more rights; choose a port above 1023")
    return UserError(f"HTTP address {where} can not be listened on ({error}); use an address of this machine")


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    content_type: str
    etag: str


class _Site:
    """Handlers and the state they share: files in memory, the last document, the number of open event streams."""

    def __init__(self, get_document: GetDocument, event_interval_s: float) -> None:
        self._get_document = get_document
        self._event_interval_s = event_interval_s
        self._files = {name: _load(name, content_type) for name, content_type in _STATIC_TYPES.items()}
        self._document: tuple[float, dict[str, Any], bytes] | None = None
        self._num_streams = 0
        self._closing = asyncio.Event()

    def application(self) -> web.Application:
        app = web.Application(middlewares=[_refuse_unwanted])
        app.on_response_prepare.append(_add_headers)
        app.on_shutdown.append(self._on_shutdown)
        app.router.add_get("/", self._page)
        app.router.add_get("/static/{name}", self._static)
        app.router.add_get("/api/v1/status", self._status)
        app.router.add_get("/api/v1/events", self._events)
        app.router.add_get("/metrics", self._metrics)
        return app

    async def _on_shutdown(self, _app: web.Application) -> None:
        self._closing.set()

    def _current(self) -> tuple[dict[str, Any], bytes]:
        """The document and its JSON, shared by all requests of the same second."""
        now_s = asyncio.get_running_loop().time()
        if self._document is None or now_s - self._document[0] >= min(_DOCUMENT_AGE_S, self._event_interval_s):
            document = self._get_document()
            self._document = (now_s, document, encode_document(document))
        return self._document[1:]

    async def _page(self, request: web.Request) -> web.StreamResponse:
        return _file_response(self._files["index.html"], request)

    async def _static(self, request: web.Request) -> web.StreamResponse:
        file = self._files.get(request.match_info["name"])
        if file is None:
            raise web.HTTPNotFound(text="not found")
        return _file_response(file, request)

    async def _status(self, _request: web.Request) -> web.StreamResponse:
        return web.Response(body=self._current()[1], content_type="application/json", charset="utf-8")

    async def _metrics(self, _request: web.Request) -> web.StreamResponse:
        return web.Response(body=prometheus_text(self._current()[0]), headers={"Content-Type": CONTENT_TYPE})

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if self._num_streams >= MAX_EVENT_STREAMS:
            raise web.HTTPServiceUnavailable(text="too many open event streams", headers={"Retry-After": "10"})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        self._num_streams += 1
        try:
            await response.prepare(request)
            while request.method == "GET" and not self._closing.is_set():
                async with asyncio.timeout(_WRITE_TIMEOUT_S):
                    await response.write(b"data: " + self._current()[1] + b"\n\n")
                await self._pause()
        except (TimeoutError, ConnectionError):
            pass  # the reader stalled or left
        finally:
            self._num_streams -= 1
        return response

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(self._event_interval_s):
                await self._closing.wait()
        except TimeoutError:
            pass


def _load(name: str, content_type: str) -> _File:
    body = files("bootstrap.static").joinpath(name).read_bytes()
    return _File(body=body, content_type=content_type, etag=hashlib.sha256(body).hexdigest()[:16])


def _file_response(file: _File, request: web.Request) -> web.Response:
    known = {tag.value for tag in request.if_none_match or ()}
    if file.etag in known:
        response = web.Response(status=304)
    else:
        charset = "utf-8" if file.content_type.startswith("text/") else None
        response = web.Response(body=file.body, content_type=file.content_type, charset=charset)
    response.etag = file.etag
    return response


@web.middleware
async def _refuse_unwanted(request: web.Request, handler: _Handler) -> web.StreamResponse:
    if request.method not in ("GET", "HEAD"):
        raise web.HTTPMethodNotAllowed(request.method, ("GET", "HEAD"))
    # aiohttp bounds each header; the sum is bounded here.
    if sum(len(name) + len(value) + 4 for name, value in request.raw_headers) > MAX_HEADER_BYTES:
        raise web.HTTPRequestHeaderFieldsTooLarge(text="request headers exceed 8 KiB")
    return await handler(request)


async def _add_headers(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_HEADERS)
