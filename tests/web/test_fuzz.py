"""The server under requests that nobody means well: no 500, nothing from beside the store, no traceback shown."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from fake_training_record import record_of
from large_store import generated
from phosphene.network.loading import load
from phosphene.web.live.render_queue import RenderQueue
from phosphene.web.live.routes import live_routes
from phosphene.web.security import HEADERS
from phosphene.web.server import application
from phosphene.web.site import Site
from phosphene.web.store_reader import StoreReader, stores_and_records_at
from phosphene.web.views.training import TrainingView

SECRET = "kept beside the store"
HERE = "http://127.0.0.1:8000"


class Attacked(NamedTuple):
    """A server, the digits of its atlas, and all of its paths."""

    at: TestClient
    atlas_id: str
    paths: list[str]

    def ask(self, method: str, address: str, **more: Any) -> Any:
        """Return what is answered, once it is known to give nothing away."""
        answer = self.at.request(method, f"{HERE}/{address}", **more)
        details = (method, address, {name: str(value)[:200] for name, value in more.items()}, answer.status_code)
        assert answer.status_code < 500, details
        assert SECRET.encode() not in answer.content, details
        assert b"Traceback" not in answer.content, details
        assert answer.headers["content-security-policy"] == HEADERS["Content-Security-Policy"], details
        return answer


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    """Serve a folder with a store and a training, with secrets in it, beside it, and in the store."""
    root = tmp_path_factory.mktemp("attacked")
    place = root / "place"
    generated(place / "store", size=32)
    record_of(place / "run 1", {"conv": [torch.randn(4, 3, 3, 3) for _ in range(2)]}, [{"loss": 1.0}, {"loss": 0.5}])
    for folder in (root, place, place / "store", place / "store/jobs", place / "run 1"):
        (folder / "secret.txt").write_text(SECRET)
        (folder / "secret.png").write_text(SECRET)
        (folder / "secret.webp").write_text(SECRET)
    stores, histories, _ = stores_and_records_at(place)
    reader = StoreReader(stores)
    queue = RenderQueue(reader, "cpu", load("large_store:narrow", input_size=64))
    site = Site(reader, [TrainingView(history, "run~201") for history in histories], live=True)
    atlas_id = reader.atlases()[0].atlas_id
    live = ["photo", "activations", "excited", "accentuated", "render", "layers.json", "photo.html"]
    paths = [*site.paths(), "healthz", "", *(f"atlas/{atlas_id}/{name}" for name in live)]
    app = application(site, live_routes(queue), on_shutdown=queue.close)
    with TestClient(app, HERE, raise_server_exceptions=False, follow_redirects=False) as at:
        yield Attacked(at, atlas_id, paths)
    queue.close()


NASTY = (
    *("..", ".", "", "...", "%2e%2e", "%252e%252e", "%2e%2e%2f%2e%2e%2fsecret.txt", "..%5c..%5csecret.txt", "%00"),
    *("secret.txt", "secret.png", "..%2fsecret.png", "~2E~2E~2Fsecret.txt", "~2e~2e", "~", "~2", "~ZZ", "~00", "~FF"),
    *("~C3~28", "~7E", "~~2F", "~F0~9F~98~80", "%FF%FE", "%F0%9F%98%80", "%C2%B2.html", "%D9%A3.html", "-1.html"),
    *(
        "00000000000000000000001.html",
        "99999999999999999999999999.html",
        "1e9.html",
        "0x10.html",
        "+1.html",
        "1_0.html",
    ),
    *("filter_-1.png", "filter_%C2%B2.png", "filter_99999.png", "filter_.png", "film_0.webp", "film_77.webp"),
    *("film_x.webp", "manifest.json", "store.json", "error.json", "figures.safetensors", "evidence.json", "jobs"),
    *("con", "nul", "a" * 300, "a" * 5000, "{{7*7}}", "${x}", "<script>", "';--", "%0d%0aX: 1", "layers.json"),
    *("index.html", "photo.html", "runs", "run~201", "run 1", "kernels_0.png", "kernels_-1.png", "kernels_9.png"),
    *("NaN", "None", "null", "*", "?", "[", "#", "file:", "C:", "etc", "passwd", "%2fetc%2fpasswd", "proc", "self"),
)
METHODS = ("GET", "GET", "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW")
segment = st.one_of(st.sampled_from(NASTY), st.text(max_size=20).map(lambda text: quote(text, safe="")))


@st.composite
def addresses(draw: st.DrawFn, paths: list[str]) -> str:
    """Draw the address of something that there is, with a few of its parts exchanged, or one out of nothing."""
    parts = draw(st.sampled_from(paths)).split("/")
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(parts)))
        parts[at : at + draw(st.integers(0, 1))] = [draw(segment)]
    query = draw(st.one_of(st.just(""), st.text(max_size=30).map(lambda text: f"?{quote(text, safe='=&')}")))
    return "/".join(parts) + query


def check_addresses(attacked: Attacked, count: int) -> None:
    """Ask for addresses of all kinds."""

    @settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.sampled_from(METHODS), addresses(attacked.paths), st.binary(max_size=40))
    def check(method: str, address: str, body: bytes) -> None:
        attacked.ask(method, address, content=body if method in ("POST", "PUT", "PATCH") else b"")

    check()


def test_every_page_is_there(attacked: Attacked) -> None:
    posts = {
        f"atlas/{attacked.atlas_id}/{name}" for name in ("photo", "activations", "excited", "accentuated", "render")
    }
    for path in attacked.paths:
        answer = attacked.ask("GET", quote(path, safe="/~"))
        assert answer.status_code == (404 if path in posts else 200), path


def test_addresses(attacked: Attacked) -> None:
    check_addresses(attacked, 120)


@pytest.mark.slow
def test_many_addresses(attacked: Attacked) -> None:
    check_addresses(attacked, 5_000)


def check_parts(attacked: Attacked, step: int) -> None:
    """Exchange each part of an address in turn, of each kind of address one, for every so-manieth of what is nasty."""
    named = {
        "/".join("x" if any(map(str.isdigit, part)) else part for part in path.split("/")): path
        for path in attacked.paths
    }
    number = 0
    for path in named.values():
        parts = path.split("/")
        for at in range(len(parts)):
            number += 1
            for nasty in NASTY[number % step :: step]:
                attacked.ask("GET", "/".join([*parts[:at], nasty, *parts[at + 1 :]]))


def test_parts_of_addresses(attacked: Attacked) -> None:
    check_parts(attacked, 12)


@pytest.mark.slow
def test_all_parts_of_addresses(attacked: Attacked) -> None:
    check_parts(attacked, 1)


def check_queries(attacked: Attacked, count: int) -> None:
    """Send a photo with all kinds of wishes."""
    value = st.one_of(
        st.sampled_from(["gradcam", ".0", ".3", "0", "1", "tabby", "-1", "", "999999999999999999999", "nan", "²"]),
        st.text(max_size=12),
    )
    names = st.sampled_from(["method", "layer", "channel", "target", "x", "", "layer[]"])

    @settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(
        st.sampled_from(["photo", "activations", "excited", "accentuated"]),
        st.lists(st.tuples(names, value), max_size=3),
    )
    def check(endpoint: str, query: list[tuple[str, str]]) -> None:
        attacked.ask("POST", f"atlas/{attacked.atlas_id}/{endpoint}", params=query, content=jpeg())

    check()


def test_wishes_for_a_photo(attacked: Attacked) -> None:
    check_queries(attacked, 40)


@pytest.mark.slow
def test_many_wishes_for_a_photo(attacked: Attacked) -> None:
    check_queries(attacked, 2_000)


def check_renders(attacked: Attacked, count: int) -> None:
    """Ask for renders of all kinds; of those that are possible, small ones."""
    scalar = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.just([]),
        st.just({}),
    )
    request = st.fixed_dictionaries(
        {},
        optional={
            "layer": st.one_of(st.sampled_from([".0", ".3", "", "*", "nothing"]), scalar),
            "channel": st.one_of(st.integers(-1, 7), scalar),
            "recipe": st.one_of(st.sampled_from(["fast", "max-step", "nothing"]), scalar),
            "seed": scalar,
            "x": scalar,
        },
    )
    small = st.fixed_dictionaries({"size": st.sampled_from([16, 15, 0, 10**9]), "steps": st.sampled_from([1, 0])})
    body = st.one_of(st.tuples(small, request).map(lambda two: {**two[0], **two[1]}), scalar, st.lists(scalar))

    @settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(body)
    def check(body: Any) -> None:
        answer = attacked.ask("POST", f"atlas/{attacked.atlas_id}/render", content=json.dumps(body))
        if answer.status_code == 200:
            assert answer.headers["content-type"].startswith("text/event-stream")

    check()


def test_renders(attacked: Attacked) -> None:
    check_renders(attacked, 40)


@pytest.mark.slow
def test_many_renders(attacked: Attacked) -> None:
    check_renders(attacked, 2_000)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 5000, b"\xff\xfe{}", b'{"layer": NaN}', b"x" * 20_000, b'{"layer":".0","channel":1e999}']
)
def test_what_is_no_json_is_no_render(attacked: Attacked, body: bytes) -> None:
    answer = attacked.ask("POST", f"atlas/{attacked.atlas_id}/render", content=body)
    assert 400 <= answer.status_code < 500
    assert list(answer.json()) == ["error"]


# uploads


def photo() -> Image.Image:
    """Return a photo of 64×48 pixels."""
    rows, columns = np.mgrid[:48, :64]
    return Image.fromarray(np.stack([rows * 5, columns * 3, (rows * columns) % 251], 2).astype(np.uint8))


def saved(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    photo().save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg() -> bytes:
    return saved("JPEG", quality=90)


def chunk(name: bytes, content: bytes, check: int | None = None) -> bytes:
    """Return a chunk of a PNG, with a checksum of its own if one is given."""
    right = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", right if check is None else check)


def png(width: int = 8, height: int = 8, depth: int = 8, colour: int = 2, data: bytes | None = None) -> bytes:
    """Return a PNG whose header says what is given, whatever its data are."""
    packed = zlib.compress(bytes((1 + 24) * 8)) if data is None else data
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def tiff(following: int = 8, entries: tuple[tuple[int, int, int, int], ...] = ()) -> bytes:
    """Return a TIFF whose first directory names the next, by default itself."""
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + table + struct.pack("<I", following)


def bmp(width: int, height: int, bits: int = 24, offset: int = 54) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 0, 0, 2835, 2835, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 12, 0, 0, offset) + head + bytes(12)


def gif(frames: int) -> bytes:
    """Return a GIF of frames of 2×2 pixels."""
    head = b"GIF89a" + struct.pack("<HHBBB", 2, 2, 0x80, 0, 0) + bytes([0, 0, 0, 255, 255, 255])
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 2, 2, 0) + b"\x02\x03\x44\x02\x05\x00"
    return head + frame * frames + b"\x3b"


def with_size(content: bytes, width: int, height: int) -> bytes:
    """Return a JPEG whose frame header says another size."""
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


def malformed() -> dict[str, Callable[[], bytes]]:
    """Return uploads of which none is a photo."""
    whole = jpeg()
    cut = {
        f"JPEG cut at {percent} %": (lambda percent=percent: whole[: len(whole) * percent // 100])
        for percent in range(1, 100)
    }
    kinds = {
        "PNG": saved("PNG"),
        "WEBP": saved("WEBP"),
        "GIF": saved("GIF"),
        "BMP": saved("BMP"),
        "TIFF": saved("TIFF"),
    }
    cut |= {
        f"{kind} cut in half": (lambda content=content: content[: len(content) // 2]) for kind, content in kinds.items()
    }
    cut |= {
        f"the first 10 bytes of a {kind}": (lambda content=content: content[:10]) for kind, content in kinds.items()
    }
    return {
        **cut,
        "nothing": lambda: b"",
        "a zero": lambda: b"\0",
        "a thousand zeros": lambda: bytes(1000),
        "21 MB of zeros": lambda: bytes(21_000_000),
        "21 MB that begin as a JPEG": lambda: whole + bytes(21_000_000),
        "text": lambda: b"a cat on a mat",
        "a page": lambda: b"<!DOCTYPE html><script>alert(1)</script>",
        "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "XML that unfolds": lambda: b'<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;">]><a>&c;</a>',
        "JSON": lambda: b'{"photo": "cat.jpg"}',
        "a form": lambda: b'--x\r\nContent-Disposition: form-data; name="f"\r\n\r\n' + whole + b"\r\n--x--\r\n",
        "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\nshowpage\n",
        "PDF": lambda: b"%PDF-1.7\n1 0 obj << >> endobj\n",
        "ZIP": lambda: b"PK\x03\x04" + bytes(60),
        "a pickle": lambda: b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93",
        "ICO": lambda: struct.pack("<HHH", 0, 1, 1) + bytes(16) + png(),
        "PSD": lambda: b"8BPS\0\1" + bytes(40),
        "PPM": lambda: b"P6 1 1 255 abc",
        "PNG of 65,000 × 65,000": lambda: png(65_000, 65_000),
        "PNG of 2³¹ × 1": lambda: png(2**31 - 1, 1),
        "PNG of no width": lambda: png(0, 8),
        "PNG of no height": lambda: png(8, 0),
        "PNG of 10,000 × 10,000 out of few bytes": lambda: png(10_000, 10_000, data=zlib.compress(bytes(10_000_000))),
        "PNG with a wrong checksum of its header": lambda: png()[:29] + b"\0\0\0\0" + png()[33:],
        "PNG with data that are none": lambda: png(data=b"not packed"),
        "PNG with too few data": lambda: png(80, 80),
        "PNG of depth 7": lambda: png(depth=7),
        "PNG of colour type 9": lambda: png(colour=9),
        "PNG without data": lambda: png()[:33] + chunk(b"IEND", b""),
        "PNG of its first bytes alone": lambda: b"\x89PNG\r\n\x1a\n",
        "PNG with a chunk of 2³¹ bytes": lambda: png()[:33] + struct.pack(">I", 2**31 - 1) + b"IDAT",
        "TIFF that follows itself": lambda: tiff(),
        "TIFF that leads beyond its end": lambda: tiff(10**9),
        "TIFF with offsets into nowhere": lambda: tiff(0, tuple((tag, 4, 1, 2**31) for tag in (256, 257, 273, 279))),
        "TIFF of 60,000 × 60,000": lambda: tiff(0, ((256, 4, 1, 60_000), (257, 4, 1, 60_000), (273, 4, 1, 8))),
        "TIFF with 2³² samples": lambda: tiff(0, ((256, 4, 1, 8), (257, 4, 1, 8), (277, 4, 1, 2**32 - 1))),
        "BMP of 30,000 × 30,000": lambda: bmp(30_000, 30_000),
        "BMP of no size": lambda: bmp(0, 0),
        "BMP of negative size": lambda: bmp(-5, -5),
        "BMP of 5 bits": lambda: bmp(2, 2, 5),
        "BMP whose pixels lie nowhere": lambda: bmp(2, 2, 24, 2**31),
        "JPEG of 65,500 × 65,500": lambda: with_size(whole, 65_500, 65_500),
        "JPEG of no size": lambda: with_size(whole, 0, 0),
        "JPEG of markers alone": lambda: b"\xff\xd8" + b"\xff\xe0\0\x02" * 1000 + b"\xff\xd9",
        "JPEG without tables": lambda: b"\xff\xd8" + whole[whole.index(b"\xff\xc0") :],
        "GIF of no frame": lambda: gif(0),
        "GIF of 65,535 × 65,535": lambda: b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + gif(1)[19:],
        "WebP of a size that it has not": lambda: b"RIFF\xff\xff\xff\x7fWEBPVP8 " + bytes(30),
        "WebP of 16,383 × 16,383": lambda: b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + b"\xfe\x3f\0\xfe\x3f\0",
        "UTF-16": lambda: "cat".encode("utf-16"),
        "a path": lambda: b"../../secret.png",
        "an address": lambda: b"http://127.0.0.1:8000/atlas/x/photo",
        "data:": lambda: b"data:image/png;base64,iVBORw0KGgo=",
    }


MALFORMED = malformed()


def test_uploads_that_are_no_photo(attacked: Attacked) -> None:
    assert len(MALFORMED) >= 150
    for name, made in MALFORMED.items():
        answer = attacked.ask("POST", f"atlas/{attacked.atlas_id}/photo", content=made())
        assert 400 <= answer.status_code < 500, (name, answer.status_code)
        error = answer.json()
        assert list(error) == ["error"], name
        assert len(error["error"]) > 20, (name, error)
        assert "\n" not in error["error"], (name, error)
        assert "secret" not in error["error"], (name, error)
        assert answer.status_code == (413 if name.startswith("21 MB") else 400), (name, answer.status_code)


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ["activations?layer=.0", "excited", "accentuated?layer=.0"])
def test_uploads_that_are_no_photo_anywhere(attacked: Attacked, endpoint: str) -> None:
    for name, made in MALFORMED.items():
        answer = attacked.ask("POST", f"atlas/{attacked.atlas_id}/{endpoint}", content=made())
        assert 400 <= answer.status_code < 500, (name, answer.status_code)
        assert list(answer.json()) == ["error"], name


def test_odd_photos_are_photos(attacked: Attacked) -> None:
    whole = jpeg()
    rubbish = b"\xff\xe1" + struct.pack(">H", 2 + 6 + 40) + b"Exif\0\0" + b"II*\0\xff\xff\xff\xff" + bytes(range(32))
    data = zlib.compress(bytes(25 * 8))
    unchecked = png().replace(chunk(b"IDAT", data), chunk(b"IDAT", data, 1))
    assert unchecked != png()
    odd = {
        "a JPEG with rubbish for EXIF": whole[:2] + rubbish + whole[2:],
        "a JPEG with rubbish after it": whole + b"<script>" * 100,
        "a GIF of 10,000 frames": gif(10_000),
        "a PNG of one pixel": png(1, 1, data=zlib.compress(bytes(4))),
        "a grey PNG of one bit": png(8, 8, 1, 0, zlib.compress(bytes(16))),
        "a PNG whose data have a wrong checksum": unchecked,
        "a TIFF": saved("TIFF"),
    }
    for name, content in odd.items():
        assert attacked.ask("POST", f"atlas/{attacked.atlas_id}/photo", content=content).status_code == 200, name


def test_a_photo_that_is_one_still_is_answered(attacked: Attacked) -> None:
    """After all of this."""
    answer = attacked.ask("POST", f"atlas/{attacked.atlas_id}/photo", content=jpeg())
    assert answer.status_code == 200
    assert answer.json()["picture"].startswith("data:image/")


def test_a_link_in_the_store_leads_nowhere(attacked: Attacked, tmp_path: Path) -> None:
    """A file that no manifest names is none, a link least of all."""
    for name in ("secret.txt", "secret.webp", "secret.png", "store.json", "../secret.txt"):
        for folder in ("evidence", "jobs", f"atlas/{attacked.atlas_id}", "runs/run~201", "static"):
            assert attacked.ask("GET", f"{folder}/{name}").status_code == 404
