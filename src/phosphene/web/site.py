"""The site: the content of each path. A server answers with it, an export writes it to files."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from phosphene.errors import EntryNotFound
from phosphene.inspection.attribution_methods import CAMS, INPUT_METHODS
from phosphene.web.cache import SizedCache
from phosphene.web.store_reader import StoreReader, picture_files
from phosphene.web.templating import render_template
from phosphene.web.urls import evidence_href, file_href, filter_href, layer_href, layer_path, layer_slug, network_href
from phosphene.web.views.atlas import atlas_cards, layer_view, network_view
from phosphene.web.views.filter import filter_view, unrendered_view
from phosphene.web.views.training import TrainingView

HTML = "text/html; charset=utf-8"
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webp": "image/webp",
}
PAGE_BYTES = 16_000_000  # of cached pages
LIVE = "live.js"  # used by a server only
NUMBER = "(0|[1-9][0-9]{0,8})"  # each number has one spelling
VIEW = re.compile(rf"{NUMBER}\.html")
PICTURE = re.compile(rf"filter_{NUMBER}(_facet_{NUMBER}|_opposite)?\.png")
FILM = re.compile(rf"film_{NUMBER}\.webp")


class Content(NamedTuple):
    """The content of a path.

    Attributes:
        tag: changes when the body does.
    """

    body: bytes
    media_type: str
    tag: str | None


class Site:
    """All pages and files for some stores and training runs. Threads may share one.

    Attributes:
        live: whether a server is behind it, for what plain files cannot do.
        damaged: a sentence on each store or run that cannot be shown.
    """

    def __init__(
        self, reader: StoreReader, runs: Sequence[TrainingView], live: bool = False, damaged: Sequence[str] = ()
    ) -> None:
        self.reader, self.runs, self.live = reader, {run.name: run for run in runs}, live
        self.damaged = tuple(damaged)
        self.pages: SizedCache[Content] = SizedCache(PAGE_BYTES)
        folder = files("phosphene.web").joinpath("static")
        self.static = {file.name: file for file in folder.iterdir() if file.is_file()}
        self.shared = files("phosphene.atlases").joinpath("templates", "shared.css")

    def get(self, path: str) -> Content:
        """Return the content of a path, such as "atlas/1a2b3c4d5e6f/index.html"; a folder stands for its "index.html".

        Raises:
            EntryNotFound: the site has no such path. StoreRefused: what it needs from a store is damaged.
        """
        here = f"{path}index.html" if path == "" or path.endswith("/") else path
        match here.split("/"):
            case ["index.html"]:
                return self.index()
            case ["static", "page.css"]:
                return content(self.shared.read_bytes() + self.static["page.css"].read_bytes(), media_type("page.css"))
            case ["static", name] if name in self.static:
                return content(self.static[name].read_bytes(), media_type(name))
            case ["atlas", atlas_id, "index.html"]:
                return self.view(here, "network.html", lambda: network_view(self.reader, atlas_id), atlas_id)
            case ["atlas", atlas_id, "photo.html"] if self.live:
                return self.view(here, "photo.html", lambda: self.photo_view(atlas_id), atlas_id)
            case ["atlas", atlas_id, slug, name]:
                return self.layer_file(here, atlas_id, path_of(slug), name)
            case ["evidence", digits, name] if name.endswith(".webp"):
                return content(self.reader.evidence_file(digits, name), media_type(name))
            case ["runs", name, *rest] if name in self.runs:
                return self.run_file(here, self.runs[name], "/".join(rest))
        raise nothing(path)

    def paths(self) -> Iterator[str]:
        """Yield the paths of everything that plain files can show, the index last."""
        yield from (f"static/{name}" for name in sorted(self.static) if self.live or name != LIVE)
        evidence: dict[str, None] = {}
        for atlas_id in sorted(self.reader.locations()):
            yield from self.atlas_paths(atlas_id)
            evidence |= dict.fromkeys(self.evidence_paths(atlas_id))
        yield from evidence
        for name, run in self.runs.items():
            yield from (f"runs/{name}/{file}" for file in (*run.files(), "index.html"))
        yield "index.html"

    def atlas_paths(self, atlas_id: str) -> Iterator[str]:
        """Yield the paths of an atlas."""
        for row in self.reader.atlas(atlas_id)["layers"]:
            path, manifest = row["path"], self.reader.layer(atlas_id, row["path"])
            yield from (file_href(atlas_id, path, name) for name in sorted(manifest["files"]))
            first_of_job = dict[str, int]()
            for picture in manifest["pictures"]:
                channel = picture["channel"]
                first_of_job.setdefault(picture["job"], channel)
                yield from (file_href(atlas_id, path, name) for name in picture_files(picture))
                yield filter_href(atlas_id, path, channel)
            for channel in first_of_job.values():
                if "film" in self.reader.filter(atlas_id, path, channel).job:
                    yield file_href(atlas_id, path, f"film_{channel}.webp")
            yield layer_href(atlas_id, path)
        yield network_href(atlas_id)

    def evidence_paths(self, atlas_id: str) -> Iterator[str]:
        """Yield the paths of the photos that an atlas shows."""
        evidence = self.reader.evidence(atlas_id)
        if evidence:
            crops, rows = evidence.about["sheets"], self.reader.atlas(atlas_id)["layers"]
            sheets = [sheet for row in rows for sheet in crops.get(row["path"], ())]
            thumbnails = evidence.about.get("thumbnails", {}).get("sheets", ())
            yield from (evidence_href(evidence.digest, name) for name in (*sheets, *thumbnails))

    def index(self) -> Content:
        """Return the page of all atlases and training runs."""
        cards, runs = atlas_cards(self.reader), [run.card() for run in self.runs.values()]
        jobs = self.reader.unfinished() if self.live else 0  # plain files do not follow an atlas in the making
        damaged = [*self.damaged, *self.reader.damaged()]
        context = {"atlases": cards, "runs": runs, "unfinished": jobs, "damaged": damaged}
        return content(render_template("index.html", "index.html", self.live, **context), HTML)

    def photo_view(self, atlas_id: str) -> dict[str, Any]:
        """Return the context of `photo.html`."""
        atlas = self.reader.atlas(atlas_id)
        return {"atlas_id": atlas_id, "atlas": atlas, "layers": atlas["layers"], "methods": [*CAMS, *INPUT_METHODS]}

    def layer_file(self, here: str, atlas_id: str, path: str, name: str) -> Content:
        """Return the content of a path in the folder of a layer."""
        if name == "index.html":
            return self.view(here, "layer.html", lambda: layer_view(self.reader, atlas_id, path), atlas_id, path)
        if match := VIEW.fullmatch(name):
            return self.filter_page(here, atlas_id, path, int(match[1]))
        if match := PICTURE.fullmatch(name):
            return content(self.reader.job_file(atlas_id, path, int(match[1]), name), "image/png")
        if match := FILM.fullmatch(name):
            return content(self.reader.job_file(atlas_id, path, int(match[1]), "film.webp"), "image/webp")
        return content(self.reader.file(atlas_id, path, name), media_type(name))

    def filter_page(self, here: str, atlas_id: str, path: str, channel: int) -> Content:
        """Return the page of a filter; a server also has one for a filter that is not rendered yet."""
        try:
            context = filter_view(self.reader, atlas_id, path, channel)
        except EntryNotFound:
            if not self.live:
                raise
            context = unrendered_view(self.reader, atlas_id, path, channel)
        return content(render_template("filter.html", here, self.live, **context), HTML)

    def view(self, here: str, template: str, context: Callable[[], dict[str, Any]], *about: str) -> Content:
        """Return the page of an atlas or a layer, which is cached until the manifest of `about` changes."""

        def read(_: object) -> tuple[Content, int]:
            page = content(render_template(template, here, self.live, **context()), HTML)
            return page, len(page.body)

        return self.pages.get((here, self.reader.etag(*about)), read)

    def run_file(self, here: str, run: TrainingView, name: str) -> Content:
        """Return the content of a path in the folder of a training run."""
        if name == "index.html":
            return content(render_template("run.html", here, self.live, **run.view()), HTML)
        return content(*run.file(name))


def content(body: bytes, kind: str) -> Content:
    """Return bytes with their tag."""
    return Content(body, kind, hashlib.sha256(body).hexdigest()[:32])


def media_type(name: str) -> str:
    return MEDIA_TYPES.get(PurePosixPath(name).suffix, "application/octet-stream")


def path_of(slug: str) -> str:
    """Return the layer that a part of a path stands for.

    Raises:
        EntryNotFound: the part is not the slug of a layer.
    """
    path = layer_path(slug)
    if not slug or layer_slug(path) != slug:
        raise nothing(slug)
    return path


def nothing(path: str) -> EntryNotFound:
    return EntryNotFound(f"there is nothing at {path[:200]!r}; begin at index.html")
