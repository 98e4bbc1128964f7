"""The studio: the networks that a server uses, and the line of those who wait for a picture to be rendered.

Two threads work here, one that renders and one that looks at photos, each with networks of its own, for hooks of two
threads on one module would meet. Everything else happens in the thread of the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from time import monotonic
from typing import Any, NamedTuple, TypeVar

from phosphene.errors import ChannelNotFound, PhospheneError
from phosphene.network.model import Model
from phosphene.rendering.gradient_ascent import Frame
from phosphene.rendering.render import is_film_frame
from phosphene.web.live.model_pool import Identity, ModelThread, opened, refusal, second
from phosphene.web.live.render_request import RenderRequest, channels_of, frame_event, render_response
from phosphene.web.store_reader import StoreReader

WAITING = 20  # renders that wait for the one under way
SEATS, VISITORS = 4, 40  # photos that are in memory at once, and those who wait with theirs
OFTEN, LEAST = 8, 12  # frames a second at most, but so many a render at least
UNREAD = 8  # frames that a slow visitor may be behind
FAILED = "something failed here; the server's log says what"

log = logging.getLogger(__name__)
Made = TypeVar("Made")


class QueueFull(Exception):
    """Too many wait already."""


class ViewerGone(Exception):
    """Ends a render that nobody looks at any more."""


class Event(NamedTuple):
    """What is told of a render: `waiting`, `frame`, and last `done` or `failed`; facts in JSON terms."""

    name: str
    facts: dict[str, Any]


class RenderTask:
    """A render that somebody waits for, or looks on at.

    Attributes:
        events: what is to be told; the last is `done` or `failed`.
        gone: set when nobody looks any more.
        begun: whether its turn has come.
    """

    def __init__(self, atlas: Mapping[str, Any], wish: RenderRequest) -> None:
        self.atlas, self.wish = atlas, wish
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.gone = threading.Event()
        self.begun = False
        self.place: int | None = None
        self.shown = -math.inf

    def tell(self, name: str, **facts: Any) -> None:
        """Tell something, from whatever thread."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, Event(name, facts))
        except RuntimeError:  # the server has ended
            self.gone.set()

    def stand(self, place: int) -> None:
        """Tell the place in the line, if it is another than before; 0 is the render under way."""
        if place != self.place:
            self.place = place
            self.tell("waiting", place=place)

    def watch(self, frame: Frame, display: str) -> None:
        """Show a frame where one is due.

        Raises:
            Left: nobody looks any more.
        """
        if self.gone.is_set():
            raise ViewerGone
        now = monotonic()
        early = now - self.shown < 1 / OFTEN or self.events.qsize() > UNREAD
        if early and not is_film_frame(frame, LEAST):
            return
        self.shown = now
        self.tell("frame", **frame_event(frame, display))


class RenderQueue:
    """The networks of a gallery's atlases, each loaded at first use, and the line of renders, one at a time.

    Args:
        device: where networks compute that are loaded here.
        model: a network that was loaded already, for the atlases that were made with it.
    """

    def __init__(self, gallery: StoreReader, device: str = "cpu", model: Model | None = None) -> None:
        self.gallery = gallery
        self.given = Identity.of(model) if model else None
        other = second(model) if model else None
        self.photos = ModelThread("photos", partial(opened, device=device, given=model))
        apart = model is None or other is not None
        self.renders = ModelThread("renders", partial(opened, device=device, given=other)) if apart else self.photos
        self.line: list[RenderTask] = []
        self.seats, self.visitors = asyncio.Semaphore(SEATS), 0

    async def atlas(self, d: str) -> Mapping[str, Any]:
        """Return the manifest of an atlas, read off the event loop.

        Raises:
            EntryNotFound, StoreRefused.
        """
        return await asyncio.to_thread(self.gallery.atlas, d)

    def refusal(self, atlas: Mapping[str, Any]) -> str | None:
        """Return why nothing can be looked at or rendered with an atlas' network, None as far as is known."""
        return refusal(atlas, self.given)

    async def look(self, d: str, work: Callable[[Model], Made]) -> Made:
        """Return what `work` makes of an atlas' network, in the thread for photos."""
        atlas = await self.atlas(d)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.photos.thread, lambda: work(self.photos.network(atlas)))

    @asynccontextmanager
    async def seat(self) -> AsyncIterator[None]:
        """Wait for a place among those who show a photo.

        Raises:
            Full: too many wait.
        """
        if self.visitors >= VISITORS:
            raise QueueFull(f"{VISITORS} people show a photo just now; try again in a moment")
        self.visitors += 1
        try:
            async with self.seats:
                yield
        finally:
            self.visitors -= 1

    async def begin(self, d: str, wish: RenderRequest) -> RenderTask:
        """Return a render, which waits for its turn.

        Raises:
            Full: too many wait.
            EntryNotFound, LayerNotFound, LayerRefused, ChannelNotFound, RecipeNotFound, InvalidRequest: there is no
                such thing to render. ModelRefused and the like: nor the network that would tell.
        """
        atlas = await self.atlas(d)
        wish.settings(atlas)
        await self.check(d, atlas, wish)
        if len(self.line) > WAITING:
            raise QueueFull(f"{WAITING} renders wait already; try again when some of them are done")
        one = RenderTask(atlas, wish)
        self.line.append(one)
        self.move_up()
        return one

    async def check(self, d: str, atlas: Mapping[str, Any], wish: RenderRequest) -> None:
        """Refuse a filter that the network has not; it is loaded only for a layer that the atlas has not."""
        known: dict[str, int] = {one["path"]: one["channels"] for one in atlas["layers"]}
        if wish.layer not in known:
            known[wish.layer] = await self.look(d, lambda model: channels_of(model, wish.layer))
        count = known[wish.layer]
        if wish.channel >= count:
            raise ChannelNotFound(f"there is no channel {wish.channel}: {wish.layer} has 0 to {count - 1}")

    def leave(self, one: RenderTask) -> None:
        """Have nobody look at a render any more: it leaves the line, or ends within a step."""
        one.gone.set()
        if one in self.line and not one.begun:
            self.line.remove(one)
            self.move_up()

    def move_up(self) -> None:
        """Tell everybody the place in the line, and let the first begin."""
        for place, one in enumerate(self.line):
            one.stand(place)
        if self.line and not self.line[0].begun:
            first = self.line[0]
            first.begun = True
            first.loop.run_in_executor(self.renders.thread, self.draw, first).add_done_callback(
                lambda _: self.finished(first)
            )

    def finished(self, one: RenderTask) -> None:
        """Take a render that has ended out of the line."""
        if one in self.line:
            self.line.remove(one)
            self.move_up()

    def draw(self, one: RenderTask) -> None:
        """Render, and tell how it went; in the thread for renders."""
        try:
            if not one.gone.is_set():
                one.tell("done", **render_response(self.renders.network(one.atlas), one.atlas, one.wish, one.watch))
        except ViewerGone:
            pass
        except PhospheneError as error:
            one.tell("failed", error=str(error))
        except Exception:
            log.exception("a render failed")
            one.tell("failed", error=FAILED)

    def close(self) -> None:
        """End what is under way, and begin nothing any more."""
        line, self.line = self.line, []
        for one in line:
            one.gone.set()
            one.tell("failed", error="the server has been stopped")
        for bench in {self.photos, self.renders}:
            bench.close()
