"""Verdicts and their figures as text, for the report and for the page."""

from collections.abc import Mapping
from typing import NamedTuple

from phosphene.atlases.verdicts import DEAD, MOVES, PLAIN, UNSTABLE, VIVID, WEAK, Verdict

ORDER = (VIVID, UNSTABLE, WEAK, PLAIN, DEAD)
WORDS = {PLAIN: "plain colour"}  # what a reader sees, where that is not the verdict's name
SIGNS = {VIVID: "●", UNSTABLE: "≈", WEAK: "○", PLAIN: "■", DEAD: "✕"}  # so that colour alone never tells a verdict
FIGURES = ("excitation", "stability", "retrieval", "own", "agreement")


class VerdictShare(NamedTuple):
    """How many filters have a verdict; on a bar 100 wide their part starts at `left` and is `share` wide."""

    verdict: str
    sign: str
    filters: int
    percent: str
    left: float
    share: float

    @property
    def words(self) -> str:
        """The verdict as a reader sees it."""
        return verdict_words(self.verdict)


def verdict_words(verdict: str) -> str:
    """Return the words for a verdict: its name, or what `WORDS` has for it."""
    return WORDS.get(verdict, verdict)


def verdict_shares(counts: Mapping[str, int], of: int | None = None) -> list[VerdictShare]:
    """Return the share of each verdict, in the order of a bar.

    Args:
        counts: the number of filters by verdict.
        of: the number of filters in the whole bar, by default of those with a verdict.
    """
    total, left, shares = of or sum(counts.get(verdict, 0) for verdict in ORDER), 0.0, []
    for verdict in ORDER:
        filters = counts.get(verdict, 0)
        share = 100 * filters / (total or 1)
        shares.append(VerdictShare(verdict, SIGNS[verdict], filters, format_share(filters, total), left, share))
        left += share
    return shares


def figure_meanings(limits: Mapping[str, float]) -> dict[str, str]:
    """Return what each figure means and what a dead and a plain filter are, given the thresholds by name."""
    return {
        "excitation": "How strongly the picture, as it is saved, excites the filter on average over its map: 0 is the "
        f"mean of the photos, 1 the strongest photo. Below {limits['excitation']:g} a picture is weak.",
        "stability": f"What is left of the excitation when the picture is moved a little: {MOVES} times, by up to 4 "
        f"pixels, 5 degrees and 5 percent of its size. Below {limits['stability']:g} a picture is unstable.",
        "retrieval": "The rank of the picture among all pictures of the layer, by how strongly they excite the filter. "
        f"Where more than {limits['outdone']:.0%} of them do so more strongly, it is weak.",
        "own": "The rank of the filter among all filters of the layer, by how far the picture excites each beyond "
        f"what photos do, in standard deviations. Where more than {limits['outdone']:.0%} are before it, it is weak.",
        "agreement": "How alike pictures from two seeds excite the filter, the weaker over the stronger. Below "
        f"{limits['agreement']:g} a picture is unstable.",
        DEAD: "The filter never answered while its picture was made: its score stayed as it was at the start.",
        PLAIN: "The filter lives and wants a flat colour: one colour all over excites it about as much as its picture.",
    }


def format_share(count: int, total: int) -> str:
    """Return a part of a whole in percent; a part that would wrongly round to 0 or 100 says so."""
    percent = 100 * count / (total or 1)
    if 0 < percent < 1:
        return "under 1 %"
    return "over 99 %" if 99 < percent < 100 else f"{percent:.0f} %"


def format_figure(figure: float | None) -> str:
    """Return a figure to three digits, a rank as a whole number, and None as an empty text."""
    if figure is None or isinstance(figure, int):
        return "" if figure is None else str(figure)
    return f"{figure:.0f}" if abs(figure) >= 1000 else f"{figure:.3g}"


def figures_line(verdict: Verdict) -> str:
    """Return the score and figures of a filter on one line; missing figures are left out."""
    figures = ((name, getattr(verdict, name)) for name in ("score", *FIGURES))
    return ", ".join(f"{name} {format_figure(figure)}" for name, figure in figures if figure is not None)
