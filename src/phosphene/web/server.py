"""The server: what the site has, over HTTP, and the routes of live use beside it."""

from __future__ import annotations

import errno
import gzip
import hashlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from phosphene.errors import (
    ChannelNotFound,
    EntryNotFound,
    ExtraMissing,
    InvalidRequest,
    LayerNotFound,
    ModelNotFound,
    ModelRefused,
    OutputRefused,
    PhospheneError,
    StoreRefused,
)
from phosphene.web.security import HEADERS, SecurityMiddleware, wants_json
from phosphene.web.site import Content, Site
from phosphene.web.templating import render_template

THREADS = 8  # that read the store and make pages at the same time
CONNECTIONS = 800  # at once, which leaves room below the 1,024 files that a process mostly may open
IDLE = 60  # seconds that a connection is kept; where much is going on, a short time has run out unnoticed
GRACE = 3  # seconds that answers under way get when the server ends
PORTS = 65535
LONGEST = 1000  # characters of a path that can be one of the site
DEEPEST = 8  # folders of a path, for the links of a page that says there is none
EFFORT = 4  # of gzip: within a twentieth of the size of the best, in a third of its time
SMALL = 1000  # bytes, below which nothing is packed
PACKED = ("text/", "application/json", "application/javascript", "image/svg")
STATUS: tuple[tuple[type[PhospheneError], int], ...] = (
    (EntryNotFound, 404),
    (LayerNotFound, 404),
    (ChannelNotFound, 404),
    (ModelNotFound, 409),
    (ModelRefused, 409),
    (ExtraMissing, 409),
    (StoreRefused, 500),
    (OutputRefused, 500),
    (PhospheneError, 400),
)
TITLES = {400: "This was not understood", 404: "There is no such page", 405: "That cannot be done here"}


def application(
    site: Site,
    live: Sequence[Route] = (),
    names: Sequence[str] | None = None,
    token: str | None = None,
    on_shutdown: Callable[[], None] = lambda: None,
) -> Starlette:
    """Return the application.

    Args:
        live: the routes of live use; they come before the pages.
        names, token: see `Guard`.
        on_shutdown: has what the live routes have under way end, so that their answers do; it waits for nothing.
    """
    threads = CapacityLimiter(THREADS)

    async def get(request: Request) -> Response:
        return await to_thread.run_sync(answered, site, request, limiter=threads)

    shown = Starlette(
        routes=[Route("/healthz", healthy), *live, Route("/{path:path}", get)],
        middleware=[Middleware(SecurityMiddleware, names=names, token=token)],
        exception_handlers={PhospheneError: refused, HTTPException: failed, Exception: unforeseen},
    )
    shown.state.live, shown.state.close = site.live, on_shutdown
    return shown


async def healthy(request: Request) -> Response:
    """Say that the server is there."""
    return JSONResponse({"status": "ok"}, headers={"Cache-Control": "no-store"})


