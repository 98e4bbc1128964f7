"""Measure the page over a large store: `make bench-page`.

A store of 20,000 filters, one layer of 2,048, is generated (a few minutes; `--store DIR` keeps and reuses it) and
served by `phosphene serve` as a process of its own, with the network that it is of.

`views`: each is opened in headless Chromium with an empty cache. `load` is the end of the load event, `painted` the
frame after the one by which the files of its first pictures were decoded; both count from the click. `first` is the
first time on a fresh server, the others are medians.
`memory`: what the server holds, after its start and after every layer and its sheets were fetched; `model` is what a
process holds that has only loaded the network.
`browsing`: 50 clients walk from the first page to a network, a layer, its sheet, and filters with their pictures, all
at once, as fast as they are answered, while a filter is rendered through the page's own endpoint. The clients share the
processors with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from html import unescape
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import phosphene as ph

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests/support"
CLIENTS, FILTERS = 50, 12  # and how many filters each looks at in its layer
MARKS = {"index": 1.0, "network": 1.0, "layer": 1.5}  # seconds until painted
MEMORY = 300  # MB beyond the model
RENDER = {"channel": 0, "size": 128, "steps": 512}
# only the first pictures are asked about: where they lie is asked of none, as that alone lays all of a long page out
PAINTED = """async () => {
  const pictures = [...document.images, ...document.querySelectorAll("svg image")]
  const files = new Map(pictures.slice(0, 60).map(picture => [picture.src ?? picture.href.baseVal, picture]))
  await Promise.all([...files.values()].map(picture => picture.decode().catch(() => null)))
  await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))
  const [timing] = performance.getEntriesByType("navigation")
  return {load: timing.loadEventEnd / 1000, painted: performance.now() / 1000, pictures: pictures.length,
          requests: 1 + performance.getEntriesByType("resource").length}
}"""
Row = dict[str, Any]


@contextmanager
def serving(store: Path) -> Iterator[tuple[str, int]]:
    """Serve a store and yield its address and the number of the process."""
    command = [sys.executable, "-m", "phosphene", "serve", str(store), "--port", "0", *model_options("--model")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=TESTS, text=True)
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        if not address:
            raise SystemExit("the server did not start; it says why above")
        yield address, process.pid
    finally:
        process.terminate()
        process.wait(20)


def model_options(name: str) -> list[str]:
    """Return the options that name the network."""
    return [name, "large_store:wide", "--input-size", "64"]


def resident(process: int | str) -> float:
    """Return how much memory a process holds, in MB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmRSS"))


def model_alone() -> float:
    """Return what a process holds that has only loaded the network, in MB."""
    code = (
        "import sys; sys.path[:0] = ['.', '../bench']; import phosphene as ph, page; "
        "model = ph.load('large_store:wide', input_size=64); model.layers(); print(page.resident('self'))"
    )
    return float(subprocess.run([sys.executable, "-c", code], cwd=TESTS, capture_output=True, check=True).stdout)


# what a browser sees


def views(address: str, addresses: dict[str, str], rounds: int, chromium: str) -> list[Row]:
    """Return a row a view."""
    from playwright.sync_api import sync_playwright

    visits: dict[str, list[Row]] = {name: [] for name in addresses}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        for _ in range(rounds):
            for name, path in addresses.items():
                with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
                    page = context.new_page()
                    page.goto(urljoin(address, path), wait_until="load")
                    visits[name].append(page.evaluate(PAINTED))
        browser.close()
    return [
        {
            "view": name,
            "first painted s": rows[0]["painted"],
            **{f"{figure} s": statistics.median(row[figure] for row in rows[1:]) for figure in ("load", "painted")},
            "pictures": rows[0]["pictures"],
            "requests": rows[0]["requests"],
            "mark": MARKS.get(name),
        }
        for name, rows in visits.items()
    ]


# what a client sends


