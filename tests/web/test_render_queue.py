"""The queue: renders one at a time, in their order, watched and broken off; and which networks it loads."""

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
    LayerRefused,
    ModelNotFound,
    ModelRefused,
    RecipeNotFound,
)
from phosphene.images import encode
from phosphene.network.loading import load
from phosphene.network.model import Model
from phosphene.rendering.gradient_ascent import Frame
from phosphene.rendering.objectives import channel
from phosphene.rendering.recipes import RECIPES
from phosphene.rendering.render import render
from phosphene.storage.store import open_store
from phosphene.web.live import render_queue as render_queue
from phosphene.web.live.model_pool import MAX_MODELS, Identity, ModelThread, independent_copy, open_model, refusal
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
from phosphene.web.live.render_request import RenderRequest, channel_count, frame_event, recipe_choices
from phosphene.web.store_reader import StoreReader
from tiny_atlas import Here, tiny_atlas, tiny_model

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
REQUEST = RenderRequest(".0", 1, "fast", 24, 40)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    folder = tmp_path_factory.mktemp("store")
    run(tiny_atlas(tiny_model(), recipe="fast", channels="0:4"), folder, Here())
    return StoreReader([open_store(folder)])


@pytest.fixture
def atlas_id(reader: StoreReader) -> str:
    return reader.atlases()[0].atlas_id


