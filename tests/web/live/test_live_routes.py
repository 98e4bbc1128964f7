"""Live use over HTTP: events as they come, uploads that are none, and whatever else is sent."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient
from test_live_photo import classifying, photo, picture, png

from phosphene.atlases.run import run
from phosphene.images import encode
from phosphene.inspection.activations import activations
from phosphene.inspection.explain import explain
from phosphene.network.model import Model
from phosphene.storage.store import open_store
from phosphene.web.live import routes as live
from phosphene.web.live.accentuation import accentuation
from phosphene.web.live.render_queue import MAX_VISITORS, RenderQueue
from phosphene.web.live.routes import live_routes
from phosphene.web.server import application
from phosphene.web.site import Site
from phosphene.web.store_reader import StoreReader
from tiny_atlas import InProcessRunner, tiny_atlas

HERE = "http://127.0.0.1:8000"
CHELSEA = Path(__file__).parents[3] / "src/phosphene/data/chelsea.jpg"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    folder = tmp_path_factory.mktemp("store")
    run(
        tiny_atlas(classifying(), recipe="fast"),
        folder,
        InProcessRunner(),
        photos=[picture(seed=seed) for seed in range(1, 5)],
    )
    return StoreReader([open_store(folder)])


@pytest.fixture(scope="module")
def at(reader: StoreReader) -> str:
    return f"/atlas/{reader.atlases()[0].atlas_id}"


@pytest.fixture(scope="module")
def client(reader: StoreReader) -> Iterator[TestClient]:
    queue = RenderQueue(reader, model=classifying())
    app = application(Site(reader, [], live=True), live_routes(queue))
    with TestClient(app, HERE, raise_server_exceptions=False) as client:
        yield client
    queue.close()


@contextmanager
def serving(reader: StoreReader) -> Iterator[tuple[RenderQueue, int]]:
    """Serve on a free port, and yield the queue and the port."""
    queue = RenderQueue(reader, model=classifying())
    routes = live_routes(queue)
    with closing(socket.create_server(("127.0.0.1", 0))) as at:
        app = application(Site(reader, [], live=True), routes)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [at]})
        thread.start()
        try:
            yield queue, at.getsockname()[1]
        finally:
            queue.close()
            server.should_exit = True
            thread.join(20)


def ask(port: int, path: str, request: dict[str, Any]) -> tuple[HTTPConnection, HTTPResponse]:
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    headers = {"Content-Type": "application/json", "Origin": f"http://127.0.0.1:{port}"}
    connection.request("POST", path, json.dumps(request), headers)
    return connection, connection.getresponse()


def events(answer: HTTPResponse) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the events of a stream, by the standard's rules."""
    name = ""
    for line in answer:
        text = line.decode().rstrip("\n")
        if text.startswith("event: "):
            name = text.removeprefix("event: ")
        elif text.startswith("data: "):
            yield name, json.loads(text.removeprefix("data: "))


