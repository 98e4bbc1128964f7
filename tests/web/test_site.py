"""The site: every path gives a page or a file, every link leads to one, and no text from outside becomes markup."""

from __future__ import annotations

import hashlib
import posixpath
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from PIL import Image

from fake_training_record import record_of
from page_store import SECOND, filled
from phosphene.atlases.verdict_text import verdict_words
from phosphene.atlases.verdicts import THRESHOLDS, Verdict
from phosphene.errors import EntryNotFound, PhospheneError, StoreRefused
from phosphene.images.sprites import sprite_sheets
from phosphene.storage.store import digest_of, open_store
from phosphene.web.site import Site
from phosphene.web.store_reader import StoreReader
from phosphene.web.templating import link, render_template
from phosphene.web.urls import filter_href, layer_slug
from phosphene.web.views.filter import filter_view
from phosphene.web.views.training import TrainingView

EVIL = "a\"'><script>alert(1)</script>&amp;{{ 7 * 7 }}"


class Page(HTMLParser):
    """What is in a page: its elements, and what they link to."""

    def __init__(self, body: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(body.decode())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]

    @property
    def links(self) -> Iterator[str]:
        for _, attributes in self.elements:
            yield from (address for name in ("href", "src") if (address := attributes.get(name)))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    history = record_of(folder / "run", {"conv": [torch.ones(2, 3, 3, 3)] * 2}, [{"loss": 2.0}, {"loss": 1.5}])
    return Site(StoreReader([filled(folder)]), [TrainingView(history, "run")])


@pytest.fixture(scope="module")
def atlas_id(site: Site) -> str:
    return site.reader.atlases()[0].atlas_id


def alive(site: Site) -> Site:
    return Site(site.reader, list(site.runs.values()), live=True)


def target(here: str, url: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(here), unquote(url.partition("#")[0])))


def test_every_link_of_every_page_leads_to_a_path_of_the_site(site: Site) -> None:
    paths = list(site.paths())
    path_set, pages = set(paths), [path for path in paths if path.endswith(".html")]
    assert len(path_set) == len(paths)
    assert paths[-1] == "index.html"
    linked = set[str]()
    for here in pages:
        page = Page(site.get(here).body)
        for url in page.links:
            assert "://" not in url
            assert not url.startswith(("/", "#x"))
            if not url.startswith("#"):
                linked.add(target(here, url))
                assert target(here, url) in path_set, f"{here} links to {url}"
    # nothing is written that no page shows; runs make the names of their pictures in the script
    assert {path for path in path_set - linked if not path.startswith("runs/")} <= {
        f"static/{name}" for name in site.static
    }


def test_pages_are_well_made(site: Site, atlas_id: str) -> None:
    """One h1, a title, landmarks; names for all pictures; no style, script or handler inside the page."""
    for place, paths in ((site, list(site.paths())), (alive(site), ["index.html", f"atlas/{atlas_id}/index.html"])):
        for here in (path for path in paths if path.endswith(".html")):
            page = Page(place.get(here).body)
            assert len(page.all("h1")) == len(page.all("main")) == len(page.all("title")) == 1, here
            identities = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
            assert len(set(identities)) == len(identities)
            assert not page.all("style")
            for attributes in page.all("script"):
                assert attributes.get("src"), here
            for _, attributes in page.elements:
                assert "style" not in attributes
                assert not [name for name in attributes if name.startswith("on")]
            assert all(attributes.get("alt") is not None for attributes in page.all("img"))


def test_each_content_has_its_kind_and_a_tag_of_its_bytes(site: Site, atlas_id: str) -> None:
    kinds = {
        "": "text/html; charset=utf-8",
        "static/page.css": "text/css; charset=utf-8",
        "static/browse.js": "text/javascript; charset=utf-8",
        "static/icon.svg": "image/svg+xml",
        f"atlas/{atlas_id}/~2E2/sheet.webp": "image/webp",
        f"atlas/{atlas_id}/~2E2/filter_7.png": "image/png",
        f"atlas/{atlas_id}/~2E2/film_6.webp": "image/webp",
        f"atlas/{atlas_id}/~2E2/kernels.png": "image/png",
    }
    for path, kind in kinds.items():
        page = site.get(path)
        assert page.media_type == kind
        assert page.tag == hashlib.sha256(page.body).hexdigest()[:32]
    assert site.get(f"atlas/{atlas_id}/~2E2/film_6.webp").body == site.get(f"atlas/{atlas_id}/~2E2/film_4.webp").body
    assert site.get(f"atlas/{atlas_id}/").body == site.get(f"atlas/{atlas_id}/index.html").body