def answered(site: Site, request: Request) -> Response:
    """Return what lies at a path, or where the browser has it already, that it is the same."""
    path = site_path(request.scope["path"])
    try:
        content = site.get(path)
    except EntryNotFound:
        with suppress(EntryNotFound):
            site.get(f"{path}/")
            return closed(request)
        raise
    # the tag is weak, as the same page may be sent packed and not
    headers = {"ETag": f'W/"{content.tag or hashlib.sha256(content.body).hexdigest()}"', "Cache-Control": "no-cache"}
    if content.media_type.startswith(PACKED):
        headers["Vary"] = "Accept-Encoding"
    if known(request, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    body = gzipped(request, content)
    if body is not content.body:
        headers["Content-Encoding"] = "gzip"
    return Response(body, 200, headers, content.media_type)


def closed(request: Request) -> Response:
    """Send the browser to a folder's address with the closing slash, without which its links would lead elsewhere."""
    last = request.scope["raw_path"].partition(b"?")[0].rpartition(b"/")[2].decode("latin-1")
    return Response(status_code=308, headers={"Location": f"./{last}/", "Cache-Control": "no-store"})


def site_path(asked: str) -> str:
    """Return the path of the site that the path of an address means.

    Raises:
        EntryNotFound: there can be none such.
    """
    path = asked.removeprefix("/")
    if path.endswith("/") or not path:
        path += "index.html"
    parts = path.split("/")
    if len(path) > LONGEST or any(one in ("", ".", "..") or "\\" in one or not one.isprintable() for one in parts):
        raise EntryNotFound("There is no page at this address; begin at the first page.")
    return path


def known(request: Request, tag: str) -> bool:
    """Return whether the browser has what a tag stands for."""
    given = [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]
    return tag.removeprefix("W/") in given or given == ["*"]


def gzipped(request: Request, content: Content) -> bytes:
    """Return the bytes to send: text smaller, where the browser can read that. Runs in a thread, as it takes a while.

    Starlette's own middleware would do it for the routes of live use too, which send their events one by one.
    """
    accepted = "gzip" in request.headers.get("accept-encoding", "")
    if not accepted or len(content.body) < SMALL or not content.media_type.startswith(PACKED):
        return content.body
    return gzip.compress(content.body, EFFORT, mtime=0)


def refused(request: Request, error: Exception) -> Response:
    """Answer with the sentence of an error of ours."""
    status = next(number for kind, number in STATUS if isinstance(error, kind))
    return titled_error(request, status, str(error))


def failed(request: Request, error: Exception) -> Response:
    """Answer with the sentence of an error of HTTP's own."""
    assert isinstance(error, HTTPException)
    sentence = error.detail
    if error.status_code == 405:
        sentence = f"{request.method} is not for this address; open it as a page."
    return titled_error(request, error.status_code, sentence, dict(error.headers or {}))


def unforeseen(request: Request, error: Exception) -> Response:
    """Answer without a word of what failed; the server logs it. No middleware sees this, so that it brings the headers.

    The connection ends, as nobody knows what of the request has been read.
    """
    return titled_error(
        request, 500, "Something failed here; the server's log says what.", {**HEADERS, "Connection": "close"}
    )


def titled_error(request: Request, status: int, sentence: str, headers: dict[str, str] | None = None) -> Response:
    """Return an error as a page, or where a script asked as JSON."""
    shown = {"Cache-Control": "no-store", **(headers or {})}
    if wants_json(request):
        return JSONResponse({"error": sentence}, status, shown)
    # the depth as the browser counts it: an encoded slash is none
    depth = min(request.scope.get("raw_path", b"/").partition(b"?")[0].count(b"/") - 1, DEEPEST)
    here = "x/" * depth + "error.html"
    title = TITLES.get(status, "This cannot be shown")
    content = render_template("error.html", here, request.app.state.live, title=title, sentence=sentence)
    return Response(content, status, shown, "text/html; charset=utf-8")


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 has one chosen.

    Raises:
        InvalidRequest: the port is taken or none, or the host is no address of this machine.
    """
    if not 0 <= port <= PORTS:
        raise InvalidRequest(f"a port is a number from 0 to {PORTS}, not {port}; --port 0 has one chosen")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise InvalidRequest(f"there is no host {host!r}; give --host an address of this machine") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(CONNECTIONS)
    except OSError as error:
        bound.close()
        raise InvalidRequest(not_bound(host, port, error)) from error
    return bound


def not_bound(host: str, port: int, error: OSError) -> str:
    """Return why nothing can listen at an address, and what to do."""
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is taken; give another --port, or --port 0 to have one chosen"
    if error.errno == errno.EACCES:
        return f"port {port} is not for every user; give a --port from 1024 on, or --port 0 to have one chosen"
    return f"nothing can listen at {host}: {error.strerror}; give --host an address of this machine"


class Server(uvicorn.Server):
    """A server that says when it is ready, and when it ends first has the work under way stop."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None], close: Callable[[], None]) -> None:
        super().__init__(config)
        self.ready, self.close = ready, close

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets=sockets)
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop the work, which ends its streams of events, and then the server."""
        self.close()
        await super().shutdown(sockets=sockets)


def serve(shown: Starlette, at: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
    """Serve until the process is interrupted or told to end; unforeseen errors go to the log with their traceback.

    Args:
        at: a socket that listens.
        ready: called when the first request can come.
    """
    with without_reraised_signals():
        Server(configured(shown), ready, shown.state.close).run([at])


def configured(shown: Starlette) -> uvicorn.Config:
    """Return how uvicorn is to serve: what it says goes to the log of Python, and that is errors alone."""
    return uvicorn.Config(
        shown,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.ERROR,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=GRACE,
    )


@contextmanager
def without_reraised_signals() -> Iterator[None]:
    """Let a signal end the server and no more: when it has ended, uvicorn raises the signal again."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before: dict[int, Any] = {number: signal.signal(number, lambda *_: None) for number in numbers}
    except ValueError:  # not in the main thread, where no signal arrives
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