def until(true: Any, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(true())


def test_a_render_comes_as_events_over_a_real_connection(reader: StoreReader, at: str) -> None:
    with serving(reader) as (_, port):
        request = {"layer": "conv1", "channel": 2, "recipe": "fast", "size": 24, "steps": 30, "seed": 1}
        connection, answer = ask(port, f"{at}/render", request)
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        received = list(events(answer))
        connection.close()
    assert received[0] == ("waiting", {"place": 0})
    assert received[-1][0] == "done"
    frames = [facts for name, facts in received if name == "frame"]
    assert len({frame["image"] for frame in frames}) >= 5
    assert [frame["step"] for frame in frames] == sorted({frame["step"] for frame in frames})
    first = encode.decode_image(base64.b64decode(frames[0]["image"].partition(",")[2]))
    assert (first.format or "WEBP", first.size) == ("WEBP", (24, 24))
    assert received[-1][1]["image"].startswith("data:image/png;base64,")


def test_going_away_ends_the_render_and_the_line_moves_up(reader: StoreReader, at: str) -> None:
    with serving(reader) as (queue, port):
        request = {"layer": "conv1", "channel": 0, "size": 24, "steps": 2048}
        connections = []
        for place in range(3):
            connection, answer = ask(port, f"{at}/render", request)
            coming = events(answer)
            assert next(coming) == ("waiting", {"place": place})
            connections.append((connection, answer, coming))
        assert next(connections[0][2])[0] == "frame"
        assert len(queue.tasks) == 3

        connections[1][1].close()  # who waits gives up
        connections[1][0].close()
        assert next(connections[2][2]) == ("waiting", {"place": 1})
        connections[0][1].close()  # who looks on goes away
        connections[0][0].close()
        assert next(connections[2][2]) == ("waiting", {"place": 0})
        assert next(connections[2][2])[0] == "frame"
        assert len(queue.tasks) == 1
        connections[2][1].close()
        connections[2][0].close()
        assert until(lambda: not queue.tasks)
        (entry,) = queue.renders.models.entries.values()
        assert sum(len(module._forward_hooks) for module in entry.value.module.modules()) == 0


def test_a_comment_comes_where_nothing_happens(reader: StoreReader, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "HEARTBEAT", 0.05)
    with serving(reader) as (queue, port):
        request = {"layer": "conv1", "channel": 0, "size": 24, "steps": 2048}
        first, _ = ask(port, f"{at}/render", request)
        second, answer = ask(port, f"{at}/render", request)
        lines = [answer.readline() for _ in range(6)]
        assert lines[:2] == [b"event: waiting\n", b'data: {"place": 1}\n']
        assert b": nothing new\n" in lines[3:]
        first.close()
        second.close()
        assert until(lambda: not queue.tasks)


def test_a_full_line_says_so(client: TestClient, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phosphene.web.live.render_queue.MAX_WAITING", -1)
    answer = client.post(f"{at}/render", json={"layer": "conv1", "channel": 0}, headers={"Origin": HERE})
    assert answer.status_code == 429
    assert "renders wait already" in answer.json()["error"]
    assert answer.headers["retry-after"] == "2"


def test_a_photo_gets_what_explain_says(client: TestClient, at: str) -> None:
    query = {"method": "hirescam", "layer": "conv1", "target": "bee"}
    answer = client.post(f"{at}/photo", content=png(picture()), params=query, headers={"Origin": HERE})
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    heat = explain(classifying(), photo(), "bee", layer="conv1", method="hirescam")
    result = answer.json()
    assert result["classes"] == [asdict(score) for score in heat.top]
    assert result["target"] == asdict(heat.target)
    assert base64.b64decode(result["picture"].partition(",")[2]) == encode.webp(heat.overlay(photo(), legend=False), 80)


def test_activations_come_as_a_picture(client: TestClient, at: str) -> None:
    answer = client.post(f"{at}/activations?layer=conv2", content=png(picture()), headers={"Origin": HERE})
    assert answer.headers["content-type"] == "image/webp"
    assert answer.content == encode.webp(activations(classifying(), photo(), ["conv2"]).grid("conv2"), 80)


def test_what_excites_a_filter_comes_drawn_into_the_photo(client: TestClient, at: str) -> None:
    headers = {"Origin": HERE}
    answer = client.post(f"{at}/accentuated?layer=conv2&channel=3", content=png(picture()), headers=headers)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json() == accentuation(classifying(), photo(), "conv2", "3")
    for query, sentence in (("channel=3", "give layer="), ("layer=conv2&channel=10", "there is no 10"), ("x=1", "'x'")):
        refused = client.post(f"{at}/accentuated?{query}", content=png(picture()), headers=headers)
        assert refused.status_code in (400, 404)
        assert sentence in refused.json()["error"]


def test_excited_filters_come_with_their_views(client: TestClient, at: str) -> None:
    result = client.post(f"{at}/excited", content=png(picture()), headers={"Origin": HERE}).json()
    assert (result["photos"], result["size"]) == (4, [16, 16])
    for row in result["strongest"]:
        assert client.get(f"{at}/{row['page']}").status_code == 200
        assert client.get(f"{at}/{row['picture']}").headers["content-type"] == "image/png"


def test_the_layers_and_classes_are_listed(client: TestClient, at: str) -> None:
    result = client.get(f"{at}/layers.json").json()
    assert {"path": "conv2", "kind": "Conv2d", "channels": 10, "size": [12, 12]} in result["layers"]
    assert result["classes"] == ["ant", "bee", "cat", "dog", "elk", "fox"]
    assert set(result["flat"]) == {layer.path for layer in classifying().layers()} - {
        row["path"] for row in result["layers"]
    }
    assert "conv2" not in result["flat"]
    choices = client.get(f"{at}/recipes.json").json()
    assert (choices["own"], choices["model"], choices["refused"]) == ("fast", "Sequential", None)
    assert client.get("/example.jpg").content == CHELSEA.read_bytes()


def bomb(width: int, height: int) -> bytes:
    """Return a PNG that declares a size and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def malformed() -> list[bytes]:
    """Return a hundred uploads that are no photos, or damaged ones."""
    random = np.random.default_rng(0)
    whole = {}
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP"):
        buffer = io.BytesIO()
        picture().save(buffer, kind)
        whole[kind] = buffer.getvalue()
    buffer = io.BytesIO()
    Image.new("F", (4, 4)).save(buffer, "TIFF")
    texts = (
        b"",
        b"\0",
        b"a photo",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n",
    )
    uploads = [*texts, b"{}", b"GIF89a", b"II*\0", b"RIFF0000WEBP", b"BM", b"%PDF-1.7", buffer.getvalue()]
    uploads += [bomb(7000, 6000), bomb(100_000, 100_000), bomb(2**31 - 1, 2**31 - 1), b"\x89PNG\r\n\x1a\n" + bytes(99)]
    uploads += [content[: len(content) * tenth // 10] for content in whole.values() for tenth in range(1, 10)]
    heads = (b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a")
    while len(uploads) < 100:
        uploads.append(heads[len(uploads) % 4] + random.bytes(int(random.integers(1, 4000))))
    return uploads


def test_a_hundred_malformed_uploads_each_get_a_sentence(client: TestClient, at: str) -> None:
    uploads = malformed()
    assert len(uploads) == 100
    for content in uploads:
        answer = client.post(f"{at}/photo", content=content, headers={"Origin": HERE})
        assert 400 <= answer.status_code < 500, content[:40]
        sentence = answer.json()["error"]
        assert "\n" not in sentence
        assert "Traceback" not in sentence
        assert 10 < len(sentence) < 400
    assert client.post(f"{at}/photo", content=png(picture()), headers={"Origin": HERE}).status_code == 200


def test_too_many_bytes_or_pixels_are_refused(client: TestClient, at: str) -> None:
    large = client.post(f"{at}/photo", content=bytes(20_000_001), headers={"Origin": HERE})
    assert large.status_code == 413
    wide = client.post(f"{at}/photo", content=bomb(8000, 5001), headers={"Origin": HERE})
    assert wide.status_code == 400
    assert "more than 40 million pixels" in wide.json()["error"]


def test_a_crowd_is_told_to_come_again(reader: StoreReader, at: str) -> None:
    queue = RenderQueue(reader, model=classifying())
    queue.visitors = MAX_VISITORS
    app = application(Site(reader, [], live=True), live_routes(queue))
    with TestClient(app, HERE) as client:
        answer = client.post(f"{at}/photo", content=png(picture()), headers={"Origin": HERE})
    queue.close()
    assert answer.status_code == 429
    assert answer.json()["error"].startswith("40 people are showing a photo now")


def test_a_photo_whose_sender_has_gone_is_not_looked_at(
    reader: StoreReader, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []

    def read_photo(content: bytes, model: Model) -> torch.Tensor:
        seen.append(content)
        return photo(1)

    monkeypatch.setattr(live, "read_photo", read_photo)
    first, last, free = png(picture(seed=1)), png(picture(seed=2)), threading.Event()
    with serving(reader) as (queue, port):
        queue.photos.thread.submit(free.wait, 10)  # so that all others wait
        headers = {"Origin": f"http://127.0.0.1:{port}"}
        connections = []
        for content in (first, last):
            connection = HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("POST", f"{at}/photo", content, headers)
            connections.append(connection)
            assert until(lambda: queue.photos.thread._work_queue.qsize() == len(connections))
        connections[0].close()
        assert until(lambda: queue.visitors == 1)
        free.set()
        assert connections[1].getresponse().status == 200
        connections[1].close()
    assert seen == [last]


ADDRESSES = st.text(max_size=30) | st.sampled_from(["conv1", "conv2", "mean", "gradcam", "bee", "0", "-1", "../x", "*"])
VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.lists(st.integers(), max_size=3)
)
NAMES = st.sampled_from(["layer", "channel", "recipe", "size", "steps", "seed", "more"])
FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(query=st.dictionaries(st.sampled_from(["method", "layer", "channel", "target", "x"]), ADDRESSES, min_size=1))
def test_whatever_is_asked_of_a_photo_the_answer_is_clear(client: TestClient, at: str, query: dict[str, str]) -> None:
    for kind in ("photo", "activations", "excited", "accentuated"):
        answer = client.post(f"{at}/{kind}", content=png(picture(8, 6)), params=query, headers={"Origin": HERE})
        assert answer.status_code < 500, answer.text
        if answer.status_code != 200:
            assert set(answer.json()) == {"error"}


@FUZZ
@given(request=st.dictionaries(NAMES, VALUES) | VALUES | st.binary(max_size=40))
def test_whatever_is_wished_for_the_answer_is_clear(client: TestClient, at: str, request: Any) -> None:
    content = request if isinstance(request, bytes) else json.dumps(request).encode()
    answer = client.post(f"{at}/render", content=content, headers={"Origin": HERE})
    assert 400 <= answer.status_code < 500, answer.text
    assert set(answer.json()) == {"error"}


def test_an_atlas_that_is_not_there_is_not_found(client: TestClient) -> None:
    for kind in ("photo", "excited", "activations?layer=conv1", "accentuated?layer=conv1", "render"):
        body = {"layer": "conv1", "channel": 0}
        assert client.post(f"/atlas/none/{kind}", json=body, headers={"Origin": HERE}).status_code == 404
    for name in ("layers.json", "recipes.json"):
        assert client.get(f"/atlas/none/{name}").status_code == 404


def test_a_network_that_cannot_be_loaded_is_a_conflict(reader: StoreReader, at: str) -> None:
    queue = RenderQueue(reader)
    app = application(Site(reader, [], live=True), live_routes(queue))
    with TestClient(app, HERE) as client:
        answer = client.post(f"{at}/photo", content=png(picture()), headers={"Origin": HERE})
        events = client.post(f"{at}/render", json={"layer": "conv1", "channel": 0}, headers={"Origin": HERE})
        before = client.get(f"{at}/recipes.json").json()["refused"]
    queue.close()
    assert before.startswith("To look at photos and to render, start the server with: phosphene serve PLACE --model M")
    assert answer.status_code == 409
    assert answer.json()["error"] == before
    assert "event: failed" in events.text
    assert before in events.text


def test_nothing_of_a_photo_stays(client: TestClient, at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    written: list[str] = []
    monkeypatch.setattr(Path, "write_bytes", lambda self, _: written.append(str(self)))
    before = torch.get_rng_state()
    assert client.post(f"{at}/photo", content=CHELSEA.read_bytes(), headers={"Origin": HERE}).status_code == 200
    assert not written
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(before, torch.get_rng_state())