@pytest.mark.parametrize(
    "path",
    [
        "index.htm",
        "static/none.css",
        "static/../reader.py",
        "atlas",
        "atlas/000000000000/index.html",
        "atlas/{atlas_id}",
        "atlas/{atlas_id}/photo.html",
        "atlas/{atlas_id}/none/index.html",
        "atlas/{atlas_id}/.2/index.html",
        "atlas/{atlas_id}/~2e2/index.html",
        "atlas/{atlas_id}/~FF/index.html",
        "atlas/{atlas_id}/~2E2/8.html",
        "atlas/{atlas_id}/~2E2/07.html",
        "atlas/{atlas_id}/~2E2/-1.html",
        "atlas/{atlas_id}/~2E2/٣.html",
        "atlas/{atlas_id}/~2E2/9999999999.html",
        "atlas/{atlas_id}/~2E2/filter_8.png",
        "atlas/{atlas_id}/~2E2/film_8.webp",
        "atlas/{atlas_id}/~2E2/manifest.json",
        "atlas/{atlas_id}/~2E2/../../../store.json",
        "atlas/{atlas_id}/~2E2/figures.safetensors",
        "evidence/000000000000/crops_0_0.webp",
        "evidence/{e}/statistics.safetensors",
        "evidence/{e}/evidence.json",
        "evidence/{e}/crops_9_0.webp",
        "runs/none/index.html",
        "runs/run",
        "runs/run/../../manifest.json",
        "/index.html",
        "//",
        "\0",
    ],
)
def test_there_is_nothing_anywhere_else(site: Site, atlas_id: str, path: str) -> None:
    evidence = site.reader.atlas(atlas_id)["evidence"][:12]
    with pytest.raises(EntryNotFound):
        site.get(path.replace("{atlas_id}", atlas_id).replace("{e}", evidence))


def test_the_layer_s_page_has_a_link_a_filter_with_its_figures(site: Site, atlas_id: str) -> None:
    page = Page(site.get(f"atlas/{atlas_id}/~2E2/index.html").body)
    cells = [cell for cell in page.all("li") if "data-c" in cell]
    verdicts = site.reader.verdicts(atlas_id, SECOND)
    assert [(cell["data-v"], cell.get("data-e"), cell["data-c"]) for cell in cells] == [
        (verdict.verdict, str(verdict.excitation), str(verdict.score)) for verdict in verdicts
    ]
    assert [link["id"] for link in page.all("a") if "id" in link] == [f"f{n}" for n in range(8)]
    labels = [svg["aria-label"] for svg in page.all("svg") if svg.get("role") == "img"]
    assert labels[3] == f"filter 3, {verdict_words(verdicts[3].verdict)}, excitation {verdicts[3].excitation:.1f}"
    assert "8 of 8" in page.words


def test_the_filter_s_page_tells_its_verdict_and_how_it_was_made(site: Site, atlas_id: str) -> None:
    words = Page(site.get(f"atlas/{atlas_id}/~2E2/5.html").body).words
    verdict = site.reader.verdicts(atlas_id, SECOND)[5]
    assert verdict.verdict in words
    assert f"{verdict.excitation:.3g}" in words
    for text in ("Filter 5 of .2", "a.png", "fourier (", "3 others at once", "from noise to the finished picture"):
        assert text in words


def test_a_filter_s_page_shows_its_facets_and_its_opposite(tmp_path: Path) -> None:
    store = filled(tmp_path, layers=".0", names=(), facets=3, opposite=True)
    site = Site(StoreReader([store]), [])
    (atlas,) = site.reader.atlases()
    folder = f"atlas/{atlas.atlas_id}/~2E0"
    files = ["filter_1.png", "filter_1_facet_1.png", "filter_1_facet_2.png", "filter_1_opposite.png"]
    page = Page(site.get(f"{folder}/1.html").body)
    assert [image["src"] for image in page.all("img")] == files
    assert "Other pictures of it" in page.words
    row = site.reader.filter(atlas.atlas_id, ".0", 1).picture
    scores = [f"{further['score']:.3g}" for further in (*row["facets"], row["opposite"])]
    assert all(score in page.words for score in scores)
    paths = list(site.paths())
    for name, further in zip(files, (row, *row["facets"], row["opposite"]), strict=True):
        assert f"{folder}/{name}" in paths
        job = row["opposite"]["job"] if further is row["opposite"] else row["job"]
        assert site.get(f"{folder}/{name}").body == store.get("jobs", job, name)
    for ending in ("facet_3", "facet_0", "facet_01", "opposite_facet_1"):
        with pytest.raises(EntryNotFound):
            site.get(f"{folder}/filter_1_{ending}.png")


