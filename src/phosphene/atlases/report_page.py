"""The page of a report: one HTML file that needs nothing from elsewhere, and no script to be read.

All that comes from outside, names of layers, networks, classes and photos, is escaped; a policy in the page keeps the
browser from loading anything and from running any script but the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median
from typing import NamedTuple

from phosphene.atlases.verdicts import DEAD, MOVES, UNSTABLE, VERDICTS, VIVID, WEAK, Verdict

ORDER = (VIVID, UNSTABLE, WEAK, DEAD)
SIGNS = {VIVID: "●", UNSTABLE: "≈", WEAK: "○", DEAD: "✕"}  # so that no verdict is told by its colour alone
FIGURES = ("excitation", "stability", "retrieval", "own", "agreement")
HEADINGS = ("layer", "filter", "verdict", "score", *FIGURES)
BINS = 24
NAME = 60  # characters of a photo's name that are shown


@dataclass(frozen=True)
class Photo:
    """A crop of a photo that excites a channel strongly: its WebP bytes, and the photo's name."""

    crop: bytes
    name: str


@dataclass(frozen=True)
class Section:
    """What the page shows of a layer.

    Attributes:
        facts: what is known of it, in the order in which it is told.
        note: what the reader should mind, or nothing.
        verdicts: of all its filters; an empty one where it could not be judged.
        pictures: WebP bytes of the first of them; more are not shown.
        photos: the strongest photos of each of these, none where there is no evidence.
    """

    path: str
    facts: Mapping[str, str]
    note: str
    verdicts: Sequence[Verdict]
    pictures: Sequence[bytes]
    photos: Sequence[Sequence[Photo]]


def page(
    title: str,
    facts: Mapping[str, str],
    notes: Sequence[str],
    sections: Sequence[Section],
    limits: Mapping[str, float],
    side: int,
) -> str:
    """Return the page on the layers of a network.

    Args:
        title: the network's name.
        facts: what is known of the atlas, in the order in which it is told.
        notes: what the reader should mind, as sentences.
        limits: the thresholds that the verdicts were given by, by name.
        side: of a filter's picture, in pixels.
    """
    verdicts = [one for section in sections for one in section.verdicts]
    body = (
        head(title, facts, notes, verdicts),
        explanation(limits),
        overview(sections),
        *(layer(number, section, limits) for number, section in enumerate(sections)),
        all_figures(sections),
    )
    own = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{own}'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}: what its filters answer to</title>"
        f"<style>:root{{--side:{side}px}}{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>{SCRIPT}</script></body></html>\n"
    )


def head(title: str, facts: Mapping[str, str], notes: Sequence[str], verdicts: Sequence[Verdict]) -> str:
    """Return the top of the page: of what it is, and how many filters have which verdict."""
    told = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items())
    counts = Counter(one.verdict for one in verdicts)
    legend = "".join(
        f'<li class="{name}"><b>{counts[name]:,}</b> <i>{SIGNS[name]}</i> {name}'
        f" <small>{share(counts[name], len(verdicts))}</small></li>"
        for name in ORDER
    )
    minded = "".join(f"<p class=note>{escape(one)}</p>" for one in notes)
    return (
        f"<header><p class=over>Phosphene atlas</p><h1>{escape(title)}</h1><dl class=facts>{told}</dl>"
        f"{bar(counts)}<ul class=legend>{legend}</ul>{minded}</header>"
    )


def explanation(limits: Mapping[str, float]) -> str:
    """Return how verdicts and figures are to be read."""
    rows = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in explained(limits).items())
    return f"<details class=how><summary>How to read this</summary><dl>{rows}</dl></details>"


def explained(limits: Mapping[str, float]) -> dict[str, str]:
    """Return how each figure is to be read, and what a dead filter is."""
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
        "dead": "The filter never answered while its picture was made, or the picture does no more than plain grey.",
    }


def share(count: int, total: int) -> str:
    """Return a part of a whole in percent; what rounds to 0 or 100 and is not, says so."""
    percent = 100 * count / (total or 1)
    if 0 < percent < 1:
        return "under 1 %"
    return "over 99 %" if 99 < percent < 100 else f"{percent:.0f} %"


