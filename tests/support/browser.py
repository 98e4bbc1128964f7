"""A real browser, and what it visits: a small atlas and a training run, from a server and as plain files.

A visit fails its test on any error in the browser's console, and on any request to another host.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from torch import Tensor

import phosphene
from fake_training_record import gradient, record_of
from phosphene.atlases.plan import atlas
from phosphene.atlases.run import run
from phosphene.cli.web import trainings
from phosphene.images import encode
from phosphene.network.loading import load
from phosphene.storage.atomic import write_file
from phosphene.web.export import export
from phosphene.web.live.render_queue import RenderQueue
from phosphene.web.live.routes import live_routes
from phosphene.web.server import Server, application, listening, uvicorn_config
from phosphene.web.site import Site
from phosphene.web.store_reader import StoreReader, stores_and_records_at
from tiny_atlas import InProcessRunner

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
LAYERS = ("_blocks.1._depthwise_conv", "_blocks.4._project_conv")
FILTERS, SIDE = 12, 96
WAIT = 15_000  # milliseconds for what a page is to show
CHELSEA = Path(phosphene.__file__).parent / "data/chelsea.jpg"


class Served(NamedTuple):
    """A server under way: where it is, the folder that it shows, and who renders."""

    base: str
    place: Path
    queue: RenderQueue


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of an atlas and a training run."""
    folder = tmp_path_factory.mktemp("page")
    parts_of_chelsea(folder / "photos")
    made = atlas(load("builtin/efficientnet-lite0"), list(LAYERS), f"0:{FILTERS}", "fast", size=SIDE)
    run(made, folder / "shown/atlas", InProcessRunner(), photos=str(folder / "photos"))
    training_run(folder / "shown/flowers")
    return folder / "shown"


def parts_of_chelsea(folder: Path) -> None:
    """Write twelve parts of the photo that ships, which a small atlas is held against."""
    folder.mkdir()
    with Image.open(CHELSEA) as image:
        for number in range(FILTERS):
            left, top = 75 * (number % 4), 70 * (number // 4)
            image.crop((left, top, left + 150, top + 150)).save(folder / f"part {number}.png")


def training_run(folder: Path) -> None:
    """Write the record of a training of four epochs, in the last of which a gradient vanishes."""
    shapes = {"conv1.weight": (6, 3, 5, 5), "conv1.bias": (6,), "conv2.weight": (8, 6, 3, 3), "scores.weight": (5, 8)}
    sizes = {"conv1.weight": 450, "conv1.bias": 6, "conv2.weight": 432, "scores.weight": 40}
    norms = [1.0, 0.5, 0.25, 1e-6]
    record_of(
        folder,
        {
            "conv1": [forming(6, 3, 5, epoch) for epoch in range(4)],
            "conv2": [forming(8, 6, 3, epoch) for epoch in range(4)],
        },
        metrics=[{"loss": 2 / (1 + epoch), "accuracy": 0.2 * epoch + 0.1} for epoch in range(4)],
        gradients=[
            {name: gradient(norm if name == "conv1.weight" else 1.0, size) for name, size in sizes.items()}
            for norm in norms
        ],
        shapes=shapes,
        weight_norm=3.0,
        pictures=("conv2", [(forming(4, 3, 64, epoch) / 2 + 0.5).clamp(0, 1) for epoch in range(4)]),
    )


def forming(count: int, channels: int, side: int, epoch: int) -> Tensor:
    """Return stripes (count, channels, side, side), -1..1, in as many directions; out of noise, epoch by epoch."""
    at = torch.linspace(-1, 1, side)
    turns = torch.arange(count).view(-1, 1, 1, 1) * math.pi / count
    waves = torch.sin(
        side**0.5 * (at[:, None] * turns.sin() + at * turns.cos()) + torch.arange(channels).view(-1, 1, 1)
    )
    noise = torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(epoch))
    return waves * epoch / 3 + noise * (1 - epoch / 3) / 2


@pytest.fixture(scope="module")
def served(place: Path) -> Iterator[Served]:
    """Return a server with all that the page can do."""
    stores, histories, _ = stores_and_records_at(place)
    reader = StoreReader(stores)
    queue = RenderQueue(reader)
    site = Site(reader, trainings(histories), live=True)
    app = application(site, live_routes(queue), on_shutdown=queue.close)
    at, ready = listening("127.0.0.1", 0), threading.Event()
    server = Server(uvicorn_config(app), ready.set, queue.close)
    thread = threading.Thread(target=server.run, args=([at],), daemon=True)
    thread.start()
    assert ready.wait(20)
    yield Served(f"http://127.0.0.1:{at.getsockname()[1]}/", place, queue)
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def exported(place: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return where the same is as plain files."""
    stores, histories, _ = stores_and_records_at(place)
    folder = tmp_path_factory.mktemp("exported") / "site"
    export(Site(StoreReader(stores), trainings(histories)), folder)
    return f"{folder.as_uri()}/"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Return the browser of the machine; its loop is closed before other modules begin theirs."""
    program = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"there is no browser here: install one of {', '.join(PROGRAMS)}")
    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []  # which Chromium refuses to be otherwise
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=as_root)
        yield browser
        browser.close()


@contextmanager
def visiting(browser: Browser, base: str, width: int = 1280, dark: bool = False, script: bool = True) -> Iterator[Page]:
    """Open a page, and fail at the end on errors in its console and on requests to other hosts than that of `base`."""
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme="dark" if dark else "light",
        java_script_enabled=script,
        reduced_motion="reduce",
    )
    context.set_default_timeout(WAIT)
    expect.set_options(timeout=WAIT)
    page, troubles = context.new_page(), list[str]()
    page.on("console", lambda message: troubles.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on(
        "request", lambda request: None if is_own(request.url, base) else troubles.append(f"asked for {request.url}")
    )
    page.on(
        "response", lambda answer: troubles.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None
    )
    try:
        yield page
    finally:
        context.close()
    assert not troubles, "\n".join(troubles)


def is_own(address: str, base: str) -> bool:
    """Return whether an address is the page's own: of its host, or of no host at all."""
    url, root = urlsplit(address), urlsplit(base)
    return url.scheme in ("data", "blob") or (url.scheme, url.netloc) == (root.scheme, root.netloc)


def drop(page: Page, photo: Path, selector: str) -> None:
    """Drop a file on a part of the page, as a hand does that drags it there."""
    spot = page.locator(selector).bounding_box()
    assert spot
    at = {"x": spot["x"] + spot["width"] / 2, "y": spot["y"] + spot["height"] / 2}
    data = {"items": [], "files": [str(photo)], "dragOperationsMask": 1}
    session = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, **at, "data": data})


def check_access(page: Page) -> None:
    """Fail on what people who cannot see, or use no mouse, would run into, if axe calls it serious or critical."""
    violations = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    heavy = [violation for violation in violations if violation["impact"] in ("serious", "critical")]
    assert not heavy, "\n".join(f"{page.url} {violation['id']}: {violation['nodes'][0]['html']}" for violation in heavy)


def look(page: Page, name: str) -> None:
    """Check that all can use a view; keep a picture of it where PHOSPHENE_SCREENSHOTS names a folder, as docs/page."""
    check_access(page)
    if folder := os.environ.get("PHOSPHENE_SCREENSHOTS"):
        picture = encode.decode_image(page.screenshot(full_page=True)).convert("RGB")
        write_file(Path(folder) / f"{name}.webp", encode.webp(picture, 85))  # as PNG a photo would take megabytes