def test_an_opposite_that_never_left_its_start_is_said_to(tmp_path: Path) -> None:
    store = filled(tmp_path, layers=".0", names=(), opposite=True)
    site = Site(StoreReader([store]), [])
    (atlas,) = site.reader.atlases()
    path = f"atlas/{atlas.atlas_id}/~2E0/1.html"
    assert "suppresses the filter most" in Page(site.get(path).body).words
    view = {**filter_view(site.reader, atlas.atlas_id, ".0", 1)}
    view["opposite"] = [view["opposite"][0]._replace(dead=True)]
    words = Page(render_template("filter.html", path, False, **view)).words
    assert "No picture was found that suppresses the filter" in words
    assert "Other pictures of it" not in words


def test_a_server_has_a_page_of_what_is_not_drawn_yet(site: Site, atlas_id: str) -> None:
    live = alive(site)
    for slug in ("~2E2", "elsewhere"):
        n = 8 if slug == "elsewhere" else 3
        page = Page(live.get(f"atlas/{atlas_id}/{slug}/{n}.html").body)
        assert f"Filter {n} of" in page.words
        assert (page.all("script")[-1]["src"] or "").endswith("static/live.js")
    with pytest.raises(EntryNotFound, match=r"there is no filter 8 in \.2: it has 0 to 7"):
        live.get(f"atlas/{atlas_id}/~2E2/8.html")
    with pytest.raises(EntryNotFound):
        live.get(f"atlas/{atlas_id}/elsewhere/index.html")
    assert Page(live.get(f"atlas/{atlas_id}/photo.html").body).all("h1")
    assert "static/live.js" in set(live.paths())
    assert "static/live.js" not in set(site.paths())


def test_a_page_is_kept_until_its_manifest_changes(site: Site, atlas_id: str, tmp_path: Path) -> None:
    store = open_store(shutil.copytree(site.reader.stores[0].url, tmp_path / "copy"))
    changing = Site(StoreReader([store], seconds=0), [])
    here = f"atlas/{atlas_id}/~2E2/index.html"
    before = changing.get(here)
    assert changing.get(here) is before
    digest = changing.reader.row(atlas_id, SECOND)["digest"]
    manifest = store.manifest("layers", digest)
    files = {name: store.get("layers", digest, name) for name in manifest["files"]}
    store.put("layers", digest, files, {**manifest, "missing": ["one"]})
    assert "1 job of this layer failed" in Page(changing.get(here).body).words
    store.filesystem.remove(f"atlases/{store.done('atlases').pop()}/manifest.json")
    with pytest.raises(EntryNotFound):
        changing.get(here)


def test_damage_is_said_and_not_shown(site: Site, atlas_id: str, tmp_path: Path) -> None:
    copy = shutil.copytree(site.reader.stores[0].url, tmp_path / "copy")
    damaged = Site(StoreReader([open_store(copy)], seconds=0), [])
    for file in copy.glob("jobs/*/filter_2.png"):
        file.write_bytes(b"")
    with pytest.raises(StoreRefused, match=r"filter_2\.png is damaged: it has 0 bytes of"):
        damaged.get(f"atlas/{atlas_id}/~2E2/filter_2.png")
    for file in copy.glob("layers/*/manifest.json"):
        file.write_bytes(b"{")
    with pytest.raises(StoreRefused, match="is damaged: it is no longer JSON; delete"):
        damaged.get(f"atlas/{atlas_id}/~2E2/index.html")


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    name = "\"'><img src=x onerror=alert(1)><script>&lt;.png"
    store = filled(tmp_path, layers=SECOND, names=(name, "b.png"))
    evil = open_store(tmp_path / "evil", create=True)
    atlas_id = put_evil(evil)
    site = Site(StoreReader([store, evil]), [])
    for here in ("index.html", f"atlas/{atlas_id}/index.html", f"atlas/{atlas_id}/{layer_slug(EVIL)}/index.html"):
        page = Page(site.get(here).body)
        assert EVIL in page.words
        assert b"<script>alert" not in site.get(here).body
        assert {script.get("src") for script in page.all("script")} == {link("static/browse.js", here)}
    photo = Page(site.get(next(path for path in site.paths() if path.endswith("/7.html"))).body)
    assert name in photo.words
    assert not any("onerror" in image for image in photo.all("img"))
    assert f"part of photo {name}" in [svg.get("aria-label") for svg in photo.all("svg")]