def bar(counts: Mapping[str, int], kind: str = "wide") -> str:
    """Return how many filters have which verdict as one bar."""
    total = sum(counts.values()) or 1
    said = ", ".join(f"{counts[name]} {name}" for name in ORDER if counts[name])
    parts, left = [], 0.0
    for name in ORDER:
        width = 100 * counts[name] / total
        if width:
            parts.append(f'<rect class="{name}" x="{left:.3f}" width="{width:.3f}" height="10"/>')
        left += width
    return (
        f'<svg class="bar {kind}" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{said}">'
        f"<title>{said}</title>{''.join(parts)}</svg>"
    )


def overview(sections: Sequence[Section]) -> str:
    """Return the table of layers."""
    names = list(dict.fromkeys(name for section in sections for name in section.facts))
    headings = ["layer", *names, "verdicts", *ORDER, *FIGURES[:2]]
    rows = []
    for number, section in enumerate(sections):
        counts = Counter(one.verdict for one in section.verdicts)
        middle = [middling(getattr(one, name) for one in section.verdicts) for name in FIGURES[:2]]
        cells = [
            f'<th scope="row"><a href="#l{number}">{escape(section.path)}</a></th>',
            *(f"<td>{escape(section.facts.get(name, ''))}</td>" for name in names),
            f"<td>{bar(counts, 'small')}</td>",
            *(f'<td class="n">{counts[name] or "·"}</td>' for name in ORDER),
            *(f'<td class="n">{shown(one)}</td>' for one in middle),
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = "<p class=quiet>Excitation and stability are medians.</p>"
    return f"<section><h2>Layers</h2>{note}{table(headings, rows)}</section>"


def middling(figures: Iterable[float | None]) -> float | None:
    """Return the median of the figures that there are."""
    known = [one for one in figures if one is not None]
    return median(known) if known else None


def table(headings: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    """Return a table that scrolls by itself where it is wider than the page."""
    top = "".join(f'<th scope="col">{escape(one)}</th>' for one in headings)
    lines = "\n".join(rows)
    return (
        f'<div class=scroll><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>\n{lines}\n</tbody></table></div>'
    )


def layer(number: int, section: Section, limits: Mapping[str, float]) -> str:
    """Return the part of the page on one layer."""
    facts = " · ".join(f"{escape(name)} {escape(text)}" for name, text in section.facts.items() if text)
    plots = "".join(histogram(axis, section.verdicts, limits[axis.name]) for axis in AXES)
    tiles = "\n".join(tile(number, section, index, picture) for index, picture in enumerate(section.pictures))
    left = len(section.verdicts) - len(section.pictures)
    more = f"<p class=note>{left:,} more filters are in the CSV.</p>" if left else ""
    minded = f"<p class=note>{escape(section.note)}</p>" if section.note else ""
    return (
        f'<section id="l{number}"><h2>{escape(section.path)}</h2><p class=quiet>{facts}</p>{minded}'
        f"<div class=plots>{plots}</div><div class=sheet>\n{tiles}\n</div>{more}</section>"
    )


def tile(number: int, section: Section, index: int, picture: bytes) -> str:
    """Return one filter: its picture, its verdict, its strongest photos; the figures where the pointer rests."""
    one = section.verdicts[index]
    verdict = one.verdict or "not judged"
    told = f"filter {one.channel}: {verdict}; {figures_of(one)}"
    photos = "".join(strong(photo) for photo in (section.photos[index] if section.photos else ()))
    return (
        f'<figure class="{one.verdict}" id="l{number}f{one.channel}" title="{told}">'
        f'<img class=p src="{webp(picture)}" alt="picture of filter {one.channel}, {verdict}">'
        f"<figcaption><i>{SIGNS.get(one.verdict, '')}</i> {one.channel}</figcaption>"
        + (f"<div>{photos}</div>" if photos else "")
        + "</figure>"
    )


def strong(photo: Photo) -> str:
    """Return a strong photo's crop."""
    name = escape(photo.name if len(photo.name) <= NAME else f"{photo.name[: NAME - 1]}…")
    return f'<img src="{webp(photo.crop)}" alt="strong photo {name}" title="{name}">'


def figures_of(one: Verdict) -> str:
    """Return a filter's figures in a line."""
    known = ((name, getattr(one, name)) for name in ("score", *FIGURES))
    return ", ".join(f"{name} {shown(figure)}" for name, figure in known if figure is not None)


def webp(content: bytes) -> str:
    """Return an image as a URL that holds it."""
    return "data:image/webp;base64," + base64.b64encode(content).decode()


def shown(figure: float | None) -> str:
    """Return a figure to three digits, ranks whole, an empty text where there is none."""
    if figure is None or isinstance(figure, int):
        return "" if figure is None else str(figure)
    return f"{figure:.0f}" if abs(figure) >= 1000 else f"{figure:.3g}"


class Axis(NamedTuple):
    """Where the figures of a histogram lie: from `low` to `high`, beyond which they are put into the last bins."""

    name: str
    low: float
    high: float
    logarithmic: bool

    def place(self, figure: float) -> float:
        """Return where a figure is, 0 to 1."""
        held = min(max(figure, self.low), self.high)
        if self.logarithmic:
            return math.log(held / self.low) / math.log(self.high / self.low)
        return (held - self.low) / (self.high - self.low)


AXES = (
    Axis("excitation", 1 / 16, 64, logarithmic=True),
    Axis("stability", 0, 1.2, logarithmic=False),
)


def histogram(axis: Axis, verdicts: Sequence[Verdict], limit: float) -> str:
    """Return how many filters have how much of a figure, in the colours of their verdicts, as inline SVG."""
    known = [(getattr(one, axis.name), one.verdict) for one in verdicts if getattr(one, axis.name) is not None]
    if not known:
        return ""
    counts = Counter((min(BINS - 1, int(axis.place(figure) * BINS)), verdict) for figure, verdict in known)
    tallest = max(sum(counts[column, verdict] for verdict in VERDICTS) for column in range(BINS))
    blocks, width = [], 240 / BINS
    for column in range(BINS):
        top = 70.0
        for verdict in ORDER:
            height = 64 * counts[column, verdict] / tallest
            top -= height
            blocks.append(
                f'<rect class="{verdict}" x="{column * width + 0.5:g}" y="{top:.1f}" width="{width - 1:g}" '
                f'height="{height:.1f}"/>'
                if height
                else ""
            )
    figures = [figure for figure, _ in known]
    said = f"{axis.name}, median {shown(median(figures))}"
    ends = f"{len(known)} filters from {shown(min(figures))} to {shown(max(figures))}"
    at = 240 * axis.place(limit)
    return (
        f'<figure class=plot><svg viewBox="-2 0 244 86" role="img" aria-label="{said}: {ends}"><title>{ends}</title>'
        f'{"".join(blocks)}<path d="M0 70.5H240"/><path class=cut d="M{at:.1f} 2V74"/>'
        f'<text x="0" y="84">≤ {shown(axis.low)}</text><text x="{at:.1f}" y="84" class=mid>{limit:g}</text>'
        f'<text x="240" y="84" class=end>≥ {shown(axis.high)}</text></svg>'
        f"<figcaption>{said}</figcaption></figure>"
    )


def all_figures(sections: Sequence[Section]) -> str:
    """Return the table of all filters that are shown, which a click on a heading sorts."""
    rows = []
    for number, section in enumerate(sections):
        path = escape(section.path)
        for one in section.verdicts[: len(section.pictures)]:
            figures = "".join(f"<td>{shown(getattr(one, name))}" for name in ("score", *FIGURES))
            link = f'<a href="#l{number}f{one.channel}">{one.channel}</a>'
            verdict = f"{SIGNS.get(one.verdict, '')} {one.verdict}"
            rows.append(f'<tr class="{one.verdict}"><td>{path}<td>{link}<td>{verdict}{figures}')
    return f"<details class=all><summary>All figures, as a table</summary>{table(HEADINGS, rows, 'sortable')}</details>"


STYLE = """
*{box-sizing:border-box}
:root{--paper:#fbfbf9;--card:#fff;--ink:#1c1d20;--quiet:#63666d;--line:#dcdcd6;
--vivid:#0d8a6a;--unstable:#c77700;--weak:#8b8f97;--dead:#c2403a}
@media(prefers-color-scheme:dark){:root{--paper:#141518;--card:#1d1f23;--ink:#e9e9e4;--quiet:#a0a3aa;--line:#34373d;
--vivid:#35c79d;--unstable:#f0a63c;--weak:#8d929b;--dead:#f0716a}}
html{background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
body{max-width:1320px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:30px;line-height:1.2;margin:0 0 10px;overflow-wrap:anywhere}
h2{font-size:20px;margin:0 0 2px;overflow-wrap:anywhere}
a{color:inherit;text-decoration-color:var(--quiet);text-underline-offset:2px}
i{font-style:normal}
small,.quiet,.note,.over{color:var(--quiet)}
.over{margin:0;font-size:13px;letter-spacing:.06em;text-transform:uppercase}
.quiet,.note{margin:0 0 10px;overflow-wrap:anywhere}
.note{margin-top:10px}
section{margin-top:44px}
section[id]{content-visibility:auto;contain-intrinsic-size:auto 900px}
.facts{display:flex;flex-wrap:wrap;gap:6px 28px;margin:0 0 20px}
.facts dt,.how dt{font-size:13px;color:var(--quiet)}
.facts dd,.how dd{margin:0;overflow-wrap:anywhere}
.how{margin-top:16px}.how dl{max-width:76ch}.how dt{margin-top:8px}
summary{cursor:pointer;font-weight:600}
.all{margin-top:44px}.all .scroll{margin-top:12px}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 26px;padding:0;margin:10px 0 0}
.bar{display:block;border-radius:3px;background:var(--line)}.wide{width:100%;height:22px}.small{width:80px;height:12px}
rect.vivid{fill:var(--vivid)}rect.unstable{fill:var(--unstable)}rect.weak{fill:var(--weak)}rect.dead{fill:var(--dead)}
.vivid i{color:var(--vivid)}.unstable i{color:var(--unstable)}.weak i{color:var(--weak)}.dead i{color:var(--dead)}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:8px;background:var(--card);margin-top:10px}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:5px 10px;text-align:left;white-space:nowrap;border-top:1px solid var(--line)}
thead th{border-top:0;font-size:13px;font-weight:500;color:var(--quiet)}
th[scope=row]{font-weight:600}th+td{max-width:15ch;overflow:hidden;text-overflow:ellipsis}
.n,.sortable td:nth-child(n+4),.sortable th:nth-child(n+4){text-align:right}
.sortable button{all:unset;cursor:pointer;text-decoration:underline dotted}
.sortable button:focus-visible{outline:2px solid}
[aria-sort=ascending] button::after{content:" ↑"}[aria-sort=descending] button::after{content:" ↓"}
.plots{display:flex;flex-wrap:wrap;gap:12px 32px;margin:6px 0 14px}
.plot{margin:0;width:280px;max-width:100%}.plot svg{display:block;width:100%}
.plot figcaption{font-size:13px;color:var(--quiet)}
.plot path{stroke:var(--line)}.plot .cut{stroke:var(--ink);stroke-dasharray:2 2}
.plot text{font-size:10px;fill:var(--quiet)}.mid{text-anchor:middle}.end{text-anchor:end}
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(calc(var(--side) + 10px),1fr));gap:10px 8px}
.sheet figure{margin:0;padding:4px;border-radius:6px;background:var(--card);border:1px solid var(--line);
border-bottom:3px solid var(--weak)}
.sheet .vivid{border-bottom-color:var(--vivid)}.sheet .unstable{border-bottom-color:var(--unstable)}
.sheet .dead{border-bottom-color:var(--dead)}
.sheet .dead .p{opacity:.45}
.sheet figure:target{outline:3px solid var(--ink)}
.p{display:block;width:100%;border-radius:3px;outline:1px solid var(--line)}
.sheet figcaption{font-size:12px;line-height:1.5;font-variant-numeric:tabular-nums}
.sheet div{display:grid;grid-template-columns:1fr 1fr;gap:2px}
.sheet div img{display:block;width:100%;border-radius:2px}
@media(max-width:520px){body{padding:18px 12px 40px}h1{font-size:24px}}
@media print{section[id]{content-visibility:visible}*{print-color-adjust:exact}}
"""

# Makes the headings of the table of figures buttons that sort it; without it the table stands as it is.
SCRIPT = """
for (const table of document.querySelectorAll('table.sortable')) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement('button');
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.onclick = () => {
      const down = head.getAttribute('aria-sort') === 'ascending' ? -1 : 1;
      const key = (row) => row.cells[column].textContent;
      const order = (a, b) => {
        const [one, other] = [key(a), key(b)];
        if (!one || !other) return (one ? 0 : 1) - (other ? 0 : 1);
        return down * (column === 0 || column === 2 ? one.localeCompare(other) : one - other);
      };
      heads.forEach((one) => one.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', down > 0 ? 'ascending' : 'descending');
      body.replaceChildren(...[...body.rows].sort(order));
    };
  });
}
"""
