"""The report: the page shows what the store holds, whatever that is called, and loads nothing from elsewhere."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from phosphene.atlases import report
from phosphene.atlases.verdict_text import ORDER
from phosphene.atlases.verdicts import THRESHOLDS, Verdict
from phosphene.errors import EntryNotFound, InvalidRequest, StoreRefused
from phosphene.evidence.statistics import Evidence, PhotoStatistics
from phosphene.images.display import Picture
from phosphene.images.sprites import sprite_sheets
from phosphene.storage.store import Store, digest_of, open_store

COLOURS = ((255, 0, 0), (0, 160, 0), (0, 0, 255), (200, 200, 0))
VERDICTS = (
    Verdict(3, "filter_3", "vivid", 12.5, 2.5, 0.9, 1, 1, 0.95),
    Verdict(5, "filter_5", "weak", -0.25, 0.1, 0.8, 2, 3, 0.5),
    Verdict(8, "filter_8", "unstable", 7.0, 3.0, 0.2, 1, 1, None),
    Verdict(130, "filter_130", "dead", 0.0, None, None, 4, None, None),
)
LAYER = {
    "path": "block1",
    "kind": "Conv2d",
    "convolution": True,
    "channels": 256,
    "size": [14, 7],
    "receptive_field": {"size": [5, 3], "stride": [1, 1], "padding": [2, 1]},
    "sees": "part",
    "in_place": None,
}
EVIL = '"><script>alert(1)</script>&amp;'


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store", create=True)


def plain(colour: tuple[int, int, int], side: int = 32) -> Picture:
    return Image.new("RGB", (side, side), colour)


def add_layer(store: Store, verdicts: Sequence[Verdict] = VERDICTS, **changes: Any) -> dict[str, Any]:
    """Put a layer's entry into a store, picture k all in COLOURS[k], and return its line in the entry of the atlas."""
    made = list(
        sprite_sheets(
            [plain(COLOURS[index % 4]) for index in range(len(verdicts))], [verdict.channel for verdict in verdicts]
        )
    )
    facts = {**LAYER, **changes.pop("layer", {})}
    manifest = {
        "layer": facts,
        "jobs": [],
        "missing": [],
        "evidence": None,
        "sheets": [sheet.facts for sheet in made],
        "pictures": [
            {"channel": verdict.channel, "picture": verdict.picture, "score": verdict.score} for verdict in verdicts
        ],
        "thresholds": asdict(THRESHOLDS),
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "remark": None,
        **changes,
    }
    digest = digest_of(facts)
    store.put("layers", digest, {sheet.name: sheet.content for sheet in made}, manifest)
    return {**facts, "digest": digest}


def add_atlas(store: Store, layers: Sequence[Mapping[str, Any]], **changes: Any) -> str:
    """Put the entry of an atlas into a store, and return its digest."""
    manifest = {
        "model": "net",
        "fingerprint": "0123456789abcdef",
        "notes": ["random weights"],
        "versions": {"phosphene": "0.1.0", "torch": "2.15.0"},
        "layers": list(layers),
        "missing": [],
        "recipe": {"name": "fast"},
        "size": 32,
        "precision": "fp32",
        "seeds": [0],
        "filters": 4 * len(layers),
        "evidence": None,
        "verdicts": {},
        **changes,
    }
    digest = digest_of({"layers": manifest["layers"], "model": manifest["model"]})
    store.put("atlases", digest, {}, manifest)
    return digest


