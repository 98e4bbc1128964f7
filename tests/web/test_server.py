"""The server: what it answers to which address, and how it ends."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from phosphene.errors import (
    ChannelNotFound,
    EntryNotFound,
    ExtraMissing,
    InvalidRequest,
    LayerNotFound,
    ModelNotFound,
    ModelRefused,
    OutOfMemory,
    PhotoRefused,
    StoreRefused,
)
from phosphene.web import server
from phosphene.web.security import HEADERS, bounded_body
from phosphene.web.server import application, listening, site_path
from phosphene.web.site import Content

HERE = "http://127.0.0.1:8000"

PAGE = "text/html; charset=utf-8"

LONG = b"<!DOCTYPE html><p>" + b"filter " * 500


class FakeSite:
    """A site of a few contents; some of its paths fail."""

    live = True

    def __init__(self) -> None:
        self.requested: list[str] = []
        self.contents = {
            "index.html": Content(b"<p>first</p>", PAGE, None),
            "long.html": Content(LONG, PAGE, "abc"),
            "sheet.webp": Content(b"RIFF" * 1000, "image/webp", "def"),
            "a/~2Fb.html": Content(b"deep", PAGE, None),
            "a/my run/": Content(b"a folder", PAGE, None),
        }
        self.failing: dict[str, Exception] = {}

    def get(self, path: str) -> Content:
        self.requested.append(path)
        if path in self.failing:
            raise self.failing[path]
        if path not in self.contents:
            raise EntryNotFound(f"there is no {path!r} here")
        return self.contents[path]


def client(site: FakeSite | None = None, live: list[Route] | None = None, **options: Any) -> TestClient:
    source: Any = site or FakeSite()
    made = application(source, live or [], **options)
    return TestClient(made, HERE, raise_server_exceptions=False, follow_redirects=False)


def test_the_first_page_is_at_the_bare_address() -> None:
    site = FakeSite()
    for path in ("/", "/index.html"):
        answer = client(site).get(path)
        assert (answer.status_code, answer.text) == (200, "<p>first</p>")
        assert answer.headers["content-type"] == PAGE
    assert site.requested == ["index.html"] * 2


def test_a_folder_without_its_closing_slash_leads_to_the_one_with_it() -> None:
    at = client()
    for address in ("/a/my%20run", "/a/my%20run?sort=score"):
        answer = at.get(address)
        assert (answer.status_code, answer.headers["location"]) == (308, "./my%20run/")
    assert at.get("/a/other").status_code == 404


def test_it_says_that_it_is_there() -> None:
    answer = client().get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_what_the_browser_has_is_not_sent_again() -> None:
    at = client()
    first = at.get("/sheet.webp")
    assert first.headers["etag"] == 'W/"def"'
    assert first.headers["cache-control"] == "no-cache"
    for tag in ('W/"def"', '"def"', '"x", W/"def"', "*"):
        again = at.get("/sheet.webp", headers={"If-None-Match": tag})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == 'W/"def"'
    assert at.get("/sheet.webp", headers={"If-None-Match": '"de"'}).status_code == 200


def test_a_page_without_a_mark_is_known_by_its_bytes() -> None:
    mark = hashlib.sha256(b"<p>first</p>").hexdigest()
    assert client().get("/").headers["etag"] == f'W/"{mark}"'


def test_text_is_packed_where_the_browser_can_read_that() -> None:
    at = client()
    with at.stream("GET", "/long.html", headers={"Accept-Encoding": "gzip, br"}) as packed:
        content = b"".join(packed.iter_raw())
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(content) == LONG
    assert len(content) < len(LONG) / 5
    plain = at.get("/long.html", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.content == LONG
    assert packed.headers["vary"] == plain.headers["vary"] == "Accept-Encoding"
    picture = at.get("/sheet.webp", headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in picture.headers  # it is packed already


def test_head_says_what_get_would_and_other_methods_are_refused() -> None:
    at = client()
    assert at.head("/long.html").status_code == 200
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "BREW"):
        answer = at.request(method, "/long.html")
        assert answer.status_code == 405
        assert answer.json() == {"error": f"{method} is not for this address; open it as a page."}
        assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (EntryNotFound("there is no <b>"), 404),
        (LayerNotFound("there is no <b>"), 404),
        (ChannelNotFound("there is no <b>"), 404),
        (InvalidRequest("there is no <b>"), 400),
        (PhotoRefused("there is no <b>"), 400),
        (OutOfMemory("there is no <b>"), 400),
        (ModelRefused("there is no <b>"), 409),
        (ModelNotFound("there is no <b>"), 409),
        (ExtraMissing("there is no <b>"), 409),
        (StoreRefused("there is no <b>"), 500),
    ],
)
def test_our_errors_are_a_sentence_on_a_page_and_in_json(error: Exception, status: int) -> None:
    site = FakeSite()
    site.failing = {"a/b/c.html": error, "a/layers.json": error}
    at = client(site)
    page = at.get("/a/b/c.html")
    assert page.status_code == status
    assert page.headers["content-type"] == PAGE
    assert "<p>there is no &lt;b&gt;</p>" in page.text
    assert 'href="../../static/page.css"' in page.text
    script = at.get("/a/layers.json")
    assert (script.status_code, script.json()) == (status, {"error": "there is no <b>"})


def test_an_unforeseen_error_is_told_to_the_log_alone() -> None:
    site = FakeSite()
    site.failing = {"index.html": RuntimeError("the secret"), "x.json": RuntimeError("the secret")}
    at = client(site)
    for path in ("/", "/x.json"):
        answer = at.get(path)
        assert answer.status_code == 500
        assert "log says what" in answer.text
        assert "secret" not in answer.text
        assert "Traceback" not in answer.text
        assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS


def test_links_of_an_error_lead_home_from_any_depth() -> None:
    at = client()
    for path, up in (("/x", ""), ("/a/x", "../"), ("/a%2Fb/x", "../"), ("/a//x/", "../../../"), ("/%2e%2e%2fx", "")):
        assert f'<a href="{up}index.html">To the first page' in at.get(path).text, path


@pytest.mark.parametrize(
    ("url_path", "path"),
    [
        ("/", "index.html"),
        ("", "index.html"),
        ("/a/", "a/index.html"),
        ("/a/~2Fb.html", "a/~2Fb.html"),
        ("/a/ä b", "a/ä b"),
        ("/a/..b/...", "a/..b/..."),
    ],
)
def test_the_path_of_an_address(url_path: str, path: str) -> None:
    assert site_path(url_path) == path


@pytest.mark.parametrize(
    "url_path", ["/..", "/../x", "/a/../x", "/./x", "/a//x", "//", "/a\\..\\x", "/a\0", "/\n", "/" + "a" * 1001]
)
def test_an_address_that_can_be_no_page_does_not_reach_the_site(url_path: str) -> None:
    with pytest.raises(EntryNotFound, match="no page at this address"):
        site_path(url_path)


def test_encoded_addresses_are_decoded_once() -> None:
    site = FakeSite()
    at = client(site)
    assert at.get("/a/%7E2Fb.html").text == "deep"
    for path in ("/%2e%2e/x", "/a%00", "/a%5C..%5Cx", "/%2e%2e%2f%2e%2e%2fx", "/" + "a/" * 5000):
        assert at.get(path).status_code == 404, path
    assert site.requested == ["a/~2Fb.html"]


async def upload(request: Request) -> Response:
    return Response(str(len(await bounded_body(request, 10))))


def test_live_routes_come_before_pages_and_their_errors_are_json() -> None:
    async def fails(request: Request) -> Response:
        raise ModelRefused("other weights")

    async def breaks(request: Request) -> Response:
        raise RuntimeError("the secret")

    live = [Route(f"/{handler.__name__}", handler, methods=["POST"]) for handler in (upload, fails, breaks)]
    at = client(live=live)
    assert at.post("/upload", content=b"abc").text == "3"
    large = at.post("/upload", content=b"x" * 11)
    assert (large.status_code, list(large.json())) == (413, ["error"])
    refused = at.post("/fails")
    assert (refused.status_code, refused.json()) == (409, {"error": "other weights"})
    broken = at.post("/breaks")
    assert (broken.status_code, broken.json()) == (500, {"error": "Something failed here; the server's log says what."})
    assert at.get("/upload").status_code == 404  # it is no page
    assert at.post("/upload", content=b"abc", headers={"Origin": "null"}).status_code == 403


def test_reading_is_done_by_a_few_threads_and_never_by_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "THREADS", 3)
    here, most, busy, lock = threading.current_thread(), [0], [0], threading.Lock()

    class Slow(FakeSite):
        def get(self, path: str) -> Content:
            assert threading.current_thread() is not here
            with lock:
                busy[0] += 1
                most[0] = max(most[0], busy[0])
            time.sleep(0.01)
            with lock:
                busy[0] -= 1
            return super().get(path)

    site: Any = Slow()
    app = application(site)

    async def request() -> int:
        status = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            status.append(message.get("status"))

        scope = {"type": "http", "method": "GET", "path": "/", "raw_path": b"/", "query_string": b""}
        await app({**scope, "headers": [(b"host", b"localhost")]}, receive, send)
        return int(status[0])

    async def all_at_once() -> list[int]:
        return list(await asyncio.gather(*(request() for _ in range(12))))

    assert asyncio.run(all_at_once()) == [200] * 12
    assert most == [3]


def test_events_arrive_one_by_one() -> None:
    """Over a real connection, which says that it reads gzip: the first event is there before the second is made."""
    go_on = threading.Event()

    async def events(request: Request) -> Response:
        async def stream() -> AsyncIterator[bytes]:
            yield b"data: 1\n\n"
            while not go_on.is_set():
                await asyncio.sleep(0.01)
            yield b"data: 2\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    with RunningServer([Route("/events", events, methods=["POST"])]) as port:
        connection = HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("POST", "/events", headers={"Accept-Encoding": "gzip"})
        answer = connection.getresponse()
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert answer.read1() == b"data: 1\n\n"
        go_on.set()
        assert answer.read() == b"data: 2\n\n"
        connection.close()


class RunningServer:
    """A server in a thread; yields its port."""

    def __init__(self, live: list[Route], site: FakeSite | None = None) -> None:
        self.live, self.site = live, site or FakeSite()

    def __enter__(self) -> int:
        at = listening("127.0.0.1", 0)
        site: Any = self.site
        ready = threading.Event()
        self.made = server.Server(server.uvicorn_config(application(site, self.live)), ready.set, lambda: None)
        self.thread = threading.Thread(target=self.made.run, args=([at],))
        self.thread.start()
        assert ready.wait(10)
        return int(at.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self.made.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()


def raw(port: int, request: bytes, close: bool = False) -> bytes:
    """Return what the server says to bytes that no client would send, or nothing where these break off."""
    with socket.create_connection(("127.0.0.1", port), 10) as at:
        at.sendall(request)
        if close:
            at.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: at.recv(65536), b""))


def test_requests_that_are_none_do_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    site = FakeSite()
    with RunningServer([Route("/upload", upload, methods=["POST"])], site) as port, caplog.at_level(logging.ERROR):
        assert raw(port, b"GET / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 400")  # no Host
        assert raw(port, b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 400")
        assert raw(port, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n").startswith(b"HTTP/1.1 400")
        head = b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        assert raw(port, b"GET http://evil.example/etc/passwd" + head + b"\r\n").startswith(b"HTTP/1.1 404")
        assert raw(port, b"GET /../../etc/passwd" + head + b"\r\n").startswith(b"HTTP/1.1 404")
        assert raw(port, b"GET /%252e%252e/x" + head + b"\r\n").startswith(b"HTTP/1.1 404")
        assert site.requested[-2:] == ["%2e%2e/x", "%2e%2e/x/"]  # decoded once
        assert raw(port, b"GET /" + b"a" * 60_000 + head + b"\r\n").startswith(b"HTTP/1.1 404")
        assert raw(port, b"GET /" + b"a" * 70_000).startswith(b"HTTP/1.1 400")
        assert raw(port, b"POST /upload" + head + b"Content-Length: -1\r\n\r\n").startswith(b"HTTP/1.1 400")
        assert raw(port, b"POST /upload" + head + b"Content-Length: 9\r\n\r\nxxx", close=True) == b""
        assert raw(port, b"GET /" + head + b"\r\n").startswith(b"HTTP/1.1 200")
    assert caplog.records == []


def test_the_traceback_of_an_unforeseen_error_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    site = FakeSite()
    site.failing = {"index.html": RuntimeError("the secret")}
    with RunningServer([], site) as port:
        answer = raw(port, b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 500")
    assert b"secret" not in answer
    assert ["RuntimeError: the secret" in caplog.text, "Traceback" in caplog.text] == [True, True]
    assert caplog.text.count("RuntimeError: the secret") == 1


SERVED = """
import asyncio, sys, threading
from starlette.responses import StreamingResponse
from starlette.routing import Route
from phosphene.web.server import application, listening, serve

