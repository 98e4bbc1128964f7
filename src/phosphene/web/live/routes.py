"""The live routes: a visitor's photo, and a filter that is rendered while the visitor watches.

The server stores nothing that is sent: a page sends its photo again for every question about it.
"""

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
from phosphene.web.live.accentuation import accentuation
from phosphene.web.live.photo import MAX_UPLOAD, activation_sheet, explanation, layer_choices, read_photo, top_filters
from phosphene.web.live.render_queue import QueueFull, RenderQueue, RenderTask
from phosphene.web.live.render_request import RenderRequest, recipe_choices
from phosphene.web.security import bounded_body

HEARTBEAT = 3.0  # seconds; the longest that a visitor who has left unnoticed keeps a place in the queue
REQUEST_BYTES = 10_000  # of a render request
CLIENT_GONE = 499  # the status of a response that is not sent because nobody waits for it
NO_STORE = {"Cache-Control": "no-store"}
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # with no-store Chromium reports an error


def live_routes(queue: RenderQueue) -> list[Route]:
    """Return the live routes."""
    posts = {
        "photo": photo,
        "excited": excited,
        "activations": activations,
        "accentuated": accentuated,
        "render": render,
    }
    gets = {"layers.json": layers, "recipes.json": recipes}
    routes = [Route("/example.jpg", example)]
    for method, handlers in (("POST", posts), ("GET", gets)):
        for name, handler in handlers.items():
            routes.append(Route(f"/atlas/{{atlas_id}}/{name}", partial(handler, queue), methods=[method]))
    return routes


async def example(request: Request) -> Response:
    """Answer with the photo that is part of the package."""
    content = files("phosphene").joinpath("data/chelsea.jpg").read_bytes()
    return Response(content, media_type="image/jpeg", headers={"Cache-Control": "no-cache"})


async def layers(queue: RenderQueue, request: Request) -> Response:
    """Answer with all layers that have maps, and the names of the classes; loads the network."""
    return await run_on_model(queue, request.path_params["atlas_id"], layer_choices)


async def recipes(queue: RenderQueue, request: Request) -> Response:
    """Answer with the recipes to choose from, and why nothing can be rendered, if so; loads no network."""
    atlas = await queue.atlas(request.path_params["atlas_id"])
    facts = {"model": atlas["model"], "refused": queue.refusal(atlas)}
    return JSONResponse({**recipe_choices(atlas), **facts}, headers=NO_STORE)


async def photo(queue: RenderQueue, request: Request) -> Response:
    """Answer with the classes of the photo in the body, and a heat map on it."""
    query = query_values(request, "method", "layer", "target")
    method, layer, target = query["method"] or "gradcam", query["layer"], query["target"]
    return await run_on_photo(queue, request, lambda model, photo: explanation(model, photo, method, layer, target))


async def excited(queue: RenderQueue, request: Request) -> Response:
    """Answer with the filters of the atlas that the photo in the body excites most."""
    query_values(request)
    atlas_id = request.path_params["atlas_id"]
    return await run_on_photo(queue, request, lambda model, photo: top_filters(model, photo, queue.reader, atlas_id))


async def activations(queue: RenderQueue, request: Request) -> Response:
    """Answer with a picture of the activations of a layer for the photo in the body."""
    layer = query_values(request, "layer")["layer"]
    if layer is None:
        raise InvalidRequest("the activations of a photo are those of a layer; give layer=")
    return await run_on_photo(queue, request, lambda model, photo: activation_sheet(model, photo, layer))


async def accentuated(queue: RenderQueue, request: Request) -> Response:
    """Answer with the photo in the body, and what excites a filter or a layer drawn into it."""
    query = query_values(request, "layer", "channel")
    layer, channel = query["layer"], query["channel"]
    if layer is None:
        raise InvalidRequest("what excites a filter in a photo is that of a layer; give layer=")
    return await run_on_photo(queue, request, lambda model, photo: accentuation(model, photo, layer, channel))


async def render(queue: RenderQueue, request: Request) -> Response:
    """Answer with the events of a render, for as long as the visitor watches."""
    content = await bounded_body(request, REQUEST_BYTES)
    try:
        render_request = RenderRequest.from_json(json.loads(content))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest("a render request is JSON, and this is not") from error
    with refusing_when_full():
        return EventStream(queue, await queue.submit(request.path_params["atlas_id"], render_request))


def query_values(request: Request, *names: str) -> dict[str, str | None]:
    """Return the values of the query, None for those that are empty or missing.

    Raises:
        InvalidRequest: the query has other names.
    """
    unknown = set(request.query_params) - set(names)
    if unknown:
        raise InvalidRequest(f"there is no {min(unknown)[:40]!r} to set here; there is {', '.join(names) or 'nothing'}")
    return {name: request.query_params.get(name) or None for name in names}


@contextmanager
def refusing_when_full() -> Iterator[None]:
    """Answer that the queue is full, if it is.

    Raises:
        HTTPException: 429.
    """
    try:
        yield
    except QueueFull as error:
        raise HTTPException(429, str(error), {"Retry-After": "2"}) from error


async def run_on_model(queue: RenderQueue, atlas_id: str, work: Callable[[Model], Any]) -> Response:
    """Answer with what `work` returns for a network: bytes are WebP, all else is JSON."""
    result = await queue.call(atlas_id, work)
    if isinstance(result, bytes):
        return Response(result, media_type="image/webp", headers=NO_STORE)
    return JSONResponse(result, headers=NO_STORE)


async def run_on_photo(queue: RenderQueue, request: Request, work: Callable[[Model, Tensor], Any]) -> Response:
    """Answer with what `work` returns for a network and the photo in the body."""
    atlas_id = request.path_params["atlas_id"]
    await queue.atlas(atlas_id)  # before the body is read
    with refusing_when_full():
        async with queue.photo_slot():
            bodies = [await bounded_body(request, MAX_UPLOAD)]
            answer = run_on_model(queue, atlas_id, lambda model: work(model, read_photo(bodies.pop(), model)))
            try:
                return await unless_disconnected(request, answer)
            finally:
                bodies.clear()  # the thread's queue holds cancelled work until its turn


async def unless_disconnected(request: Request, response: Coroutine[Any, Any, Response]) -> Response:
    """Return the response unless the client disconnects: work that waits for its turn is then never begun."""
    answer, gone = asyncio.ensure_future(response), asyncio.ensure_future(request.receive())  # the body has been read
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else Response(status_code=CLIENT_GONE)
    finally:
        answer.cancel()
        gone.cancel()


class EventStream(StreamingResponse):
    """The events of a render as they come; if the client disconnects, the render is cancelled."""

    def __init__(self, queue: RenderQueue, task: RenderTask) -> None:
        super().__init__(encoded_events(task), headers=STREAM_HEADERS, media_type="text/event-stream")
        self.queue, self.task = queue, task

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.queue.cancel(self.task)


async def encoded_events(task: RenderTask) -> AsyncIterator[bytes]:
    """Yield the events of a render as server-sent events, and a comment if nothing happens for a while."""
    last = False
    while not last:
        try:
            name, facts = await asyncio.wait_for(task.events.get(), HEARTBEAT)
        except TimeoutError:
            yield b": nothing new\n\n"
            continue
        last = name in ("done", "failed")
        yield f"event: {name}\ndata: {json.dumps(facts, allow_nan=False)}\n\n".encode()