def add_evidence(store: Store, path: str, name: str = "cat.jpg") -> str:
    """Put evidence into a store, two photos a channel; crop k of channel c is all grey of level 50 · k + c % 128."""
    photos = torch.tensor([[0, 1, -1]]).expand(256, 3).clone()
    photos[5, 1] = -1
    count, broken, mean, std, minimum, maximum, quantiles, peaks = (torch.zeros(256) for _ in range(8))
    statistics = PhotoStatistics(
        count, broken, mean, std, minimum, maximum, quantiles, peaks, photos, torch.zeros(256, 3, 2).long()
    )
    pages = {}
    for number in range(2):
        levels = np.add.outer(np.arange(128), 50 * np.arange(3)).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(levels.repeat(8, 0).repeat(8, 1)).convert("RGB").save(buffer, "WEBP", lossless=True)
        pages[f"crops_0_{number}.webp"] = buffer.getvalue()
    about = {
        "spec": {"layers": [path]},
        "seen": 2000,
        "lost": 0,
        "names": {"0": name, "1": "dog.jpg"},
        "sheets": {path: sorted(pages)},
        "tile": 8,
        "rows": 128,
    }
    evidence = Evidence({path: statistics}, about, pages)
    store.put("evidence", evidence.digest, evidence.files(), {"seen": 2000})
    return evidence.digest


class Page(HTMLParser):
    """What a page holds: its tags with their attributes, and the text of its table cells, row by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[str]] = []
        self.script, self.inside, self.in_table = "", "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.inside = tag
        self.in_table |= tag == "table"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.script += data
        if self.in_table and self.inside in ("td", "th", "a"):
            self.rows[-1][-1] += data.strip()

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""
        self.in_table &= tag != "table"

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def report_of(store: Store, atlas: str | None = None) -> tuple[str, Page, list[list[str]]]:
    """Return a report's page as text and parsed, and the rows of its CSV."""
    html, table = report.report(store, atlas)
    return html.decode(), Page(html.decode()), list(csv.reader(io.StringIO(table.decode(), newline="")))


