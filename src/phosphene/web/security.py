"""Checks on every request: Host header, Origin, and the access token.

A page on the internet can make a browser send requests to a server on the same machine. It must not read the responses,
which it could if its own name led here (DNS rebinding), so `Host` is checked; and it must not start work here, so
`Origin` and `Sec-Fetch-Site` are checked.
"""

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
PUBLIC_PATHS = re.compile("/healthz|/static/[^/]+")  # need no token: they show nothing of a store
BODY_SECONDS = 30.0  # that a body may take to arrive
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
    """Why a request is refused."""

    status: int
    sentence: str


class SecurityMiddleware:
    """ASGI middleware that passes on requests from the page's own address and, if a token is set, only those with it.

    Args:
        names: the host names of the server; None if it listens on a loopback address only, and answers to no name but
            those of loopback addresses.
        token: the word that every request needs, None if no word is needed.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str] | None = None, token: str | None = None) -> None:
        self.app, self.token = app, token
        self.names = None if names is None else frozenset(name.lower() for name in names)

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

        await (self.early_response(Request(scope)) or self.app)(scope, receive, with_headers)

    def early_response(self, request: Request) -> Response | None:
        """Return the response that replaces the page's, None if the request passes all checks."""
        refusal = check_host(request.headers, self.names) or check_origin(request.method, request.headers)
        if refusal:
            return refusal_response(request, refusal)
        public = PUBLIC_PATHS.fullmatch(request.scope["path"])
        return self.check_token(request, self.token) if self.token and not public else None

    def check_token(self, request: Request, token: str) -> Response | None:
        """Return the response to a request without the token or with it in its address, None if it has the cookie."""
        secret, cookie = hashlib.sha256(token.encode()).hexdigest(), cookie_name(request.scope)
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and same_secret(bearer.strip(), token):
            return None
        if same_secret(cookies(request.headers).get(cookie, ""), secret):
            return None if "token" not in request.query_params else redirect_without_token(request)
        if request.method in READS and same_secret(request.query_params.get("token", ""), token):
            response = redirect_without_token(request)
            response.set_cookie(cookie, secret, httponly=True, samesite="strict", path="/")
            return response
        problem = "That is not the token" if "token" in request.query_params else "This page needs its token"
        sentence = f"{problem}: type it here, or open the address that `phosphene serve` has printed."
        return refusal_response(request, RequestRefused(403, sentence), FORM)


def check_host(headers: Headers, names: frozenset[str] | None) -> RequestRefused | None:
    """Return why the Host header is refused, if it is; see `SecurityMiddleware` for the names."""
    hosts = headers.getlist("host")
    host = host_of(hosts[0]) if len(hosts) == 1 else None
    if host is None:
        return RequestRefused(400, "The request has no Host, or several, or a malformed one; send the page's own.")
    if is_loopback(host) if names is None else is_loopback(host) or is_address(host) or host in names:
        return None
    accepted = "localhost or 127.0.0.1" if names is None else "its address, or by the name given with --host"
    return RequestRefused(421, f"This server does not answer to the name {host}; call it by {accepted}.")


def host_of(header: str) -> str | None:
    """Return the host in a Host header, in lower case and without its port; None if the header is malformed.

    >>> host_of("[::1]:8000"), host_of("LocalHost:80"), host_of("a b")
    ('::1', 'localhost', None)
    """
    bracket, closing, after = header.partition("]")
    if closing:
        host, colon, port = bracket.removeprefix("["), after[:1], after[1:]
        proper = bracket.startswith("[") and is_address(host) and (after == "" or colon == ":")
    else:
        host, colon, port = header.partition(":")
        proper = bool(host) and all(letter.isalnum() or letter in ".-_" for letter in host) and host.isascii()
    return host.lower() if proper and (port.isdecimal() or not colon) else None


def is_address(host: str) -> bool:
    """Return whether a host is an IP address, which unlike a name cannot be made to lead elsewhere."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Return whether a host is always this machine."""
    return host == "localhost" or (is_address(host) and ip_address(host).is_loopback)


