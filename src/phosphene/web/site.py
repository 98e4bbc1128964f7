"""The site: what lies at which path. A server answers with it, an export writes it out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from phosphene.errors import EntryNotFound
from phosphene.inspection.attribution_methods import CAMS, INPUT_METHODS
from phosphene.web.cache import SizedCache
from phosphene.web.store_reader import StoreReader
from phosphene.web.templating import render_template
from phosphene.web.urls import evidence_href, file_href, filter_href, layer_href, layer_path, layer_slug, network_href
from phosphene.web.views.atlas import cards, layer_view, network_view
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
PAGES = 16_000_000  # bytes of pages that are kept
LIVE = "live.js"  # of use to a server alone
NUMBER = "(0|[1-9][0-9]{0,8})"  # written in one way only
VIEW, PICTURE, FILM = (
    re.compile(one) for one in (rf"{NUMBER}\.html", rf"filter_{NUMBER}\.png", rf"film_{NUMBER}\.webp")
)


class Content(NamedTuple):
    """What lies at a path.

    Attributes:
        tag: changes when the body does.
    """

    body: bytes
    media_type: str
    tag: str | None


class Site:
    """All pages and files over some stores and training runs. Threads may share one.

    Attributes:
        live: whether a server is behind it, for what plain files cannot do.
        damaged: a sentence on each store or run that cannot be shown.
    """

    def __init__(
        self, gallery: StoreReader, runs: Sequence[TrainingView], live: bool = False, damaged: Sequence[str] = ()
    ) -> None:
        self.gallery, self.runs, self.live = gallery, {one.name: one for one in runs}, live
        self.damaged = tuple(damaged)
        self.pages: SizedCache[Content] = SizedCache(PAGES)
        self.static = {one.name: one for one in files("phosphene.web").joinpath("static").iterdir() if one.is_file()}

    def get(self, path: str) -> Content:
        """Return what lies at a path, such as "atlas/1a2b3c4d5e6f/index.html"; a folder is its "index.html".

        Raises:
            EntryNotFound: nothing does. StoreRefused: it is damaged.
        """
        here = f"{path}index.html" if path == "" or path.endswith("/") else path
        match here.split("/"):
            case ["index.html"]:
                return self.index()
            case ["static", name] if name in self.static:
                return content(self.static[name].read_bytes(), media_type(name))
            case ["atlas", d, "index.html"]:
                return self.view(here, "network.html", lambda: network_view(self.gallery, d), d)
            case ["atlas", d, "photo.html"] if self.live:
                return self.view(here, "photo.html", lambda: self.photo(d), d)
            case ["atlas", d, slug, name]:
                return self.of_layer(here, d, path_of(slug), name)
            case ["evidence", begin, name] if name.endswith(".webp"):
                return content(self.gallery.file_of_evidence(begin, name), media_type(name))
            case ["runs", name, *rest] if name in self.runs:
                return self.of_run(here, self.runs[name], "/".join(rest))
        raise nothing(path)

    def paths(self) -> Iterator[str]:
        """Yield the paths of all that plain files can show, the index last."""
        yield from (f"static/{name}" for name in sorted(self.static) if self.live or name != LIVE)
        shown: dict[str, None] = {}
        for d in sorted(self.gallery.listed()):
            yield from self.paths_of(d)
            shown |= dict.fromkeys(self.paths_of_evidence(d))
        yield from shown
        for name, run in self.runs.items():
            yield from (f"runs/{name}/{one}" for one in (*run.files(), "index.html"))
        yield "index.html"

    def paths_of(self, d: str) -> Iterator[str]:
        """Yield the paths of an atlas."""
        for row in self.gallery.atlas(d)["layers"]:
            path, manifest = row["path"], self.gallery.layer(d, row["path"])
            yield from (file_href(d, path, name) for name in sorted(manifest["files"]))
            first = dict[str, int]()
            for one in manifest["pictures"]:
                first.setdefault(one["job"], one["channel"])
                yield file_href(d, path, f"filter_{one['channel']}.png")
                yield filter_href(d, path, one["channel"])
            films = (n for n in first.values() if "film" in self.gallery.filter(d, path, n).job)
            yield from (file_href(d, path, f"film_{n}.webp") for n in films)
            yield layer_href(d, path)
        yield network_href(d)

    def paths_of_evidence(self, d: str) -> Iterator[str]:
        """Yield the paths of the photos that an atlas shows."""
        found = self.gallery.evidence(d)
        if found:
            sheets = [
                one for row in self.gallery.atlas(d)["layers"] for one in found.about["sheets"].get(row["path"], ())
            ]
            whole = found.about.get("thumbnails", {}).get("sheets", ())
            yield from (evidence_href(found.digest, name) for name in (*sheets, *whole))

    def index(self) -> Content:
        """Return the page of all atlases and training runs."""
        shown = {"atlases": cards(self.gallery), "runs": [one.card() for one in self.runs.values()]}
        jobs = self.gallery.unfinished() if self.live else 0  # of what is being made plain files know nothing
        damaged = [*self.damaged, *self.gallery.damaged()]
        return content(
            render_template("index.html", "index.html", self.live, unfinished=jobs, damaged=damaged, **shown), HTML
        )

    def photo(self, d: str) -> dict[str, Any]:
        """Return what `photo.html` shows."""
        atlas = self.gallery.atlas(d)
        return {"d": d, "atlas": atlas, "layers": atlas["layers"], "methods": [*CAMS, *INPUT_METHODS]}

    def of_layer(self, here: str, d: str, path: str, name: str) -> Content:
        """Return what lies in the folder of a layer."""
        if name == "index.html":
            return self.view(here, "layer.html", lambda: layer_view(self.gallery, d, path), d, path)
        if found := VIEW.fullmatch(name):
            return self.of_filter(here, d, path, int(found[1]))
        if found := PICTURE.fullmatch(name):
            return content(self.gallery.file_of_job(d, path, int(found[1]), name), "image/png")
        if found := FILM.fullmatch(name):
            return content(self.gallery.file_of_job(d, path, int(found[1]), "film.webp"), "image/webp")
        return content(self.gallery.file(d, path, name), media_type(name))

    def of_filter(self, here: str, d: str, path: str, n: int) -> Content:
        """Return the view of a filter: a server has one, too, of what was not drawn yet."""

        def made() -> dict[str, Any]:
            try:
                return filter_view(self.gallery, d, path, n)
            except EntryNotFound:
                if not self.live:
                    raise
                return unrendered_view(self.gallery, d, path, n)

        return content(render_template("filter.html", here, self.live, **made()), HTML)

    def view(self, here: str, template: str, context: Callable[[], dict[str, Any]], *about: str) -> Content:
        """Return the page of an atlas or a layer, which is kept until its manifest changes."""

        def read(_: object) -> tuple[Content, int]:
            made = content(render_template(template, here, self.live, **context()), HTML)
            return made, len(made.body)

        return self.pages.get((here, self.gallery.mark(*about)), read)

    def of_run(self, here: str, run: TrainingView, rest: str) -> Content:
        """Return what lies in the folder of a training run."""
        if rest == "index.html":
            return content(render_template("run.html", here, self.live, **run.view()), HTML)
        return content(*run.file(rest))


def content(body: bytes, kind: str) -> Content:
    """Return bytes with their tag."""
    return Content(body, kind, hashlib.sha256(body).hexdigest()[:32])


def media_type(name: str) -> str:
    return MEDIA_TYPES.get(PurePosixPath(name).suffix, "application/octet-stream")


def path_of(slug: str) -> str:
    """Return the layer that a part of a path means.

    Raises:
        EntryNotFound: it is no layer's.
    """
    path = layer_path(slug)
    if not slug or layer_slug(path) != slug:
        raise nothing(slug)
    return path


def nothing(path: str) -> EntryNotFound:
    return EntryNotFound(f"there is nothing at {path[:200]!r}; begin at index.html")
