"""Where pictures lie in the site: parts of files, since a file of many small pictures loads as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from phosphene.web.slugs import layer_slug

DIGITS = 12  # of a digest in an address


class Tile(NamedTuple):
    """A part of a picture file, `width` × `height` at (x, y), in its pixels; `whole` is the file's width and height."""

    file: str
    x: int
    y: int
    width: int
    height: int
    whole: tuple[int, int]


def network_href(d: str) -> str:
    return f"atlas/{d}/index.html"


def layer_href(d: str, path: str) -> str:
    return f"atlas/{d}/{layer_slug(path)}/index.html"


def filter_href(d: str, path: str, n: int) -> str:
    return f"atlas/{d}/{layer_slug(path)}/{n}.html"


def file_href(d: str, path: str, name: str) -> str:
    return f"atlas/{d}/{layer_slug(path)}/{name}"


def evidence_href(digest: str, name: str) -> str:
    return f"evidence/{digest[:DIGITS]}/{name}"


def tile_of(file: str, tile: Sequence[int], columns: int, count: int, index: int) -> Tile:
    """Return one of `count` tiles that lie row by row without a gap."""
    (width, height), (row, column) = tile, divmod(index, columns)
    whole = (columns * width, math.ceil(count / columns) * height)
    return Tile(file, column * width, row * height, width, height, whole)
