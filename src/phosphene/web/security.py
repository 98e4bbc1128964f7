"""What stands before every request: whose name the browser used, whose page sent it, whether it has the token.

A page on the internet can make a browser send requests to a server on the same machine. It may not read the answers,
unless its own name is made to lead here (DNS rebinding), so that the name in `Host` is checked; and it may not start
work here, so that `Origin` and `Sec-Fetch-Site` are.
"""

from __future__ import annotations

import asyncio
import hashlib
import html
import re
from collections.abc import Sequence
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address
from secrets import compare_digest
from typing import NamedTuple
from urllib.parse import parse_qsl, quote, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}
READS = ("GET", "HEAD")
PUBLIC_PATHS = re.compile("/healthz|/static/[^/]+")  # what nobody needs a token for: nothing of the store is there
SLOWEST = 30.0  # seconds that a body may take to arrive
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>Phosphene</title>
<link rel="stylesheet" href="/static/page.css"></head>
<body><main><h1>{title}</h1><p>{sentence}</p>{more}</main></body></html>
"""
FORM = (
    '<form><label>Token <input name="token" type="password" autocomplete="current-password" required></label> '
    "<button>Open</button></form>"
)


class RequestRefused(NamedTuple):
    """Why a request goes no further."""

    status: int
    sentence: str


class SecurityMiddleware:
    """ASGI middleware that lets through what comes from this page's own address, and with a token who has it.

    Args:
        names: the host names under which the page may be called; None where the server listens on a loopback address
            alone, which then is all that it may be called.
        token: what every request has to show, None for nothing.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str] | None = None, token: str | None = None) -> None:
        self.app, self.token = app, token
        self.names = None if names is None else frozenset(one.lower() for one in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await (self.answer(Request(scope)) or self.app)(scope, receive, with_headers)

    def answer(self, request: Request) -> Response | None:
        """Return what is answered in place of the page, if anything is."""
        refused = host_refused(request.headers, self.names) or site_refused(request.method, request.headers)
        if refused:
            return told(request, refused)
        free = PUBLIC_PATHS.fullmatch(request.scope["path"])
        return self.token_asked(request, self.token) if self.token and not free else None

    def token_asked(self, request: Request, token: str) -> Response | None:
        """Return what a request gets that has no token, or has it in its address; nothing where all is well."""
        secret, cookie = hashlib.sha256(token.encode()).hexdigest(), cookie_name(request.scope)
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and same(bearer.strip(), token):
            return None
        if same(cookies(request.headers).get(cookie, ""), secret):
            return None if "token" not in request.query_params else cleaned(request)
        if request.method in READS and same(request.query_params.get("token", ""), token):
            response = cleaned(request)
            response.set_cookie(cookie, secret, httponly=True, samesite="strict", path="/")
            return response
        given = "That is not the token" if "token" in request.query_params else "This page needs its token"
        sentence = f"{given}: type it here, or open the address that `phosphene serve` has printed."
        return told(request, RequestRefused(403, sentence), FORM)


def host_refused(headers: Headers, names: frozenset[str] | None) -> RequestRefused | None:
    """Return why the name by which the server was called is refused, if it is; see `Guard`."""
    given = headers.getlist("host")
    host = host_of(given[0]) if len(given) == 1 else None
    if host is None:
        return RequestRefused(
            400, "The request has no Host, or more than one, or one that is none; send the page's own."
        )
    if is_loopback(host) if names is None else is_loopback(host) or is_address(host) or host in names:
        return None
    also = "localhost or 127.0.0.1" if names is None else "its address, or by the name given with --host"
    return RequestRefused(421, f"This server does not answer to the name {host}; call it by {also}.")


def host_of(header: str) -> str | None:
    """Return the host in a Host header, in lower case and without its port; None where there is none.

    >>> host_of("[::1]:8000"), host_of("LocalHost:80"), host_of("a b")
    ('::1', 'localhost', None)
    """
    bracket, closing, after = header.partition("]")
    if closing:
        host, colon, port = bracket.removeprefix("["), after[:1], after[1:]
        proper = bracket.startswith("[") and is_address(host) and (after == "" or colon == ":")
    else:
        host, colon, port = header.partition(":")
        proper = bool(host) and all(one.isalnum() or one in ".-_" for one in host) and host.isascii()
    return host.lower() if proper and (port.isdecimal() or not colon) else None


def is_address(host: str) -> bool:
    """Return whether a host is an IP address, which no one can make lead elsewhere."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Return whether a host always is this machine."""
    return host == "localhost" or (is_address(host) and ip_address(host).is_loopback)


def site_refused(method: str, headers: Headers) -> RequestRefused | None:
    """Return why a request that another site made the browser send is refused; following a link to a page is not."""
    origin, host = headers.get("origin"), headers.get("host", "").lower()
    foreign = headers.get("sec-fetch-site", "none").lower() not in ("none", "same-origin")
    followed = method in READS and headers.get("sec-fetch-dest") == "document"
    own = origin is None or origin.lower() in (f"http://{host}", f"https://{host}")
    if own and (followed or not foreign):
        return None
    return RequestRefused(403, "The request came from a page of another site; open this page in a tab of its own.")


def same(given: str, wanted: str) -> bool:
    """Compare two texts in a time that does not tell how alike they are."""
    return compare_digest(given.encode("utf-8", "replace"), wanted.encode("utf-8", "replace"))


def cookie_name(scope: Scope) -> str:
    """Return the name of the token's cookie; servers on several ports of a machine share their cookies."""
    return f"phosphene-{(scope.get('server') or ('', 0))[1]}"


def cookies(headers: Headers) -> dict[str, str]:
    """Return the request's cookies; none where they cannot be read."""
    try:
        return {name: one.value for name, one in SimpleCookie(headers.get("cookie", "")).items()}
    except CookieError:
        return {}


def cleaned(request: Request) -> Response:
    """Send the browser to the same address without the token, so that it is neither bookmarked nor passed on.

    Where another site linked here, a redirect would still count as its request and carry no cookie: a page that goes
    on by itself does not.
    """
    query = request.scope["query_string"].decode("latin-1")
    rest = [one for one in parse_qsl(query, keep_blank_values=True) if one[0] != "token"]
    path = quote(request.scope["path"].lstrip("/\\"), safe="/~")  # two slashes would begin the name of another host
    address = f"/{path}?{urlencode(rest)}" if rest else f"/{path}"
    if request.headers.get("sec-fetch-site", "none").lower() in ("none", "same-origin"):
        return RedirectResponse(address, 303, {"Cache-Control": "no-store"})
    link = f'<p><a href="{html.escape(address)}">Go on</a></p>'
    page = PAGE.format(title="Phosphene", sentence="The token is right.", more=link)
    return HTMLResponse(page, 200, {"Refresh": f"0; url={address}", "Cache-Control": "no-store"})


def told(request: Request, refused: RequestRefused, more: str = "") -> Response:
    """Return a refusal as a page, or where a script asked as JSON."""
    headers = {"Cache-Control": "no-store"}
    if wants_json(request):
        return JSONResponse({"error": refused.sentence}, refused.status, headers)
    page = PAGE.format(title="This cannot be shown", sentence=html.escape(refused.sentence), more=more)
    return HTMLResponse(page, refused.status, headers)


def wants_json(request: Request) -> bool:
    """Return whether a script asked, not someone who reads pages."""
    return request.method not in READS or str(request.scope["path"]).endswith(".json")


async def bounded_body(request: Request, most: int) -> bytes:
    """Return the body of a request.

    Args:
        most: bytes that it may have.

    Raises:
        HTTPException: 413 where it has more, as soon as that shows; 408 where it takes too long; 400 where there is
            none, or it breaks off.
    """
    try:
        async with asyncio.timeout(SLOWEST):
            return await gathered(request, most)
    except TimeoutError as error:
        raise HTTPException(
            408, f"What was sent took more than {SLOWEST:.0f} s to arrive; send less", {"Connection": "close"}
        ) from error
    except ClientDisconnect as error:
        raise HTTPException(400, "What was sent broke off; send it again") from error


async def gathered(request: Request, most: int) -> bytes:
    """Return the body of a request as long as it is not too large; see `bounded_body`."""
    length = request.headers.get("content-length", "0")
    content = bytearray()
    large = HTTPException(413, f"What was sent is larger than {most / 1e6:,g} MB; send less", {"Connection": "close"})
    if not length.isdecimal() or int(length) > most:
        raise large
    async for chunk in request.stream():
        content += chunk
        if len(content) > most:
            raise large
    if not content:
        raise HTTPException(400, "Nothing was sent; send a photo's bytes, or what the page asks for")
    return bytes(content)
