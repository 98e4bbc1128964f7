"""Addresses in the site: of layers, filters and files, and of tiles, which are parts of picture files."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import unquote

DIGITS = 12  # of a digest in an address
PLAIN = frozenset((string.ascii_letters + string.digits + "._-").encode())


def layer_slug(path: str) -> str:
    """Return a layer's path with every byte outside A-Z a-z 0-9 . _ - as ~ and two digits; so, too, a first dot.

    >>> layer_slug("base/conv1"), layer_slug(".body")
    ('base~2Fconv1', '~2Ebody')
    """
    found = "".join(chr(byte) if byte in PLAIN else f"~{byte:02X}" for byte in path.encode())
    return f"~2E{found[1:]}" if found.startswith(".") else found


def layer_path(slug: str) -> str:
    """Return the path that `layer_slug` made this of; of any other text something, which is no layer's path.

    >>> layer_path("base~2Fconv1")
    'base/conv1'
    """
    return unquote(slug.replace("%", "%25").replace("~", "%"))


class SpriteTile(NamedTuple):
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


def tile_of(file: str, tile: Sequence[int], columns: int, count: int, index: int) -> SpriteTile:
    """Return one of `count` tiles that lie row by row without a gap."""
    (width, height), (row, column) = tile, divmod(index, columns)
    whole = (columns * width, math.ceil(count / columns) * height)
    return SpriteTile(file, column * width, row * height, width, height, whole)
