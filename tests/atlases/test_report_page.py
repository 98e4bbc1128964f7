"""The page of a report: bars and histograms to scale, and templates that get all that they need."""

from __future__ import annotations

import re

import pytest
from jinja2 import UndefinedError

from phosphene.atlases.report_page import Axis, LayerSection, environment, histogram, page
from phosphene.atlases.verdicts import Verdict

LIMITS = {"excitation": 0.75, "outdone": 0.5, "stability": 0.6, "agreement": 0.5}
RECTANGLE = re.compile(r'<rect class="(\w+)" x="([\d.]+)"(?: y="[\d.]+")? width="([\d.]+)" height="([\d.]+)"/>')
STABILITY = Axis("stability", 0, 1.2, logarithmic=False)


def judged(*verdicts: tuple[str, float | None]) -> list[Verdict]:
    """Return verdicts from names and stabilities."""
    return [Verdict(n, "", name, 0, None, figure, 1, 1, 1) for n, (name, figure) in enumerate(verdicts)]


def drawn(verdicts: list[Verdict]) -> list[tuple[str, float, float, float]]:
    """Return class, x, width and height of each rectangle on the page of one layer."""
    html = page("net", {}, [], [LayerSection("conv", {}, "", verdicts, [], [])], LIMITS, 96)
    return [(name, float(x), float(width), float(height)) for name, x, width, height in RECTANGLE.findall(html)]


def test_bars_and_histograms_are_drawn_to_scale() -> None:
    bar = [("vivid", 0.0, 75.0, 10.0), ("dead", 75.0, 25.0, 10.0)]
    assert drawn(judged(("vivid", None), ("vivid", None), ("dead", None), ("vivid", None))) == bar * 2  # atlas, layer
    half = [("vivid", 0.0, 50.0, 10.0)]  # the rest of the bar is empty: those filters were not judged
    assert drawn(judged(("vivid", None), ("", None))) == half * 2
    verdicts = judged(("vivid", 0.62), ("vivid", 0.64), ("unstable", -7.0), ("unstable", 0.61))
    # bins of 0.05 are 10 wide; what lies outside is in the first or last
    assert drawn(verdicts)[4:] == [
        ("unstable", 0.5, 9, 21.3),
        ("vivid", 120.5, 9, 42.7),
        ("unstable", 120.5, 9, 21.3),
    ]
    made = histogram(STABILITY, verdicts, 0.6)
    assert [block.y for block in made.blocks] == pytest.approx([70 - 64 / 3, 70 - 128 / 3, 6])
    assert [block.height for block in made.blocks] == pytest.approx([64 / 3, 128 / 3, 64 / 3])
    assert (made.limit_x, made.caption) == (120, "stability, median 0.615")
    assert made.extremes == "4 filters from -7 to 0.64"


def test_positions_on_an_axis() -> None:
    assert Axis("excitation", 0.25, 4, logarithmic=True).position(1) == 0.5
    assert Axis("excitation", 0.25, 4, logarithmic=True).position(-3) == 0
    assert [STABILITY.position(figure) for figure in (-1, 0.3, 1.2, 7)] == [0, 0.25, 1, 1]


def test_medians_leave_out_missing_figures() -> None:
    section = LayerSection("conv", {}, "", judged(("vivid", 0.5), ("dead", None), ("weak", 0.9)), [b"1", b"2"], [])
    assert section.medians == [None, 0.7]
    assert [(verdict.channel, picture, photos) for verdict, picture, photos in section.tiles] == [
        (0, b"1", ()),
        (1, b"2", ()),
    ]
    assert [(share.verdict, share.filters, share.percent) for share in section.shares] == [
        ("vivid", 1, "33 %"),
        ("unstable", 0, "0 %"),
        ("weak", 1, "33 %"),
        ("plain", 0, "0 %"),
        ("dead", 1, "33 %"),
    ]


def test_a_verdict_by_a_later_version_has_its_name_and_no_sign() -> None:
    section = LayerSection("conv", {}, "", judged(("vivid", None), ("duplicate", None)), [b"1", b"2"], [])
    html = page("net", {}, [], [section], LIMITS, 96)
    assert "<figcaption><i>●</i> 0" in html
    assert "<figcaption><i></i> 1" in html
    assert html.count("duplicate") >= 3


def test_a_plain_filter_is_called_so_in_words() -> None:
    section = LayerSection("conv", {}, "", judged(("plain", None), ("dead", None)), [b"1", b"2"], [])
    html = page("net", {}, [], [section], LIMITS, 96)
    assert "<figcaption><i>■</i> 0" in html
    assert 'alt="picture of filter 0, plain colour"' in html
    assert '<li class="plain"><b>1</b> <i>■</i> plain colour <small>50 %</small></li>' in html
    assert "<td>■ plain colour<td>" in html
    assert "<dt>plain colour</dt><dd>The filter lives" in html


def test_text_is_escaped_and_a_missing_variable_is_an_error() -> None:
    html = page("<b>", {"<i>": "&"}, ["<u>"], [], LIMITS, 96)
    assert "<h1>&lt;b&gt;</h1>" in html
    assert "<dt>&lt;i&gt;</dt><dd>&amp;</dd>" in html
    assert '<p class="note">&lt;u&gt;</p>' in html
    with pytest.raises(UndefinedError):
        environment().get_template("report.html").render()
