"""Serve the site over HTTP, together with the live routes."""

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

THREADS = 8  # that read the store and render pages at the same time
MAX_CONNECTIONS = 800  # which stays below 1,024, the usual limit of open files of a process
IDLE_SECONDS = 60  # that a connection is kept; on a busy server a shorter time runs out before a request is noticed
GRACE_SECONDS = 3  # that running responses get when the server ends
MAX_PORT = 65535
MAX_PATH = 1000  # characters; the site has no longer path
MAX_DEPTH = 8  # of folders, for the links of an error page
GZIP_LEVEL = 4  # within a twentieth of the smallest size, in a third of its time
MIN_GZIP = 1000  # bytes, below which nothing is compressed
COMPRESSIBLE = ("text/", "application/json", "application/javascript", "image/svg")
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
        live: the live routes; they come before the pages.
        names, token: see `SecurityMiddleware`.
        on_shutdown: stops the work of the live routes, which ends their responses; it must not block.
    """
    threads = CapacityLimiter(THREADS)

    async def get(request: Request) -> Response:
        return await to_thread.run_sync(site_response, site, request, limiter=threads)

    app = Starlette(
        routes=[Route("/healthz", healthy), *live, Route("/{path:path}", get)],
        middleware=[Middleware(SecurityMiddleware, names=names, token=token)],
        exception_handlers={PhospheneError: phosphene_error, HTTPException: http_error, Exception: unexpected_error},
    )
    app.state.live, app.state.close = site.live, on_shutdown
    return app


async def healthy(request: Request) -> Response:
    """Answer that the server is running."""
    return JSONResponse({"status": "ok"}, headers={"Cache-Control": "no-store"})


def site_response(site: Site, request: Request) -> Response:
    """Return the content of a path, or 304 if the browser has it already."""
    path = site_path(request.scope["path"])
    try:
        content = site.get(path)
    except EntryNotFound:
        with suppress(EntryNotFound):
            site.get(f"{path}/")
            return folder_redirect(request)
        raise
    # the tag is weak, as the same page is sent with and without compression
    headers = {"ETag": f'W/"{content.tag or hashlib.sha256(content.body).hexdigest()}"', "Cache-Control": "no-cache"}
    if content.media_type.startswith(COMPRESSIBLE):
        headers["Vary"] = "Accept-Encoding"
    if is_cached(request, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    body = gzipped(request, content)
    if body is not content.body:
        headers["Content-Encoding"] = "gzip"
    return Response(body, 200, headers, content.media_type)


def folder_redirect(request: Request) -> Response:
    """Redirect to a folder's address with the closing slash, without which relative links would lead elsewhere."""
    last = request.scope["raw_path"].partition(b"?")[0].rpartition(b"/")[2].decode("latin-1")
    return Response(status_code=308, headers={"Location": f"./{last}/", "Cache-Control": "no-store"})


def site_path(url_path: str) -> str:
    """Return the path in the site for the path of a URL.

    Raises:
        EntryNotFound: the site can have no such path.
    """
    path = url_path.removeprefix("/")
    if path.endswith("/") or not path:
        path += "index.html"
    parts = path.split("/")
    if len(path) > MAX_PATH or any(part in ("", ".", "..") or "\\" in part or not part.isprintable() for part in parts):
        raise EntryNotFound("There is no page at this address; begin at the first page.")
    return path


def is_cached(request: Request, etag: str) -> bool:
    """Return whether the browser has the content that an ETag stands for."""
    tags = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    return etag.removeprefix("W/") in tags or tags == ["*"]


def gzipped(request: Request, content: Content) -> bytes:
    """Return the bytes to send: text is compressed if the browser accepts that. Slow, so it runs in a thread.

    Starlette's own middleware would compress in the event loop.
    """
    accepted = "gzip" in request.headers.get("accept-encoding", "")
    if not accepted or len(content.body) < MIN_GZIP or not content.media_type.startswith(COMPRESSIBLE):
        return content.body
    return gzip.compress(content.body, GZIP_LEVEL, mtime=0)


