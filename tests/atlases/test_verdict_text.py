"""Verdicts and figures in words."""

from __future__ import annotations

import pytest

from phosphene.atlases.verdict_text import (
    FIGURES,
    VerdictShare,
    figure_meanings,
    figures_line,
    format_figure,
    format_share,
    verdict_shares,
    verdict_words,
)
from phosphene.atlases.verdicts import Verdict


@pytest.mark.parametrize(
    ("count", "total", "text"),
    [(0, 10, "0 %"), (1, 2000, "under 1 %"), (1999, 2000, "over 99 %"), (1, 3, "33 %"), (5, 5, "100 %"), (0, 0, "0 %")],
)
def test_a_share_that_is_not_all_or_nothing_does_not_round_to_it(count: int, total: int, text: str) -> None:
    assert format_share(count, total) == text


@pytest.mark.parametrize(
    ("figure", "text"),
    [(None, ""), (12, "12"), (123456, "123456"), (0.0, "0"), (-0.123456, "-0.123"), (999.4, "999"), (1234.6, "1235")],
)
def test_figures_have_three_digits_and_ranks_all(figure: float | None, text: str) -> None:
    assert format_figure(figure) == text


def test_a_line_of_figures_leaves_out_what_is_missing() -> None:
    verdict = Verdict(5, "filter_5", "weak", -0.25, None, 0.8, 2, None, 0.5)
    assert figures_line(verdict) == "score -0.25, stability 0.8, retrieval 2, agreement 0.5"


def test_shares_are_in_the_order_of_a_bar() -> None:
    assert verdict_shares({"dead": 1, "vivid": 3}) == [
        VerdictShare("vivid", "●", 3, "75 %", 0, 75),
        VerdictShare("unstable", "≈", 0, "0 %", 75, 0),
        VerdictShare("weak", "○", 0, "0 %", 75, 0),
        VerdictShare("plain", "■", 0, "0 %", 75, 0),
        VerdictShare("dead", "✕", 1, "25 %", 75, 25),
    ]
    of_eight = verdict_shares({"dead": 1, "vivid": 3}, of=8)  # four more were not judged
    assert [(share.percent, share.share) for share in of_eight] == [
        ("38 %", 37.5),
        ("0 %", 0),
        ("0 %", 0),
        ("0 %", 0),
        ("12 %", 12.5),
    ]
    assert {(share.percent, share.left, share.share) for share in verdict_shares({})} == {("0 %", 0, 0)}


def test_a_reader_sees_the_words_of_a_verdict() -> None:
    assert [share.words for share in verdict_shares({})] == ["vivid", "unstable", "weak", "plain colour", "dead"]
    assert verdict_words("of a later version") == "of a later version"


def test_meanings_name_the_thresholds() -> None:
    meanings = figure_meanings({"excitation": 0.7, "outdone": 0.4, "stability": 0.65, "agreement": 0.55})
    assert list(meanings) == [*FIGURES, "dead", "plain"]
    assert meanings["excitation"].endswith("Below 0.7 a picture is weak.")
    assert meanings["stability"].endswith("Below 0.65 a picture is unstable.")
    assert "Where more than 40% of them do so" in meanings["retrieval"]
    assert "Where more than 40% are before it" in meanings["own"]
    assert meanings["agreement"].endswith("Below 0.55 a picture is unstable.")