def check_origin(method: str, headers: Headers) -> RequestRefused | None:
    """Return why a request that another site made the browser send is refused; links to pages may be followed."""
    origin, host = headers.get("origin"), headers.get("host", "").lower()
    foreign = headers.get("sec-fetch-site", "none").lower() not in ("none", "same-origin")
    followed = method in READS and headers.get("sec-fetch-dest") == "document"
    same_origin = origin is None or origin.lower() in (f"http://{host}", f"https://{host}")
    if same_origin and (followed or not foreign):
        return None
    return RequestRefused(403, "The request came from a page of another site; open this page in a tab of its own.")


def same_secret(text: str, secret: str) -> bool:
    """Compare two texts in a time that does not depend on how much of them is equal."""
    return compare_digest(text.encode("utf-8", "replace"), secret.encode("utf-8", "replace"))


def cookie_name(scope: Scope) -> str:
    """Return the name of the token's cookie, with the port, as servers on one machine share their cookies."""
    return f"phosphene-{(scope.get('server') or ('', 0))[1]}"


def cookies(headers: Headers) -> dict[str, str]:
    """Return the request's cookies; none if they cannot be parsed."""
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(headers.get("cookie", "")).items()}
    except CookieError:
        return {}


def redirect_without_token(request: Request) -> Response:
    """Send the browser to the same address without the token, so that the token is neither bookmarked nor passed on.

    If another site linked here, a redirect would still count as that site's request and carry no cookie; a page that
    refreshes itself does not.
    """
    query = request.scope["query_string"].decode("latin-1")
    rest = [pair for pair in parse_qsl(query, keep_blank_values=True) if pair[0] != "token"]
    path = quote(request.scope["path"].lstrip("/\\"), safe="/~")  # two slashes would begin the name of another host
    address = f"/{path}?{urlencode(rest)}" if rest else f"/{path}"
    if request.headers.get("sec-fetch-site", "none").lower() in ("none", "same-origin"):
        return RedirectResponse(address, 303, {"Cache-Control": "no-store"})
    link = f'<p><a href="{html.escape(address)}">Go on</a></p>'
    page = PAGE.format(title="Phosphene", sentence="The token is right.", more=link)
    return HTMLResponse(page, 200, {"Refresh": f"0; url={address}", "Cache-Control": "no-store"})


def refusal_response(request: Request, refusal: RequestRefused, more: str = "") -> Response:
    """Return a refusal as a page, or as JSON if a script sent the request."""
    headers = {"Cache-Control": "no-store"}
    if wants_json(request):
        return JSONResponse({"error": refusal.sentence}, refusal.status, headers)
    page = PAGE.format(title="This cannot be shown", sentence=html.escape(refusal.sentence), more=more)
    return HTMLResponse(page, refusal.status, headers)


def wants_json(request: Request) -> bool:
    """Return whether a script sent the request, not somebody who reads pages."""
    return request.method not in READS or str(request.scope["path"]).endswith(".json")


async def bounded_body(request: Request, max_bytes: int) -> bytes:
    """Return the body of a request.

    Raises:
        HTTPException: 413 as soon as it has more than `max_bytes`; 408 if it takes too long; 400 if it is empty or
            breaks off.
    """
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await read_body(request, max_bytes)
    except TimeoutError as error:
        raise HTTPException(
            408, f"What was sent took more than {BODY_SECONDS:.0f} s to arrive; send less", {"Connection": "close"}
        ) from error
    except ClientDisconnect as error:
        raise HTTPException(400, "What was sent broke off; send it again") from error


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the body of a request unless it is too large; see `bounded_body`."""
    length = request.headers.get("content-length", "0")
    content = bytearray()
    limit = f"{max_bytes / 1e6:,g} MB"
    large = HTTPException(413, f"What was sent is larger than {limit}; send less", {"Connection": "close"})
    if not length.isdecimal() or int(length) > max_bytes:
        raise large
    async for chunk in request.stream():
        content += chunk
        if len(content) > max_bytes:
            raise large
    if not content:
        raise HTTPException(400, "Nothing was sent; send a photo's bytes, or what the page asks for")
    return bytes(content)
