"""Who gets through to the page: by which name, from which site, with which token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from phosphene.web import security as guard
from phosphene.web.security import HEADERS, SecurityMiddleware, bounded_body, host_of

HERE = "http://127.0.0.1:8000"


async def hello(request: Request) -> Response:
    return PlainTextResponse("hello")


async def size(request: Request) -> Response:
    return JSONResponse(len(await bounded_body(request, 1000)))


async def failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code)


def client(names: list[str] | None = None, token: str | None = None) -> TestClient:
    routes = [Route("/size", size, methods=["POST"]), Route("/{path:path}", hello, methods=["GET", "POST"])]
    made = Starlette(
        routes=routes,
        middleware=[Middleware(SecurityMiddleware, names=names, token=token)],
        exception_handlers={HTTPException: failed},
    )
    return TestClient(made, HERE, follow_redirects=False)


def got(at: TestClient, method: str = "GET", path: str = "/", **headers: str) -> Any:
    return at.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize(
    ("header", "host"),
    [
        ("localhost", "localhost"),
        ("LOCALHOST:8000", "localhost"),
        ("127.0.0.1:80", "127.0.0.1"),
        ("[::1]", "::1"),
        ("[::1]:8000", "::1"),
        ("", None),
        (":8000", None),
        ("::1", None),
        ("[::1", None),
        ("[::1]8000", None),
        ("[::1]:", None),
        ("[localhost]", None),
        ("localhost:http", None),
        ("localhost:80:80", None),
        ("localhost/..", None),
        ("user@localhost", None),
        ("local host", None),
        ("locälhost", None),
    ],
)
def test_the_host_of_a_header(header: str, host: str | None) -> None:
    assert host_of(header) == host


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000", "LocalHost"])
def test_on_a_loopback_address_the_page_answers_to_names_of_this_machine(host: str) -> None:
    assert got(client(), host=host).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("evil.example:8000", 421),
        ("192.168.0.7", 421),
        ("0.0.0.0", 421),
        ("[::2]", 421),
        ("128.0.0.1", 421),
        ("", 400),
        ("127.0.0.1@evil.example", 400),
        ("127.0.0.1, evil.example", 400),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS"])
def test_on_a_loopback_address_it_answers_to_no_other(host: str, status: int, method: str) -> None:
    answer = got(client(), method, host=host)
    assert answer.status_code == status
    assert b"hello" not in answer.content


def test_on_the_network_it_answers_to_addresses_and_to_its_own_name() -> None:
    at = client(["Class.example"])
    for host in ("192.168.0.7:8000", "[fe80::1]", "class.example", "CLASS.EXAMPLE:8000", "localhost"):
        assert got(at, host=host).status_code == 200, host
    refused = got(at, host="evil.example")
    assert refused.status_code == 421
    assert b"does not answer to the name evil.example" in refused.content


def test_two_hosts_are_none() -> None:
    async def call() -> int:
        sent: list[Any] = []
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/",
            "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"host", b"evil.example")],
        }

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "http.request"}

        await client().app(scope, receive, send)
        return int(sent[0]["status"])

    assert asyncio.run(call()) == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # curl
        ({"origin": HERE}, 200),
        ({"origin": HERE.upper()}, 200),
        ({"origin": HERE, "sec_fetch_site": "same-origin"}, 200),
        ({"sec_fetch_site": "none"}, 200),
        ({"origin": "null"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:8001"}, 403),
        ({"origin": "http://127.0.0.1"}, 403),
        ({"origin": HERE + ".evil.example"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"sec_fetch_site": "cross-site", "sec_fetch_dest": "document"}, 403),
        ({"origin": HERE, "sec_fetch_site": "cross-site"}, 403),
    ],
)
def test_no_other_site_has_a_browser_start_work_here(headers: dict[str, str], status: int) -> None:
    answer = got(client(), "POST", "/render", **headers)
    assert answer.status_code == status
    if status == 403:
        assert "page of another site" in answer.json()["error"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"sec_fetch_site": "cross-site", "sec_fetch_dest": "document"}, 200),  # a link was followed
        ({"sec_fetch_site": "cross-site", "sec_fetch_dest": "image"}, 403),
        ({"sec_fetch_site": "cross-site", "sec_fetch_dest": "iframe"}, 403),
        ({"sec_fetch_site": "cross-site", "sec_fetch_dest": "script"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site", "sec_fetch_dest": "empty"}, 403),
        ({"sec_fetch_site": "same-origin", "sec_fetch_dest": "image"}, 200),
        ({"origin": "https://evil.example"}, 403),
    ],
)
def test_other_sites_may_link_to_a_page_but_not_take_its_parts(headers: dict[str, str], status: int) -> None:
    for method in ("GET", "HEAD"):
        assert got(client(), method, "/atlas/1/sheet.webp", **headers).status_code == status


def test_every_answer_has_the_headers() -> None:
    at = client(token="secret")
    answers = [
        got(at, path="/?token=wrong"),
        got(at, path="/?token=secret"),
        got(at, host="evil.example"),
        got(at, "POST", origin="null"),
        got(client()),
        got(client(), "PUT", "/"),
    ]
    assert [answer.status_code for answer in answers] == [403, 303, 421, 403, 200, 405]
    for answer in answers:
        assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS
    assert "frame-ancestors 'none'" in HEADERS["Content-Security-Policy"]
    assert "unsafe" not in HEADERS["Content-Security-Policy"]


def test_without_its_token_nothing_is_shown() -> None:
    at = client(token="sécret")
    wrong = dict.fromkeys(("/?token=", "/?token=wrong", "/?token=s%C3%A9cre"), b"That is not the token: ")
    for path, sentence in {**dict.fromkeys(("/", "/healthzz", "/static"), b"needs its token"), **wrong}.items():
        answer = got(at, path=path)
        assert answer.status_code == 403
        assert sentence in answer.content
        assert b"<form" in answer.content
    assert [got(at, path=path).status_code for path in ("/healthz", "/static/page.css")] == [200, 200]
    for headers in ({"authorization": "Bearer wrong"}, {"authorization": "Bearer"}, {"cookie": "phosphene-8000=x"}):
        assert got(at, **headers).status_code == 403
    assert got(at, "POST", "/render?token=s%C3%A9cret").status_code == 403  # only an address that is opened
    assert got(at, path="/layers.json").json() == {
        "error": "This page needs its token: type it here, or open the address that `phosphene serve` has printed."
    }


def test_a_token_in_the_address_becomes_a_cookie() -> None:
    at = client(token="sécret & co")
    answer = got(at, path="/atlas/a b?x=1&token=s%C3%A9cret+%26+co&y=%C3%A4")
    assert answer.status_code == 303
    assert answer.headers["location"] == "/atlas/a%20b?x=1&y=%C3%A4"
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith("phosphene-8000=")
    assert {"HttpOnly", "Path=/", "SameSite=strict"} <= set(cookie.split("; "))
    assert "cret" not in cookie
    assert got(at).status_code == 200  # the client keeps the cookie
    assert got(at, "POST", "/render").status_code == 200
    again = got(at, path="/b?token=anything")
    assert (again.status_code, again.headers["location"]) == (303, "/b")


def test_a_token_as_the_bearer_needs_no_cookie() -> None:
    at = client(token="abc")
    assert got(at, authorization="Bearer abc").status_code == 200
    assert got(at, "POST", "/x", authorization="bearer abc").status_code == 200


def test_a_page_of_another_site_may_link_with_the_token() -> None:
    at = client(token="abc")
    answer = got(at, path="/a?token=abc", sec_fetch_site="cross-site", sec_fetch_dest="document")
    assert answer.status_code == 200
    assert answer.headers["refresh"] == "0; url=/a"
    assert b'href="/a"' in answer.content


@pytest.mark.parametrize("path", ["//evil.example", "/%5Cevil.example", "///evil.example/", "/%0d%0aSet-Cookie:x=1"])
def test_the_way_on_from_a_token_leads_nowhere_else(path: str) -> None:
    at = client(token="abc")
    answer: Any = at.request("GET", HERE + path, params={"token": "abc"})
    assert answer.status_code == 303
    assert answer.headers["location"][0] == "/"
    assert answer.headers["location"][1] not in "/\\"
    assert "\n" not in answer.headers["location"]


def test_a_name_in_a_refusal_is_escaped() -> None:
    assert b"<b>" not in got(client(), host="<b>").content


def test_a_body_is_as_large_as_it_may_be_and_no_larger() -> None:
    at = client()
    assert at.post("/size", content=b"x" * 1000).json() == 1000
    large = at.post("/size", content=b"x" * 1001)
    assert (large.status_code, large.json()["error"][:22]) == (413, "What was sent is large")
    assert at.post("/size", content=b"").status_code == 400


def test_a_body_that_does_not_say_how_large_it_is_is_read_no_further_than_it_may_be() -> None:
    taken = []

    async def endless() -> AsyncIterator[bytes]:
        for number in range(10_000):
            taken.append(number)
            yield b"x" * 100

    async def call() -> int:
        chunks = endless()

        async def receive() -> Any:
            return {"type": "http.request", "body": await anext(chunks), "more_body": True}

        with pytest.raises(HTTPException) as raised:
            await bounded_body(Request({"type": "http", "method": "POST", "headers": []}, receive), 1000)
        return raised.value.status_code

    assert asyncio.run(call()) == 413
    assert len(taken) == 11


def test_a_body_that_comes_too_slowly_or_breaks_off_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.05)

    async def call(gone: bool) -> int:
        async def receive() -> Any:
            if gone:
                return {"type": "http.disconnect"}
            await asyncio.sleep(0.02)
            return {"type": "http.request", "body": b"x", "more_body": True}

        with pytest.raises(HTTPException) as raised:
            await bounded_body(Request({"type": "http", "method": "POST", "headers": []}, receive), 1000)
        return raised.value.status_code

    assert asyncio.run(call(gone=False)) == 408
    assert asyncio.run(call(gone=True)) == 400
