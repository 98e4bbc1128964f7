"""The queue of renders, and the two threads in which a server uses networks.

One thread renders and one looks at photos, each with networks of its own: hooks that two threads set on one module
would interfere. Everything else happens in the thread of the event loop.
"""

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
from phosphene.rendering.batches import is_film_frame
from phosphene.rendering.gradient_ascent import Frame
from phosphene.web.live.model_pool import Identity, ModelThread, independent_copy, open_model, refusal
from phosphene.web.live.render_request import RenderRequest, channel_count, frame_event, render_response
from phosphene.web.store_reader import StoreReader

MAX_WAITING = 20  # renders that wait for the running one
PHOTO_SLOTS, MAX_VISITORS = 4, 40  # photos in memory at once, and visitors with a photo, those who wait included
MAX_FRAME_RATE, MIN_FRAMES = 8, 12  # frames a second at most, but at least so many a render
MAX_UNREAD = 8  # frames by which a slow visitor may lag behind

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class QueueFull(Exception):
    """Too many visitors are waiting."""


class ViewerGone(Exception):
    """Ends a render that nobody watches any more."""


class Event(NamedTuple):
    """An event of a render: `waiting`, `frame`, and last `done` or `failed`; facts in JSON terms."""

    name: str
    facts: dict[str, Any]


class RenderTask:
    """A render that a visitor waits for or watches.

    Attributes:
        events: to be sent to the visitor; the last is `done` or `failed`.
        gone: set when nobody watches any more.
        started: whether it was handed to the thread for renders.
    """

    def __init__(self, atlas: Mapping[str, Any], request: RenderRequest) -> None:
        self.atlas, self.request = atlas, request
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.gone = threading.Event()
        self.started = False
        self.position: int | None = None
        self.last_frame = -math.inf  # when it was sent

    def send(self, name: str, **facts: Any) -> None:
        """Send an event, from any thread."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, Event(name, facts))
        except RuntimeError:  # the server has ended
            self.gone.set()

    def set_position(self, position: int) -> None:
        """Send the position in the queue if it has changed; 0 is the running render."""
        if position != self.position:
            self.position = position
            self.send("waiting", place=position)

    def watch(self, frame: Frame, display: str) -> None:
        """Send a frame if one is due.

        Raises:
            ViewerGone: nobody watches any more.
        """
        if self.gone.is_set():
            raise ViewerGone
        now = monotonic()
        early = now - self.last_frame < 1 / MAX_FRAME_RATE or self.events.qsize() > MAX_UNREAD
        if early and not is_film_frame(frame, MIN_FRAMES):
            return
        self.last_frame = now
        self.send("frame", **frame_event(frame, display))


class RenderQueue:
    """The networks of a reader's atlases, and the renders that visitors have requested, one at a time.

    Args:
        device: for networks that are loaded here.
        model: a network that is loaded already, for the atlases that were made with it.
    """

    def __init__(self, reader: StoreReader, device: str = "cpu", model: Model | None = None) -> None:
        self.reader = reader
        self.server_model = Identity.of(model) if model else None
        duplicate = independent_copy(model) if model else None
        self.photos = ModelThread("photos", partial(open_model, device=device, server_model=model))
        self.renders = self.photos  # a network that cannot be copied is used by one thread only
        if model is None or duplicate is not None:
            self.renders = ModelThread("renders", partial(open_model, device=device, server_model=duplicate))
        self.tasks: list[RenderTask] = []
        self.photo_slots, self.visitors = asyncio.Semaphore(PHOTO_SLOTS), 0

    async def atlas(self, atlas_id: str) -> Mapping[str, Any]:
        """Return the manifest of an atlas, read outside the event loop.

        Raises:
            EntryNotFound, StoreRefused.
        """
        return await asyncio.to_thread(self.reader.atlas, atlas_id)

    def refusal(self, atlas: Mapping[str, Any]) -> str | None:
        """Return why the network of an atlas cannot be used here, None if no reason is known yet."""
        return refusal(atlas, self.server_model)

    async def call(self, atlas_id: str, work: Callable[[Model], Result]) -> Result:
        """Return what `work` returns for the network of an atlas, in the thread for photos."""
        atlas = await self.atlas(atlas_id)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.photos.thread, lambda: work(self.photos.model(atlas)))

    @asynccontextmanager
    async def photo_slot(self) -> AsyncIterator[None]:
        """Wait until another photo may be in memory.

        Raises:
            QueueFull: too many visitors wait.
        """
        if self.visitors >= MAX_VISITORS:
            raise QueueFull(f"{MAX_VISITORS} people are showing a photo now; try again in a moment")
        self.visitors += 1
        try:
            async with self.photo_slots:
                yield
        finally:
            self.visitors -= 1

    async def submit(self, atlas_id: str, request: RenderRequest) -> RenderTask:
        """Return a render, which waits for its turn.

        Raises:
            QueueFull: too many renders wait.
            EntryNotFound, LayerNotFound, LayerRefused, ChannelNotFound, RecipeNotFound, InvalidRequest: what is
                requested does not exist, or is too much. ModelRefused and the like: the network cannot be opened.
        """
        atlas = await self.atlas(atlas_id)
        request.settings(atlas)
        await self.check(atlas_id, atlas, request)
        if len(self.tasks) > MAX_WAITING:
            raise QueueFull(f"{MAX_WAITING} renders wait already; try again when some of them are done")
        task = RenderTask(atlas, request)
        self.tasks.append(task)
        self.start_next()
        return task

    async def check(self, atlas_id: str, atlas: Mapping[str, Any], request: RenderRequest) -> None:
        """Refuse a filter that the network does not have; loads it only for a layer that is not in the atlas."""
        counts: dict[str, int] = {row["path"]: row["channels"] for row in atlas["layers"]}
        count = counts.get(request.layer)
        if count is None:
            count = await self.call(atlas_id, lambda model: channel_count(model, request.layer))
        if request.channel >= count:
            raise ChannelNotFound(f"there is no channel {request.channel}: {request.layer} has 0 to {count - 1}")

    def cancel(self, task: RenderTask) -> None:
        """Stop a render that nobody watches any more: it leaves the queue, or ends within a step."""
        task.gone.set()
        if not task.started:
            self.remove(task)

    def start_next(self) -> None:
        """Send everybody the position in the queue, and start the first render."""
        for position, task in enumerate(self.tasks):
            task.set_position(position)
        if self.tasks and not self.tasks[0].started:
            first = self.tasks[0]
            first.started = True
            future = first.loop.run_in_executor(self.renders.thread, self.render, first)
            future.add_done_callback(lambda _: self.remove(first))

    def remove(self, task: RenderTask) -> None:
        """Take a render that has ended or was cancelled out of the queue."""
        if task in self.tasks:
            self.tasks.remove(task)
            self.start_next()

    def render(self, task: RenderTask) -> None:
        """Render, and send the outcome; in the thread for renders."""
        try:
            if not task.gone.is_set():
                model = self.renders.model(task.atlas)
                task.send("done", **render_response(model, task.atlas, task.request, task.watch))
        except ViewerGone:
            pass
        except PhospheneError as error:
            task.send("failed", error=str(error))
        except Exception:
            log.exception("a render failed")
            task.send("failed", error="something failed here; the server's log says what")

    def close(self) -> None:
        """End the running render, and start no more."""
        tasks, self.tasks = self.tasks, []
        for task in tasks:
            task.gone.set()
            task.send("failed", error="the server has been stopped")
        for model_thread in {self.photos, self.renders}:
            model_thread.close()