@dataclass
class Client:
    """A connection that is kept, and how long its answers took."""

    host: str
    port: int
    times: list[tuple[str, float]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    reader: asyncio.StreamReader | None = None
    writer: asyncio.StreamWriter | None = None

    async def get(self, path: str, kind: str) -> str:
        """Return the text at a path; pictures are read and dropped."""
        began = time.perf_counter()
        try:
            status, body = await self.answer(path)
        except (OSError, ValueError, IndexError, asyncio.IncompleteReadError) as error:
            self.errors.append(f"{path}: {error!r}")
            self.reader = None
            return ""
        self.times.append((kind, time.perf_counter() - began))
        if status != 200:
            self.errors.append(f"{path}: {status}")
        return body.decode() if path.endswith(("/", ".html")) else ""

    async def answer(self, path: str) -> tuple[int, bytes]:
        """Ask, and return status and body."""
        if self.reader is None or self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(self.host, self.port, limit=2**20)
        self.writer.write(f"GET {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n\r\n".encode())
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        length = re.search(r"^content-length: (\d+)", head, re.IGNORECASE | re.MULTILINE)
        body = await self.reader.readexactly(int(length[1])) if length else b""
        return int(head.split()[1]), body


def links(page: str, here: str, wanted: str) -> list[str]:
    """Return the paths that a page links to, or shows, that match a pattern."""
    paths = (urlsplit(urljoin(here, unescape(address))).path for address in re.findall(r'(?:href|src)="([^"#]+)', page))
    return [path for path in dict.fromkeys(paths) if re.search(wanted, path)]


LAYER, FILTER = r"^/atlas/[^/]+/[^/]+/index\.html$", r"/\d+\.html$"
PICTURE, PART = r"\.(png|webp)$", r"^/static/"


async def walk(client: Client, number: int) -> None:
    """Walk as a visitor does: the first page, a network, one of its layers, the filters there."""
    first = await client.get("/", "index")
    for path in links(first, "/", PART):
        await client.get(path, "static")
    for network in links(first, "/", r"^/atlas/[^/]+/index\.html$")[:1]:
        page = await client.get(network, "network")
        for path in links(page, network, PICTURE):
            await client.get(path, "picture")
        layers = links(page, network, LAYER)
        layer = layers[number * 7 % len(layers)]
        grid = await client.get(layer, "layer")
        for path in links(grid, layer, PICTURE):
            await client.get(path, "sheet")
        filters = links(grid, layer, FILTER)
        for step in range(FILTERS):
            here = filters[(number * 31 + step) % len(filters)]
            body = await client.get(here, "filter")
            for path in links(body, here, PICTURE):
                await client.get(path, "picture")


async def rendering(client: Client, path: str, layer: str, frames: list[int]) -> None:
    """Have a filter rendered, again and again, and count the frames that come."""
    body = json.dumps({"layer": layer, **RENDER})
    head = f"POST {path} HTTP/1.1\r\nHost: {client.host}:{client.port}\r\nContent-Length: {len(body)}\r\n\r\n"
    while True:
        reader, writer = await asyncio.open_connection(client.host, client.port, limit=2**24)
        try:
            writer.write((head + body).encode())
            if b" 200 " not in await reader.readline():
                client.errors.append(f"{path}: {(await reader.read(2000)).decode('latin-1')}")
                return
            while line := await reader.readline():
                frames[0] += line.startswith(b"event: frame")
                if line.startswith((b"event: done", b"event: failed")):
                    break
        finally:
            writer.close()


async def browsing(address: str, network: str, layer: str) -> Row:
    """Return what 50 clients met while a filter was rendered."""
    at = urlsplit(address)
    host, port = at.hostname or "", at.port or 80
    clients, frames = [Client(host, port) for _ in range(CLIENTS)], [0]
    render = asyncio.create_task(
        rendering(clients[0], network.replace("index.html", "render"), layer, frames), name="render"
    )
    while not frames[0] and not render.done():
        await asyncio.sleep(0.05)
    before, began = frames[0], time.perf_counter()
    await asyncio.gather(*(walk(client, number) for number, client in enumerate(clients)))
    seconds, frames_rendered = time.perf_counter() - began, frames[0] - before
    render.cancel()
    with suppress(asyncio.CancelledError):
        await render
    times = [time for client in clients for time in client.times]
    kinds = {
        kind: percentiles([seconds for answered, seconds in times if answered == kind])
        for kind in dict.fromkeys(map(first_of, times))
    }
    return {
        "clients": CLIENTS,
        "requests": len(times),
        "seconds": seconds,
        "requests a second": len(times) / seconds,
        "errors": [error for client in clients for error in client.errors],
        "frames rendered meanwhile": frames_rendered,
        "all": percentiles([seconds for _, seconds in times]),
        "kinds": kinds,
    }


def first_of(pair: tuple[str, float]) -> str:
    return pair[0]


def percentiles(times: list[float]) -> Row:
    """Return the median, the 99th percentile and the longest, in seconds."""
    ordered = sorted(times)
    return {
        "count": len(ordered),
        "median s": statistics.median(ordered),
        "99 % s": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
        "longest s": ordered[-1],
    }


async def all_layers(address: str, layers: list[str]) -> list[str]:
    """Open every layer with its sheets once, and return what failed."""
    at = urlsplit(address)
    client = Client(at.hostname or "", at.port or 80)
    for layer in layers:
        page = await client.get(layer, "layer")
        for path in links(page, layer, PICTURE):
            await client.get(path, "sheet")
    return client.errors


def places(address: str) -> tuple[str, list[str]]:
    """Return the paths of the network's view and of its layers'."""

    async def look() -> tuple[str, list[str]]:
        at = urlsplit(address)
        client = Client(at.hostname or "", at.port or 80)
        (network, *_) = links(await client.get("/", "index"), "/", r"^/atlas/[^/]+/index\.html$")
        return network, links(await client.get(network, "network"), network, LAYER)

    return asyncio.run(look())


def measured(store: Path, options: argparse.Namespace) -> Row:
    """Return all figures."""
    manifest = json.loads(next((store / "atlases").glob("*/manifest.json")).read_text())
    rows = manifest["layers"]
    widest = max(range(len(rows)), key=lambda number: rows[number]["channels"])
    model = model_alone()
    with serving(store) as (address, process):
        started = resident(process)
        network, layers = places(address)
        chosen = {
            "index": "/",
            "network": network,
            "layer": layers[widest],
            "filter": layers[widest].replace("index.html", "7.html"),
        }
        view_rows = views(address, chosen, options.rounds + 1, options.chromium)
        failed = asyncio.run(all_layers(address, layers))
        browsed = resident(process)
        load = asyncio.run(browsing(address, network, rows[len(rows) // 2]["path"]))
        loaded = resident(process)
    load["errors"] += failed
    memory = {"model": model, "started": started, "browsed": browsed, "after the load": loaded}
    return {
        "filters": manifest["filters"],
        "widest": rows[widest]["channels"],
        "views": view_rows,
        "memory MB": {**memory, "beyond the model": browsed - model, "mark": MEMORY},
        "browsing": load,
    }


def tell(figures: Row, show: Callable[[str], None] = print) -> None:
    """Print the tables."""
    show(f"{figures['filters']:,} filters; the layer has {figures['widest']:,}")
    show(f"{'view':<10}{'first':>9}{'load':>9}{'painted':>9}{'mark':>7}{'pictures':>10}{'requests':>10}")
    for row in figures["views"]:
        mark = f"{row['mark']:>5.1f} s" if row["mark"] else ""
        times = "".join(f"{row[column]:>7.2f} s" for column in ("first painted s", "load s", "painted s"))
        show(f"{row['view']:<10}{times}{mark:>7}{row['pictures']:>10}{row['requests']:>10}")
    show("\n" + ", ".join(f"{name} {megabytes:,.0f} MB" for name, megabytes in figures["memory MB"].items()))
    load = figures["browsing"]
    show(
        f"\n{load['clients']} clients: {load['requests']:,} requests in {load['seconds']:.1f} s, "
        f"{load['requests a second']:,.0f} a second, {len(load['errors'])} errors, "
        f"{load['frames rendered meanwhile']} frames of a render meanwhile"
    )
    show(f"{'':<10}{'count':>8}{'median':>11}{'99 %':>11}{'longest':>11}")
    for name, row in {"all": load["all"], **load["kinds"]}.items():
        times = "".join(f"{row[column] * 1000:>8.0f} ms" for column in ("median s", "99 % s", "longest s"))
        show(f"{name:<10}{row['count']:>8,}{times}")
    for error in load["errors"][:5]:
        show(f"error: {error}")


def generate(store: Path) -> None:
    """Make the store."""
    print("a store of 20,000 filters is being generated, which takes minutes", flush=True)
    import_module("large_store").generated(store, "large_store:wide")


def main() -> None:
    """Print the tables and write them to bench/results/page.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store", type=Path, help="a generated store, made where it is not there yet")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--out", type=Path, default=HERE / "results/page.json")
    options = parser.parse_args()
    os.chdir(TESTS)  # where the network's module lies
    sys.path.insert(0, str(TESTS))
    with tempfile.TemporaryDirectory() as folder:
        store = (options.store or Path(folder) / "store").absolute()
        if not (store / "store.json").exists():
            generate(store)
        figures = measured(store, options)
    tell(figures)
    machine = {"machine": platform.machine(), "processors": os.cpu_count(), "phosphene": ph.__version__}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**machine, "rounds": options.rounds, **figures}, indent=1) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