def put_evil(store: Any) -> str:
    """Put an atlas into a store whose network, layer, notes and versions are named to break out of a page."""
    layer = {
        **{"path": EVIL, "kind": EVIL, "convolution": True, "channels": 2, "size": [4, 4], "in_place": None},
        **{"receptive_field": None, "sees": "whole"},
    }
    verdicts = [Verdict(n, f"filter_{n}", "vivid", 1.0, None, 1.0, 1, None, None) for n in range(2)]
    (sheet,) = sprite_sheets([Image.new("RGB", (8, 8))] * 2, [0, 1])
    pictures = [{"channel": n, "picture": f"filter_{n}", "score": 1.0, "job": "0" * 32} for n in range(2)]
    common = {"model": EVIL, "missing": [EVIL], "evidence": None}
    manifest = {
        **common,
        **{"layer": layer, "jobs": [], "sheets": [sheet.facts], "pictures": pictures, "remark": EVIL},
        **{"thresholds": asdict(THRESHOLDS), "verdicts": [asdict(verdict) for verdict in verdicts]},
    }
    digest = digest_of(layer)
    store.put("layers", digest, {sheet.name: sheet.content}, manifest)
    row = {**layer, "digest": digest, "verdicts": {"vivid": 2}, "strip": None}
    atlas = {
        **common,
        **{"fingerprint": EVIL, "notes": [EVIL], "versions": {EVIL: EVIL}, "layers": [row], "precision": EVIL},
        **{"recipe": {"name": EVIL, "digest": EVIL}, "size": 8, "seeds": [0], "filters": 2, "verdicts": {"vivid": 2}},
    }
    store.put("atlases", "e" * 32, {}, atlas)
    return "e" * 12


def test_an_empty_gallery_says_so() -> None:
    assert "There is no finished atlas here yet" in Page(Site(StoreReader([]), []).get("index.html").body).words


def test_the_index_shows_a_card_an_atlas_and_a_training(site: Site) -> None:
    page = Page(site.get("index.html").body)
    links = [link["href"] for link in page.all("a")]
    assert "runs/run/index.html" in links
    assert "After epoch 1: loss 1.5" in page.words
    assert "2 layers, 14 filters, fourier, 16 px, 4 photos" in page.words


def test_an_atlas_that_is_being_made_is_told_of_by_a_server(site: Site, tmp_path: Path) -> None:
    copy = shutil.copytree(site.reader.stores[0].url, tmp_path / "copy")
    sentence = "An atlas is being made here, or was cut off: 4 jobs are done."
    assert "being made here" not in Page(alive(site).get("index.html").body).words
    shutil.rmtree(copy / "atlases")
    for live in (True, False):
        words = Page(Site(StoreReader([open_store(copy)]), [], live=live).get("index.html").body).words
        assert (sentence in words) is live


def test_names_break_after_their_signs_alone(site: Site, atlas_id: str) -> None:
    body = site.get(f"atlas/{atlas_id}/~2E2/index.html").body
    assert b"<h1>.<wbr>2</h1>" in body
    assert b"<title>.2 of " in body


@pytest.mark.parametrize("path", ["atlas/x/../..", "atlas//index.html", "runs//", "evidence///", "static/"])
def test_odd_paths_are_refused_in_a_sentence(site: Site, path: str) -> None:
    with pytest.raises(PhospheneError):
        site.get(path)


def test_what_could_not_be_read_at_all_is_told_on_the_first_page(site: Site) -> None:
    text = Site(site.reader, [], damaged=["my/run is <damaged>"]).get("index.html").body.decode()
    assert '<p class="note">Not shown: my/run is &lt;damaged&gt;.</p>' in text


def test_an_atlas_whose_photos_are_gone_is_shown_without_them(site: Site, atlas_id: str, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(site.reader.store_of(atlas_id).url, copy)
    shutil.rmtree(copy / "evidence")
    without = Site(StoreReader([open_store(copy)], seconds=0), [])
    atlas = without.reader.atlas(atlas_id)
    path = atlas["layers"][0]["path"]
    n = without.reader.layer(atlas_id, path)["pictures"][0]["channel"]
    sentence = "What photos do to this network cannot be shown: "
    network = without.get(f"atlas/{atlas_id}/index.html").body.decode()
    assert sentence in network
    assert "unknown" in network
    assert sentence in without.get(filter_href(atlas_id, path, n)).body.decode()
    for here in (f"atlas/{atlas_id}/index.html", filter_href(atlas_id, path, n)):
        assert sentence not in site.get(here).body.decode()


def test_a_damaged_atlas_leaves_the_others_their_first_page(site: Site, atlas_id: str, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(site.reader.store_of(atlas_id).url, copy)
    (digest,) = [folder.name for folder in (copy / "atlases").iterdir() if folder.name.startswith(atlas_id)]
    (copy / "atlases" / digest / "manifest.json").write_text("")
    both = Site(StoreReader([site.reader.store_of(atlas_id), open_store(copy)], seconds=0), [])
    assert both.reader.damaged() == []  # of two that are called alike the first counts
    alone = Site(StoreReader([open_store(copy)], seconds=0), [], live=True)
    text = alone.get("index.html").body.decode()
    assert "Not shown: " in text
    assert "manifest.json is damaged: it is no longer JSON; delete" in text
    assert [atlas.atlas_id for atlas in alone.reader.atlases()] == [
        atlas.atlas_id for atlas in site.reader.atlases() if atlas.atlas_id != atlas_id
    ]
    with pytest.raises(StoreRefused, match="is damaged"):
        list(alone.paths())
