"""The routes of live use: a visitor's photo, and a filter that is rendered while one looks on.

The server keeps nothing of what is sent: a page sends its photo again for whatever it wants to see of it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from torch import Tensor

from phosphene.errors import InvalidRequest
from phosphene.network.model import Model
from phosphene.web.live.photo import BYTES, activation_sheet, explained, maps_of, photo_of, top_filters
from phosphene.web.live.render_queue import QueueFull, RenderQueue, RenderTask
from phosphene.web.live.render_request import RenderRequest, recipes_for
from phosphene.web.security import bounded_body

HEARTBEAT = 3.0  # seconds; the longest that a visitor who has gone unseen keeps a place in the line
WISH = 10_000  # bytes of what a render is asked for with
GONE = 499  # the status of an answer that nobody waits for; it is not sent
FRESH = {"Cache-Control": "no-store"}
STREAMED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # with no-store, Chromium reports it as broken off


def live_routes(studio: RenderQueue) -> list[Route]:
    """Return the routes of live use."""
    posts = {"photo": photo, "excited": excites, "activations": activates, "render": renders}
    gets = {"layers.json": layers, "recipes.json": recipes}
    return [
        Route("/example.jpg", example),
        *(Route(f"/atlas/{{d}}/{name}", partial(one, studio), methods=["POST"]) for name, one in posts.items()),
        *(Route(f"/atlas/{{d}}/{name}", partial(one, studio)) for name, one in gets.items()),
    ]


async def example(request: Request) -> Response:
    """Answer with the photo that ships."""
    content = files("phosphene").joinpath("data/chelsea.jpg").read_bytes()
    return Response(content, media_type="image/jpeg", headers={"Cache-Control": "no-cache"})


async def layers(studio: RenderQueue, request: Request) -> Response:
    """Answer with all layers that have maps, and the names of the classes; loads the network."""
    d = request.path_params["d"]
    return await answered(studio, d, listed)


def listed(model: Model) -> dict[str, Any]:
    """Return what there is to choose from in a network, in JSON terms."""
    maps = maps_of(model)
    flat = {one.path for one in model.layers()} - {one["path"] for one in maps}
    return {"layers": maps, "flat": sorted(flat), "classes": list(model.labels)}


async def recipes(studio: RenderQueue, request: Request) -> Response:
    """Answer with the recipes to render by, and why there is nothing to render, if so; loads no network."""
    atlas = await studio.atlas(request.path_params["d"])
    facts = {"model": atlas["model"], "refused": studio.refusal(atlas)}
    return JSONResponse({**recipes_for(atlas), **facts}, headers=FRESH)


async def photo(studio: RenderQueue, request: Request) -> Response:
    """Answer with the classes of the photo that is sent, and a heat map on it."""
    asked = asked_for(request, "method", "layer", "target")
    method, layer, target = asked["method"] or "gradcam", asked["layer"], asked["target"]
    return await shown(studio, request, lambda model, one: explained(model, one, method, layer, target))


async def excites(studio: RenderQueue, request: Request) -> Response:
    """Answer with the filters of the atlas that the photo excites most."""
    asked_for(request)
    d = request.path_params["d"]
    return await shown(studio, request, lambda model, one: top_filters(model, one, studio.gallery, d))


async def activates(studio: RenderQueue, request: Request) -> Response:
    """Answer with what a layer makes of the photo, as a picture."""
    layer = asked_for(request, "layer")["layer"]
    if layer is None:
        raise InvalidRequest("the activations of a photo are those of a layer; give layer=")
    return await shown(studio, request, lambda model, one: activation_sheet(model, one, layer))


async def renders(studio: RenderQueue, request: Request) -> Response:
    """Answer with the events of a render, for as long as somebody looks."""
    content = await bounded_body(request, WISH)
    try:
        wish = RenderRequest.of(json.loads(content))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest("a render is asked for in JSON, and this is none") from error
    with free():
        return EventStream(studio, await studio.begin(request.path_params["d"], wish))


def asked_for(request: Request, *names: str) -> dict[str, str | None]:
    """Return the parameters of an address, None for those that are empty or not there.

    Raises:
        InvalidRequest: there are others.
    """
    others = set(request.query_params) - set(names)
    if others:
        raise InvalidRequest(f"there is no {min(others)[:40]!r} to set here; there is {', '.join(names) or 'nothing'}")
    return {name: request.query_params.get(name) or None for name in names}


@contextmanager
def free() -> Iterator[None]:
    """Say of what is full that it is.

    Raises:
        HTTPException: 429.
    """
    try:
        yield
    except QueueFull as error:
        raise HTTPException(429, str(error), {"Retry-After": "2"}) from error


async def answered(studio: RenderQueue, d: str, work: Callable[[Model], Any]) -> Response:
    """Answer with what `work` makes of a network: bytes are WebP, all else is JSON."""
    found = await studio.look(d, work)
    if isinstance(found, bytes):
        return Response(found, media_type="image/webp", headers=FRESH)
    return JSONResponse(found, headers=FRESH)


async def shown(studio: RenderQueue, request: Request, work: Callable[[Model, Tensor], Any]) -> Response:
    """Answer with what `work` makes of the photo that is sent."""
    d = request.path_params["d"]
    await studio.atlas(d)  # before the photo is taken in
    with free():
        async with studio.seat():
            held = [await bounded_body(request, BYTES)]
            answering = answered(studio, d, lambda model: work(model, photo_of(held.pop(), model)))
            try:
                return await unless_gone(request, answering)
            finally:
                held.clear()  # the thread's queue keeps what was called off until its turn


async def unless_gone(request: Request, answering: Coroutine[Any, Any, Response]) -> Response:
    """Answer unless whoever asked goes away: what waits for its turn then is never begun."""
    answer, gone = asyncio.ensure_future(answering), asyncio.ensure_future(request.receive())  # all else has come
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else Response(status_code=GONE)
    finally:
        answer.cancel()
        gone.cancel()


class EventStream(StreamingResponse):
    """The events of a render as they come; whoever goes away leaves the line, or ends the render."""

    def __init__(self, studio: RenderQueue, rendering: RenderTask) -> None:
        super().__init__(spelled(rendering), headers=STREAMED, media_type="text/event-stream")
        self.studio, self.rendering = studio, rendering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.studio.leave(self.rendering)


async def spelled(rendering: RenderTask) -> AsyncIterator[bytes]:
    """Yield the events of a render as a server sends them, and a comment where nothing happens for a while."""
    last = False
    while not last:
        try:
            name, facts = await asyncio.wait_for(rendering.events.get(), HEARTBEAT)
        except TimeoutError:
            yield b": nothing new\n\n"
            continue
        last = name in ("done", "failed")
        yield f"event: {name}\ndata: {json.dumps(facts, allow_nan=False)}\n\n".encode()
