"""The queue of renders: one at a time, in order, watched and cancelled."""

from __future__ import annotations

import asyncio
import base64
import json
import shlex
import threading
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cli_runner import command_line
from phosphene.atlases.plan import atlas
from phosphene.atlases.run import run
from phosphene.errors import (
    ChannelNotFound,
    EntryNotFound,
    InvalidRequest,
    LayerNotFound,
    RecipeNotFound,
)
from phosphene.images import encode
from phosphene.network.loading import load
from phosphene.rendering.gradient_ascent import Frame
from phosphene.rendering.objectives import channel
from phosphene.rendering.recipes import RECIPES
from phosphene.rendering.render import render
from phosphene.storage.store import open_store
from phosphene.web.live import render_queue
from phosphene.web.live.render_queue import (
    MAX_FRAME_RATE,
    MAX_WAITING,
    MIN_FRAMES,
    Event,
    QueueFull,
    RenderQueue,
    RenderTask,
    ViewerGone,
)
from phosphene.web.live.render_request import RenderRequest, frame_event
from phosphene.web.store_reader import StoreReader
from tiny_atlas import InProcessRunner, tiny_atlas, tiny_model

Untouched = Callable[[nn.Module], AbstractContextManager[None]]

REQUEST = RenderRequest(".0", 1, "fast", 24, 40)


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    folder = tmp_path_factory.mktemp("store")
    run(tiny_atlas(tiny_model(), recipe="fast", channels="0:4"), folder, InProcessRunner())
    return StoreReader([open_store(folder)])


@pytest.fixture(scope="session")
def atlas_id(reader: StoreReader) -> str:
    return reader.atlases()[0].atlas_id


def live(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


async def all_events(task: RenderTask) -> list[Event]:
    """Return everything that is told of a render, to its end."""
    events = [await task.events.get()]
    while events[-1].name not in ("done", "failed"):
        events.append(await task.events.get())
    return events


def bytes_of(uri: str) -> bytes:
    return base64.b64decode(uri.partition(",")[2])


def network_of(queue: RenderQueue) -> nn.Module:
    """Return the network that renders are made with."""
    (entry,) = queue.renders.models.entries.values()
    return entry.value.module


def test_a_render_is_seen_as_it_forms_and_ends_as_the_library_renders_it(
    reader: StoreReader, atlas_id: str, untouched: Untouched
) -> None:
    model = tiny_model()

    async def look_on() -> list[Event]:
        queue = RenderQueue(reader, model=model)
        events = await all_events(await queue.submit(atlas_id, REQUEST))
        queue.close()
        return events

    with untouched(model.module):
        events = live(look_on())
    assert [event.name for event in events[:2]] == ["waiting", "frame"]
    assert events[0].facts == {"place": 0}
    frames = [event.facts for event in events if event.name == "frame"]
    assert (frames[0]["step"], frames[-1]["step"], frames[-1]["steps"]) == (0, 40, 40)
    assert len(frames) >= MIN_FRAMES
    assert len({frame["image"] for frame in frames}) >= 5

    seen: list[Frame] = []
    rendered = render(
        model, channel(".0", [1]), RECIPES["fast"].with_settings(24, 40), size=24, batch=1, watch=seen.append
    )
    done = events[-1].facts
    assert bytes_of(done["image"]) == encode.png(rendered.pictures[0], rendered.metadata(0))
    assert frames[-1]["image"] == frame_event(seen[-1], "clip")["image"]
    assert (done["score"], done["start_score"]) == (float(rendered.scores[0]), float(rendered.start_scores[0]))
    assert (done["dead"], done["plain"]) == (False, bool(rendered.plain[0]))
    by_step = {frame.step: float(frame.scores[0]) for frame in seen}
    assert all(frame["score"] == by_step[frame["step"]] for frame in frames)


def test_whoever_leaves_ends_the_render_and_the_next_one_is_as_ever(reader: StoreReader, atlas_id: str) -> None:
    async def look_on() -> tuple[RenderQueue, list[Event], list[Event]]:
        queue = RenderQueue(reader, model=tiny_model())
        long = await queue.submit(atlas_id, replace(REQUEST, steps=2048))
        while (await long.events.get()).name != "frame":
            pass
        queue.cancel(long)
        started = asyncio.get_running_loop().time()
        while queue.tasks:
            await asyncio.sleep(0.005)
        assert asyncio.get_running_loop().time() - started < 5
        rest = [long.events.get_nowait() for _ in range(long.events.qsize())]
        before = [len(module._forward_hooks) for module in network_of(queue).modules()]
        assert sum(before) == 0
        after = await all_events(await queue.submit(atlas_id, REQUEST))
        queue.close()
        return queue, rest, after

    _, rest, after = live(look_on())
    assert not [event for event in rest if event.name in ("done", "failed")]
    fresh = render(tiny_model(), channel(".0", [1]), RECIPES["fast"].with_settings(24, 40), size=24, batch=1)
    assert bytes_of(after[-1].facts["image"]) == encode.png(fresh.pictures[0], fresh.metadata(0))


def test_each_is_told_the_place_in_the_line_whenever_it_changes(reader: StoreReader, atlas_id: str) -> None:
    async def look_on() -> list[list[int]]:
        queue = RenderQueue(reader, model=tiny_model())
        line = [await queue.submit(atlas_id, replace(REQUEST, steps=2048 if number == 0 else 3)) for number in range(4)]
        assert queue.tasks == line
        queue.cancel(line[1])  # gives up before its turn: the two behind move up
        queue.cancel(line[0])
        await all_events(line[2])
        await all_events(line[3])
        queue.close()
        return positions

    positions: list[list[int]] = [[] for _ in range(4)]

    original = RenderTask.set_position

    def set_position(self: RenderTask, position: int) -> None:
        if position != self.position:
            positions[seen.setdefault(id(self), len(seen))].append(position)
        original(self, position)

    seen: dict[int, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RenderTask, "set_position", set_position)
        assert live(look_on()) == [[0], [1], [2, 1, 0], [3, 2, 1, 0]]


def test_only_one_renders_at_a_time(reader: StoreReader, atlas_id: str) -> None:
    async def look_on() -> None:
        queue = RenderQueue(reader, model=tiny_model())
        line = [await queue.submit(atlas_id, replace(REQUEST, channel=number)) for number in range(3)]
        for task in line:
            events = await all_events(task)
            assert events[-1].name == "done"
        assert [task.started for task in line] == [True] * 3
        order = [min(index for index, (who, _) in enumerate(log) if who == number) for number in range(3)]
        ends = [max(index for index, (who, _) in enumerate(log) if who == number) for number in range(3)]
        assert order[1] > ends[0]
        assert order[2] > ends[1]
        queue.close()

    log: list[tuple[int, int]] = []
    original = RenderTask.watch

    def watch(self: RenderTask, frame: Frame, display: str) -> None:
        log.append((self.request.channel, frame.step))
        original(self, frame, display)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RenderTask, "watch", watch)
        live(look_on())