def colour(source: str) -> list[int]:
    """Return the mean colour of an image in a data URL."""
    kind, _, content = source.partition(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        return [round(float(level)) for level in np.asarray(image.convert("RGB")).reshape(-1, 3).mean(0)]


# --- what is shown


def test_all_verdicts_are_in_the_csv_as_they_are_in_the_store(store: Store) -> None:
    add_atlas(store, [add_layer(store)])
    _, _, rows = report_of(store)
    assert rows == [
        ["layer", "channel", "picture", "verdict", "score", "excitation", "stability", "retrieval", "own", "agreement"],
        ["block1", "3", "filter_3", "vivid", "12.5", "2.5", "0.9", "1", "1", "0.95"],
        ["block1", "5", "filter_5", "weak", "-0.25", "0.1", "0.8", "2", "3", "0.5"],
        ["block1", "8", "filter_8", "unstable", "7.0", "3.0", "0.2", "1", "1", ""],
        ["block1", "130", "filter_130", "dead", "0.0", "", "", "4", "", ""],
    ]


def test_the_page_shows_each_picture_with_its_verdict_and_figures(store: Store) -> None:
    add_atlas(store, [add_layer(store)])
    text, parsed, _ = report_of(store)
    tiles = [figure for figure in parsed.all("figure") if figure["class"] in ORDER]
    assert [tile["class"] for tile in tiles] == ["vivid", "weak", "unstable", "dead"]
    assert tiles[1]["title"] == (
        "filter 5: weak; score -0.25, excitation 0.1, stability 0.8, retrieval 2, own 3, agreement 0.5"
    )
    pictures = parsed.all("img")
    assert pictures[3]["alt"] == "picture of filter 130, dead"
    for picture, expected in zip(pictures, COLOURS, strict=True):
        assert colour(picture["src"]) == pytest.approx(expected, abs=8)  # lossy twice
    overview = next(row for row in parsed.rows if row[0] == "block1")
    assert overview[1:5] == ["Conv2d", "256", "14×7", "5×3 px"]
    assert overview[6:] == [
        "1",
        "1",
        "1",
        "·",
        "1",
        "2.5",
        "0.8",
    ]  # plain: none; medians of .1 2.5 3, and of .2 .8 .9
    figures = [row for row in parsed.rows if len(row) == 9][1:]
    assert figures[1] == ["block1", "5", "○ weak", "-0.25", "0.1", "0.8", "2", "3", "0.5"]
    assert figures[3] == ["block1", "130", "✕ dead", "0", "", "", "4", "", ""]
    assert "Random weights." in text
    assert "Made without photos" in text


def test_the_strongest_photos_stand_beside_their_filter(store: Store) -> None:
    digest = add_evidence(store, "block1")
    add_atlas(store, [add_layer(store, evidence=digest)], evidence=digest)
    text, parsed, _ = report_of(store)
    photos = [image for image in parsed.all("img") if image["alt"].startswith("strong photo")]
    assert [photo["title"] for photo in photos] == ["cat.jpg", "dog.jpg", "cat.jpg", *["cat.jpg", "dog.jpg"] * 2]
    # channel 130 is row 2 of the second sheet
    levels = [3, 53, 5, 8, 58, 2, 52]
    assert [colour(photo["src"])[1] for photo in photos] == pytest.approx(levels, abs=2)
    assert "2,000" in text
    assert "Made without photos" not in text


def test_a_layer_without_verdicts_shows_its_pictures_and_says_why(store: Store) -> None:
    lines = [add_layer(store, verdicts=VERDICTS[:2])]
    manifest = {**store.manifest("layers", lines[0]["digest"]), "verdicts": [], "remark": "the network overflows"}
    content = store.get("layers", lines[0]["digest"], "sheet.webp")
    store.put("layers", lines[0]["digest"], {"sheet.webp": content}, {**manifest, "missing": ["ab"]})
    add_atlas(store, lines, missing=["block2"])
    text, parsed, rows = report_of(store)
    assert [image["alt"] for image in parsed.all("img")] == [
        f"picture of filter {number}, not judged" for number in (3, 5)
    ]
    assert rows[1:] == [
        ["block1", str(number), f"filter_{number}", "", score, *[""] * 5]
        for number, score in ((3, "12.5"), (5, "-0.25"))
    ]
    for words in (
        "Not judged: the network overflows.",
        "1 job of this layer failed",
        "No pictures exist of block2",
    ):
        assert words in text
    assert "2 of 4, of 1 layers" in text


def test_an_atlas_of_which_nothing_came_says_so(store: Store) -> None:
    add_atlas(store, [], missing=["block1"], filters=4)
    text, _, rows = report_of(store)
    assert "0 of 4, of 0 layers" in text
    assert "No pictures exist of block1" in text
    assert len(rows) == 1


# --- what comes from outside


def test_names_are_text_wherever_they_stand(store: Store) -> None:
    digest = add_evidence(store, EVIL, name=EVIL)
    layer = add_layer(store, layer={"path": EVIL, "kind": EVIL}, evidence=digest, remark=None)
    add_atlas(store, [layer], model=EVIL, notes=[EVIL], evidence=digest, missing=[EVIL])
    text, parsed, rows = report_of(store)
    assert EVIL not in text
    assert "<script>alert" not in text
    assert len(parsed.all("script")) == 1
    assert rows[1][0] == EVIL
    assert parsed.rows[1][:2] == [EVIL, EVIL]
    assert next(image["title"] for image in parsed.all("img") if "title" in image) == EVIL


def test_the_page_needs_nothing_from_elsewhere(store: Store) -> None:
    digest = add_evidence(store, "block1")
    add_atlas(store, [add_layer(store, evidence=digest)], evidence=digest)
    text, parsed, _ = report_of(store)
    assert all(image["src"].startswith("data:image/webp;base64,") and image["alt"] for image in parsed.all("img"))
    assert not parsed.all("link") + parsed.all("iframe") + parsed.all("object")
    names = {attributes["id"] for _, attributes in parsed.tags if "id" in attributes}
    assert {link["href"] for link in parsed.all("a")} <= {f"#{name}" for name in names}
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"data:[^\"]*", "", text))
    policy = parsed.all("meta")[1]["content"]
    digest = base64.b64encode(hashlib.sha256(parsed.script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


@pytest.mark.parametrize("path", ["=1+1", "+a", "-a", "@sum", "\tx"])
def test_no_cell_is_a_formula(store: Store, path: str) -> None:
    verdicts = [Verdict(0, "=cmd", "vivid", -3.5, 1, 1, 1, 1, 1)]
    add_atlas(store, [add_layer(store, verdicts, layer={"path": path})])
    _, _, rows = report_of(store)
    assert rows[1][0] == f"'{path}"
    assert rows[1][2] == "'=cmd"
    assert rows[1][4] == "-3.5"


def test_equal_stores_give_equal_bytes(tmp_path: Path) -> None:
    reports = []
    for name in ("one", "other"):
        store = open_store(tmp_path / name, create=True)
        digest = add_evidence(store, "block1")
        add_atlas(store, [add_layer(store, evidence=digest)], evidence=digest)
        reports.append(report.report(store))
    assert reports[0] == reports[1] == report.report(store)


# --- which atlas


def test_the_atlas_is_named_where_there_are_several(store: Store) -> None:
    with pytest.raises(InvalidRequest, match="holds no finished atlas yet"):
        report.report(store)
    first = add_atlas(store, [add_layer(store)])
    assert "<h1>net</h1>" in report_of(store)[0]
    second = add_atlas(store, [add_layer(store)], model="other")
    with pytest.raises(
        InvalidRequest, match=rf"holds 2 atlases.*{first} \(net, 1 layers, recipe fast, without photos\)"
    ):
        report.report(store)
    assert "<h1>other</h1>" in report_of(store, second)[0]
    assert "<h1>net</h1>" in report_of(store, first[:12])[0]
    with pytest.raises(InvalidRequest, match=r"holds no atlas 'zz'; it has .*recipe fast"):
        report.report(store, "zz")


def test_an_entry_that_is_gone_or_damaged_is_named(store: Store, tmp_path: Path) -> None:
    layer = add_layer(store)
    add_atlas(store, [layer])
    sheet = tmp_path / "store" / "layers" / layer["digest"] / "sheet.webp"
    sheet.write_bytes(b"")
    with pytest.raises(StoreRefused, match=f"{layer['digest']}/sheet.webp is damaged"):
        report.report(store)
    (sheet.parent / "manifest.json").unlink()
    with pytest.raises(EntryNotFound, match=layer["digest"]):
        report.report(store)


# --- how large it gets


def test_of_too_many_filters_the_largest_layers_show_less() -> None:
    assert report.filters_per_layer([10, 20, 30], total=60) == [10, 20, 30]
    assert report.filters_per_layer([1000, 20, 1000], total=701) == [340, 20, 340]
    assert report.filters_per_layer([]) == []


def test_what_is_not_shown_is_counted_and_in_the_csv(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "filters_per_layer", lambda counts: [3 for _ in counts])
    add_atlas(store, [add_layer(store)])
    text, parsed, rows = report_of(store)
    assert len(parsed.all("img")) == 3
    assert len(rows) == 5
    assert "1 more filters are in the CSV" in text


@pytest.mark.slow
def test_a_page_of_5000_filters_stays_below_25_megabytes(store: Store) -> None:
    generator = np.random.default_rng(0)
    rough = generator.integers(0, 256, (5000, 16, 16, 3), dtype=np.uint8)
    pictures = [Image.fromarray(levels).resize((96, 96), Image.Resampling.BICUBIC) for levels in rough]
    lines = []
    for number in range(5):
        verdicts = [Verdict(k, f"filter_{k}", "vivid", 1.2345, 1.2345, 0.98765, 1, 1, 0.98765) for k in range(1000)]
        made = list(sprite_sheets(pictures[number * 1000 : (number + 1) * 1000], range(1000)))
        line = add_layer(store, verdicts, layer={"path": f"layer{number}", "channels": 1000})
        manifest = {**store.manifest("layers", line["digest"]), "sheets": [sheet.facts for sheet in made]}
        store.put("layers", line["digest"], {sheet.name: sheet.content for sheet in made}, manifest)
        lines.append(line)
    add_atlas(store, lines)
    html, _ = report.report(store)
    assert 5e6 < len(html) < 25e6