def live(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


async def told(one: RenderTask) -> list[Event]:
    """Return everything that is told of a render, to its end."""
    events = [await one.events.get()]
    while events[-1].name not in ("done", "failed"):
        events.append(await one.events.get())
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
        events = await told(await queue.submit(atlas_id, REQUEST))
        queue.close()
        return events

    with untouched(model.module):
        events = live(look_on())
    assert [one.name for one in events[:2]] == ["waiting", "frame"]
    assert events[0].facts == {"place": 0}
    frames = [one.facts for one in events if one.name == "frame"]
    assert (frames[0]["step"], frames[-1]["step"], frames[-1]["steps"]) == (0, 40, 40)
    assert len(frames) >= MIN_FRAMES
    assert len({one["image"] for one in frames}) >= 5

    seen: list[Frame] = []
    own = render(model, channel(".0", [1]), RECIPES["fast"].at(24, 40), size=24, batch=1, watch=seen.append)
    done = events[-1].facts
    assert bytes_of(done["image"]) == encode.png(own.pictures[0], own.metadata(0))
    assert frames[-1]["image"] == frame_event(seen[-1], "clip")["image"]
    assert (done["score"], done["start_score"]) == (float(own.scores[0]), float(own.start_scores[0]))
    assert done["dead"] is False
    by_step = {one.step: float(one.scores[0]) for one in seen}
    assert all(one["score"] == by_step[one["step"]] for one in frames)


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
        before = [len(one._forward_hooks) for one in network_of(queue).modules()]
        assert sum(before) == 0
        after = await told(await queue.submit(atlas_id, REQUEST))
        queue.close()
        return queue, rest, after

    _, rest, after = live(look_on())
    assert not [one for one in rest if one.name in ("done", "failed")]
    fresh = render(tiny_model(), channel(".0", [1]), RECIPES["fast"].at(24, 40), size=24, batch=1)
    assert bytes_of(after[-1].facts["image"]) == encode.png(fresh.pictures[0], fresh.metadata(0))


def test_each_is_told_the_place_in_the_line_whenever_it_changes(reader: StoreReader, atlas_id: str) -> None:
    async def look_on() -> list[list[int]]:
        queue = RenderQueue(reader, model=tiny_model())
        line = [await queue.submit(atlas_id, replace(REQUEST, steps=2048 if number == 0 else 3)) for number in range(4)]
        assert queue.tasks == line
        queue.cancel(line[1])  # gives up before its turn: the two behind move up
        queue.cancel(line[0])
        await told(line[2])
        await told_last(line[3])
        queue.close()
        return positions

    positions: list[list[int]] = [[] for _ in range(4)]

    async def told_last(one: RenderTask) -> None:
        await told(one)

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
        for one in line:
            events = await told(one)
            assert events[-1].name == "done"
        assert [one.started for one in line] == [True] * 3
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
        assert (await told(last))[-1] == Event("failed", {"error": "the server has been stopped"})

    live(crowd())


def test_frames_come_at_most_eight_times_a_second_but_at_least_twelve_times(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(render_queue, "monotonic", lambda: now[0])

    async def steps(each: float, slow: bool = False) -> list[int]:
        one = RenderTask({}, REQUEST)
        shown = []
        for step in range(101):
            now[0] = step * each
            one.watch(Frame(step, 100, torch.tensor([0]), torch.tensor([float(step)]), torch.zeros(1, 3, 4, 4)), "clip")
            await asyncio.sleep(0)
            if not slow:
                shown += [one.events.get_nowait().facts["step"] for _ in range(one.events.qsize())]
        return shown or [one.events.get_nowait().facts["step"] for _ in range(one.events.qsize())]

    # all at once: the start, and each twelfth of the way; 25 steps a second: each fourth of them is 1/8 s on
    assert live(steps(0.0)) == [0, *(-(-100 * part // 12) for part in range(1, 13))]
    steady = live(steps(0.04))
    assert max(later - earlier for earlier, later in pairwise(steady)) == 4
    assert len(steady) <= 4 * MAX_FRAME_RATE + MIN_FRAMES + 1
    # who does not take what is there gets no more than the twelfths
    assert len(live(steps(1.0, slow=True))) <= 9 + 12


def test_a_render_that_nobody_sees_stops() -> None:
    async def leave() -> None:
        one = RenderTask({}, REQUEST)
        one.gone.set()
        with pytest.raises(ViewerGone):
            one.watch(Frame(1, 2, torch.tensor([0]), torch.zeros(1), torch.zeros(1, 3, 4, 4)), "clip")

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


def test_a_layer_without_maps_has_no_filters() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(LayerRefused, match="returns no map of channels; choose a convolution"):
        channel_count(load(net, input_size=8), ".3")


def test_a_failure_on_the_way_is_a_sentence_and_the_next_begins(
    reader: StoreReader, atlas_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> dict[str, Any]:
        raise RuntimeError("secret of the house")

    async def look_on() -> None:
        queue = RenderQueue(reader, model=tiny_model())
        with monkeypatch.context() as patch:
            patch.setattr(render_queue, "render_response", fail)
            last = (await told(await queue.submit(atlas_id, REQUEST)))[-1]
        assert last == Event("failed", {"error": "something failed here; the server's log says what"})
        assert (await told(await queue.submit(atlas_id, REQUEST)))[-1].name == "done"
        queue.close()

    live(look_on())


# ---- which networks


def test_a_store_does_not_choose_what_code_is_run() -> None:
    here = {"model": "os:getcwd", "fingerprint": "0" * 16}
    for name in (
        "os:getcwd",
        "model.keras",
        "timm/hf-hub:somebody/else",
        "builtin/../vgg19",
        "torchvision/",
        "keras/a/b",
    ):
        with pytest.raises(ModelRefused, match="to render, start the server with: phosphene serve PLACE --model"):
            open_model({**here, "model": name}, "cpu", None)
    with pytest.raises(ModelRefused, match="was started with is not os:getcwd as this atlas was made with it"):
        open_model(here, "cpu", tiny_model())
    with pytest.raises(ModelRefused, match="--model builtin/vgg19 --weights /etc/passwd, where that file is"):
        open_model({**here, "model": "builtin/vgg19", "options": {"weights": "/etc/passwd"}}, "cpu", None)
    with pytest.raises(ModelNotFound):
        open_model({**here, "model": "builtin/vgg99"}, "cpu", None)


def test_other_weights_under_the_same_name_are_refused() -> None:
    here = {"model": "builtin/efficientnet-lite0", "fingerprint": load("builtin/efficientnet-lite0").fingerprint}
    assert open_model({**here, "input_size": [224, 224]}, "cpu", None).input_size == (224, 224)
    for other in ({"fingerprint": "0" * 16}, {"input_size": [224, 96]}):
        with pytest.raises(ModelRefused, match="has other weights or another input size here than this atlas"):
            open_model({**here, **other}, "cpu", None)


def test_the_given_network_is_taken_where_it_is_the_right_one() -> None:
    model = tiny_model()
    here = {"model": "anything", "fingerprint": model.fingerprint}
    for size in ({}, {"input_size": list(model.input_size)}):  # a store of before tells no size
        assert open_model({**here, **size}, "cpu", model) is model
    with pytest.raises(ModelRefused, match="is not anything as this atlas was made with it"):
        open_model({**here, "input_size": [9, 9]}, "cpu", model)


def test_a_bench_keeps_networks_of_different_input_sizes_apart() -> None:
    thread = ModelThread("test", lambda atlas: load(nn.Conv2d(3, 2, 3), input_size=tuple(atlas["input_size"])))
    here = {"model": "m", "fingerprint": "f"}
    sizes = [thread.model({**here, "input_size": [side, 9]}).input_size for side in (8, 9, 8)]
    assert (sizes, len(thread.models.entries)) == ([(8, 9), (9, 9), (8, 9)], 2)
    thread.close()


def test_what_cannot_be_opened_is_said_before_anything_is_loaded(reader: StoreReader, atlas_id: str) -> None:
    here = {"fingerprint": "0" * 16}
    lead = "To look at photos and to render, start the server with: phosphene serve PLACE --model "
    for name, more in {
        "tinynet:make": "tinynet:make, where that network can be imported.",
        "my nets/own.keras": "'my nets/own.keras', where that file is.",
        "Sequential": "MODEL, where MODEL is the network of this atlas.",
        "timm/hf-hub:somebody/else": "MODEL, where MODEL is the network of this atlas.",
    }.items():
        assert refusal({**here, "model": name}, None) == lead + more
        assert refusal({**here, "model": name}, Identity("0" * 16, (9, 9))) is None
        other = f"The network that this server was started with is not {name} as this atlas was made with it. "
        assert refusal({**here, "model": name}, Identity("1" * 16, (9, 9))) == other + lead + more
        assert refusal({**here, "model": name, "input_size": [9, 8]}, Identity("0" * 16, (9, 9))) == other + lead + more
    assert refusal({**here, "model": "builtin/vgg99"}, None) is None  # which is found out when it is loaded
    for options, words in (
        ({"weights": "none", "input_size": [64, 64]}, "--weights none --input-size 64x64."),
        ({"weights": "my.pt", "std": [0.5]}, "--weights my.pt --std 0.5, where that file is."),
    ):
        told = refusal({**here, "model": "torchvision/vgg11", "options": options}, None)
        assert told == f"{lead}torchvision/vgg11 {words}"
    for model, refused in ((tiny_model(), False), (None, True)):
        queue = RenderQueue(reader, model=model)
        assert (queue.refusal(reader.atlas(atlas_id)) is not None) == refused
        queue.close()


def test_the_two_threads_share_no_module(reader: StoreReader, atlas_id: str) -> None:
    async def both() -> None:
        queue = RenderQueue(reader, model=tiny_model())
        await told(await queue.submit(atlas_id, REQUEST))
        photos = await queue.call(atlas_id, lambda model: {id(one) for one in model.module.modules()})
        assert not photos & {id(one) for one in network_of(queue).modules()}
        names = [await queue.call(atlas_id, lambda _: threading.current_thread().name) for _ in range(3)]
        assert set(names) == {"phosphene-photos_0"}
        queue.close()

    live(both())


def test_a_second_copy_is_the_same_network_on_its_own() -> None:
    model = tiny_model()
    model.layers()
    copied = independent_copy(model)
    assert copied is not None
    assert copied.fingerprint == model.fingerprint
    assert not {id(one) for one in copied.modules.values()} & {id(one) for one in model.module.modules()}
    assert [one.path for one in copied.layers()] == [one.path for one in model.layers()]


class Unique(nn.Conv2d):
    def __deepcopy__(self, memo: object) -> Unique:
        raise RuntimeError("there is only one of me")


def test_a_network_that_cannot_be_copied_is_used_by_one_thread_alone(reader: StoreReader) -> None:
    model = load(nn.Sequential(Unique(3, 4, 3)), input_size=8)
    assert independent_copy(model) is None
    queue = RenderQueue(reader, model=model)
    assert queue.renders is queue.photos
    queue.close()


def test_a_thread_keeps_the_networks_used_last() -> None:
    made: list[str] = []

    def open_model(atlas: Any) -> Model:
        made.append(atlas["model"])
        return tiny_model()

    thread = ModelThread("test", open_model)
    for name in "abcaded":
        thread.model({"model": name, "fingerprint": ""})
    thread.close()
    assert MAX_MODELS == 3
    assert made == ["a", "b", "c", "d", "e"]
    thread.model({"model": "b", "fingerprint": ""})  # which gave way to d
    assert made[-1] == "b"


# ---- what may be asked for


@pytest.mark.parametrize(
    "given",
    [
        None,
        [],
        "layer",
        {},
        {"layer": ".0"},
        {"channel": 1},
        {"layer": ".0", "channel": 1, "batch": 9},
        {"layer": 0, "channel": 1},
        {"layer": ".0", "channel": "1"},
        {"layer": ".0", "channel": None},
        {"layer": ".0", "channel": True},
        {"layer": ".0", "channel": -1},
        {"layer": ".0", "channel": 1.5},
        {"layer": ".0", "channel": float("nan")},
        {"layer": ".0", "channel": 1, "recipe": 7},
        {"layer": ".0", "channel": 1, "size": 15},
        {"layer": ".0", "channel": 1, "size": 513},
        {"layer": ".0", "channel": 1, "steps": 0},
        {"layer": ".0", "channel": 1, "steps": 2049},
        {"layer": ".0", "channel": 1, "seed": -1},
        {"layer": ".0", "channel": 1, "seed": 10**400},
    ],
)
def test_a_wish_that_makes_no_sense_is_refused_in_a_sentence(given: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        RenderRequest.from_json(given)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_what_is_left_open_is_as_in_the_atlas(reader: StoreReader, atlas_id: str) -> None:
    facts = reader.atlas(atlas_id)
    own, size = RenderRequest.from_json({"layer": ".0", "channel": 0}).settings(facts)
    assert (own.name, own.steps, own.seed, size) == ("fast", 3, 0, 16)
    own, size = RenderRequest.from_json(
        {"layer": ".0", "channel": 0, "recipe": "fast", "steps": 9, "seed": 4}
    ).settings(facts)
    assert (own.digest, size) == (RECIPES["fast"].at(steps=9, seed=4).digest, 16)
    other, size = RenderRequest.from_json({"layer": ".0", "channel": 0, "recipe": "rms", "steps": None}).settings(facts)
    assert (other, size) == (RECIPES["rms"], None)


def test_the_recipes_to_choose_from_are_told_with_their_settings(reader: StoreReader, atlas_id: str) -> None:
    told = json.loads(json.dumps(recipe_choices(reader.atlas(atlas_id))))
    assert told["own"] == "fast"
    assert told["recipes"]["fast"] == {"size": 16, "steps": 3, "seed": 0}
    assert set(told["recipes"]) == set(RECIPES)
    assert told["recipes"]["rms"] == {"size": 150, "steps": 40, "seed": 0}


def test_the_command_makes_the_very_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load("builtin/efficientnet-lite0")
    run(atlas(model, "_conv_stem", "0:2", "fast", size=32, steps=2), tmp_path / "store", Here())
    reader = StoreReader([open_store(tmp_path / "store")])

    async def look_on() -> Event:
        queue = RenderQueue(reader)  # which loads the network by itself
        events = await told(
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
    made = encode.decode_image((tmp_path / words[-1]).read_bytes())
    shown = encode.decode_image(bytes_of(done.facts["image"]))
    assert made.tobytes() == shown.tobytes()
    assert shown.size == (32, 32)


def test_a_recipe_without_a_name_has_no_command(tmp_path: Path) -> None:
    model = tiny_model()
    own = replace(RECIPES["fast"].at(16, 3), blur=3, name="mine")
    run(tiny_atlas(model, recipe=own), tmp_path, Here())
    reader = StoreReader([open_store(tmp_path)])

    async def look_on() -> list[Event]:
        queue = RenderQueue(reader, model=model)
        events = await told(await queue.submit(reader.atlases()[0].atlas_id, RenderRequest(".0", 0)))
        queue.close()
        return events

    events = live(look_on())
    assert events[-1].facts["command"] == ""