def test_the_line_has_an_end(reader: StoreReader, atlas_id: str) -> None:
    async def crowd() -> None:
        queue = RenderQueue(reader, model=tiny_model())
        line = [await queue.submit(atlas_id, replace(REQUEST, steps=2048)) for _ in range(MAX_WAITING + 1)]
        with pytest.raises(QueueFull, match="20 renders wait already; try again when some of them are done"):
            await queue.submit(atlas_id, REQUEST)
        queue.cancel(line[5])
        last = await queue.submit(atlas_id, REQUEST)
        assert queue.tasks.index(last) == MAX_WAITING
        queue.close()
        assert queue.tasks == []
        assert (await all_events(last))[-1] == Event("failed", {"error": "the server has been stopped"})

    live(crowd())


def test_frames_come_at_most_eight_times_a_second_but_at_least_twelve_times(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(render_queue, "monotonic", lambda: now[0])

    async def steps(each: float, slow: bool = False) -> list[int]:
        task = RenderTask({}, REQUEST)
        steps_sent = []
        for step in range(101):
            now[0] = step * each
            task.watch(
                Frame(step, 100, torch.tensor([0]), torch.tensor([float(step)]), torch.zeros(1, 3, 4, 4)), "clip"
            )
            await asyncio.sleep(0)
            if not slow:
                steps_sent += [task.events.get_nowait().facts["step"] for _ in range(task.events.qsize())]
        return steps_sent or [task.events.get_nowait().facts["step"] for _ in range(task.events.qsize())]

    # all at once: the start, and each twelfth of the way; 25 steps a second: each fourth of them is 1/8 s on
    assert live(steps(0.0)) == [0, *(-(-100 * part // 12) for part in range(1, 13))]
    steady = live(steps(0.04))
    assert max(later - earlier for earlier, later in pairwise(steady)) == 4
    assert len(steady) <= 4 * MAX_FRAME_RATE + MIN_FRAMES + 1
    # who does not take what is there gets no more than the twelfths
    assert len(live(steps(1.0, slow=True))) <= 9 + 12


def test_a_render_that_nobody_sees_stops() -> None:
    async def leave() -> None:
        task = RenderTask({}, REQUEST)
        task.gone.set()
        with pytest.raises(ViewerGone):
            task.watch(Frame(1, 2, torch.tensor([0]), torch.zeros(1), torch.zeros(1, 3, 4, 4)), "clip")

    live(leave())


def test_what_the_network_has_not_is_refused_before_the_line(reader: StoreReader, atlas_id: str) -> None:
    async def ask(request: RenderRequest, of: str = atlas_id) -> None:
        queue = RenderQueue(reader, model=tiny_model())
        try:
            await queue.submit(of, request)
        finally:
            queue.close()

    refusals: list[tuple[type[Exception], str, RenderRequest]] = [
        (ChannelNotFound, "no channel 6: .0 has 0 to 5", RenderRequest(".0", 6)),
        (LayerNotFound, "no layer 'conv9'", RenderRequest("conv9", 0)),
        (ChannelNotFound, "no channel 6: .1 has 0 to 5", RenderRequest(".1", 6)),  # a layer that the atlas has not
        (RecipeNotFound, "no recipe 'nice'", RenderRequest(".0", 0, "nice")),
        (InvalidRequest, "more work than a server does", RenderRequest(".0", 0, size=512, steps=513)),
    ]
    for kind, words, request in refusals:
        with pytest.raises(kind, match=words):
            live(ask(request))
    with pytest.raises(EntryNotFound):
        live(ask(REQUEST, "nothing"))


def test_a_failure_on_the_way_is_a_sentence_and_the_next_begins(
    reader: StoreReader, atlas_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> dict[str, Any]:
        raise RuntimeError("secret of the house")

    async def look_on() -> None:
        queue = RenderQueue(reader, model=tiny_model())
        with monkeypatch.context() as patch:
            patch.setattr(render_queue, "render_response", fail)
            last = (await all_events(await queue.submit(atlas_id, REQUEST)))[-1]
        assert last == Event("failed", {"error": "something failed here; the server's log says what"})
        assert (await all_events(await queue.submit(atlas_id, REQUEST)))[-1].name == "done"
        queue.close()

    live(look_on())


def test_the_two_threads_share_no_module(reader: StoreReader, atlas_id: str) -> None:
    async def both() -> None:
        queue = RenderQueue(reader, model=tiny_model())
        await all_events(await queue.submit(atlas_id, REQUEST))
        photos = await queue.call(atlas_id, lambda model: {id(module) for module in model.module.modules()})
        assert not photos & {id(module) for module in network_of(queue).modules()}
        names = [await queue.call(atlas_id, lambda _: threading.current_thread().name) for _ in range(3)]
        assert set(names) == {"phosphene-photos_0"}
        queue.close()

    live(both())


def test_the_command_makes_the_very_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load("builtin/efficientnet-lite0")
    run(atlas(model, "_conv_stem", "0:2", "fast", size=32, steps=2), tmp_path / "store", InProcessRunner())
    reader = StoreReader([open_store(tmp_path / "store")])

    async def look_on() -> Event:
        queue = RenderQueue(reader)  # which loads the network by itself
        events = await all_events(
            await queue.submit(reader.atlases()[0].atlas_id, RenderRequest("_conv_stem", 5, steps=4, seed=3))
        )
        queue.close()
        return events[-1]

    done = live(look_on())
    words = shlex.split(done.facts["command"])
    assert words[:4] == ["phosphene", "filters", "builtin/efficientnet-lite0", "_conv_stem"]
    took = json.loads(encode.decode_image(bytes_of(done.facts["image"])).info["phosphene"])["precision"]
    assert words[words.index("--precision") + 1] == took
    assert command_line(monkeypatch, capsys, tmp_path, "")(*words[1:], "--device", "cpu", "--quiet").code == 0
    made = encode.decode_image((tmp_path / words[-1] / "layer__conv_stem_filter_5.png").read_bytes())
    picture = encode.decode_image(bytes_of(done.facts["image"]))
    assert made.tobytes() == picture.tobytes()
    assert picture.size == (32, 32)