def phosphene_error(request: Request, error: Exception) -> Response:
    """Answer with the message of an error of this package."""
    status = next(number for kind, number in STATUS if isinstance(error, kind))
    return titled_error(request, status, str(error))


def http_error(request: Request, error: Exception) -> Response:
    """Answer with the message of an HTTP error."""
    assert isinstance(error, HTTPException)
    sentence = error.detail
    if error.status_code == 405:
        sentence = f"{request.method} is not for this address; open it as a page."
    return titled_error(request, error.status_code, sentence, dict(error.headers or {}))


def unexpected_error(request: Request, error: Exception) -> Response:
    """Answer without details, which go to the log; sets the security headers, as no middleware sees this response.

    The connection is closed, because it is not known how much of the request has been read.
    """
    return titled_error(
        request, 500, "Something failed here; the server's log says what.", {**HEADERS, "Connection": "close"}
    )


def titled_error(request: Request, status: int, sentence: str, headers: dict[str, str] | None = None) -> Response:
    """Return an error as a page, or as JSON if a script sent the request."""
    headers = {"Cache-Control": "no-store", **(headers or {})}
    if wants_json(request):
        return JSONResponse({"error": sentence}, status, headers)
    # the depth as the browser counts it: an encoded slash does not count
    depth = min(request.scope.get("raw_path", b"/").partition(b"?")[0].count(b"/") - 1, MAX_DEPTH)
    here = "x/" * depth + "error.html"
    title = TITLES.get(status, "This cannot be shown")
    content = render_template("error.html", here, request.app.state.live, title=title, sentence=sentence)
    return Response(content, status, headers, "text/html; charset=utf-8")


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 picks a free port.

    Raises:
        InvalidRequest: the port is taken or out of range, or the host is no address of this machine.
    """
    if not 0 <= port <= MAX_PORT:
        raise InvalidRequest(f"a port is a number from 0 to {MAX_PORT}, not {port}; --port 0 picks a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise InvalidRequest(f"there is no host {host!r}; give --host an address of this machine") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(MAX_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise InvalidRequest(bind_error(host, port, error)) from error
    return listener


def bind_error(host: str, port: int, error: OSError) -> str:
    """Return why no socket can listen at an address, and what to do."""
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is taken; give another --port, or --port 0 to pick a free one"
    if error.errno == errno.EACCES:
        return f"port {port} is not for every user; give a --port from 1024 on, or --port 0 to pick a free one"
    return f"nothing can listen at {host}: {error.strerror}; give --host an address of this machine"


class Server(uvicorn.Server):
    """A server that reports when it is ready, and that stops running work before it shuts down."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None], close: Callable[[], None]) -> None:
        super().__init__(config)
        self.ready, self.close = ready, close

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and report it."""
        await super().startup(sockets=sockets)
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop the running work, which ends its event streams, and then the server."""
        self.close()
        await super().shutdown(sockets=sockets)


def serve(app: Starlette, listener: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
    """Serve until the process is interrupted or terminated; unexpected errors are logged with their traceback.

    Args:
        listener: a socket that listens.
        ready: called when requests are accepted.
    """
    with without_reraised_signals():
        Server(uvicorn_config(app), ready, app.state.close).run([listener])


def uvicorn_config(app: Starlette) -> uvicorn.Config:
    """Return the configuration of uvicorn, which logs nothing but errors, through `logging`."""
    return uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.ERROR,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


@contextmanager
def without_reraised_signals() -> Iterator[None]:
    """Let a signal end the server only: uvicorn raises it again when the server has ended, and this ignores that."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before: dict[int, Any] = {number: signal.signal(number, lambda *_: None) for number in numbers}
    except ValueError:  # not in the main thread, so no signal arrives here
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