stopped = threading.Event()

class Site:
    live = True

async def events(request):
    async def stream():
        while not (stopped.is_set() and {orderly}):
            yield b"data: 1\\n\\n"
            await asyncio.sleep(0.02)
        yield b"data: stopped\\n\\n"
    return StreamingResponse(stream(), media_type="text/event-stream")

for _ in range({times}):
    stopped.clear()
    at = listening("127.0.0.1", 0)
    app = application(Site(), [Route("/events", events, methods=["POST"])], on_shutdown=stopped.set)
    serve(app, at, lambda: print(at.getsockname()[1], flush=True))
    print("ended", flush=True)
"""


@pytest.mark.parametrize(
    ("numbers", "orderly"),
    [((signal.SIGINT, signal.SIGTERM), True), pytest.param((signal.SIGTERM,), False, marks=pytest.mark.slow)],
)
def test_a_signal_ends_it_within_seconds_also_while_events_are_sent(
    numbers: tuple[signal.Signals, ...], orderly: bool
) -> None:
    code = SERVED.replace("{orderly}", str(orderly)).replace("{times}", str(len(numbers)))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for number in numbers:
            connection = HTTPConnection("127.0.0.1", int(process.stdout.readline()), timeout=20)
            connection.request("POST", "/events")
            answer = connection.getresponse()
            assert answer.read1().startswith(b"data: 1\n\n")
            process.send_signal(number)
            if orderly:
                assert answer.read().endswith(b"data: stopped\n\n")
            assert process.stdout.readline() == "ended\n"
            connection.close()
        rest, errors = process.communicate(timeout=20)
    assert (process.returncode, rest) == (0, "")
    assert ("Traceback" in errors) is not orderly  # what does not end by itself is cancelled


def test_a_port_that_is_taken_is_said_in_a_sentence() -> None:
    with closing(listening("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(
            InvalidRequest, match=f"port {port} of 127.0.0.1 is taken; give another --port, or --port 0"
        ):
            listening("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1", 70000, "a port is a number from 0 to 65535, not 70000"),
        ("127.0.0.1", -1, "a port is a number from 0 to 65535, not -1"),
        ("192.0.2.1", 0, "nothing can listen at 192.0.2.1: Cannot assign requested address; give --host an address"),
        ("no.such.host.invalid", 0, "there is no host 'no.such.host.invalid'; give --host an address of this machine"),
        ("x" * 300, 0, "there is no host 'xxx"),
    ],
)
def test_where_nothing_can_listen_is_said_in_a_sentence(host: str, port: int, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        listening(host, port)
