"""Paths in the site: of layers, filters and files, and of sprite tiles, which are parts of image files."""

import math
import string
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import unquote

DIGITS = 12  # of a digest in a path
PLAIN = frozenset((string.ascii_letters + string.digits + "._-").encode())


def layer_slug(path: str) -> str:
    """Return a layer's path with every byte outside A-Z a-z 0-9 . _ - as ~ and two digits, and a leading dot too.

    >>> layer_slug("base/conv1"), layer_slug(".body")
    ('base~2Fconv1', '~2Ebody')
    """
    slug = "".join(chr(byte) if byte in PLAIN else f"~{byte:02X}" for byte in path.encode())
    return f"~2E{slug[1:]}" if slug.startswith(".") else slug


def layer_path(slug: str) -> str:
    """Return the path that `layer_slug` was given; for any other text, some string that is no layer's path.

    >>> layer_path("base~2Fconv1")
    'base/conv1'
    """
    return unquote(slug.replace("%", "%25").replace("~", "%"))


class SpriteTile(NamedTuple):
    """A part of an image file, `width` × `height` at (x, y), in pixels; `whole` is the file's width and height."""

    file: str
    x: int
    y: int
    width: int
    height: int
    whole: tuple[int, int]


def network_href(atlas_id: str) -> str:
    return f"atlas/{atlas_id}/index.html"


def layer_href(atlas_id: str, path: str) -> str:
    return f"atlas/{atlas_id}/{layer_slug(path)}/index.html"


def filter_href(atlas_id: str, path: str, channel: int) -> str:
    return f"atlas/{atlas_id}/{layer_slug(path)}/{channel}.html"


def file_href(atlas_id: str, path: str, name: str) -> str:
    return f"atlas/{atlas_id}/{layer_slug(path)}/{name}"


def evidence_href(digest: str, name: str) -> str:
    return f"evidence/{digest[:DIGITS]}/{name}"


def tile_of(file: str, tile: Sequence[int], columns: int, count: int, index: int) -> SpriteTile:
    """Return one of `count` tiles, each (width, height) = `tile`, that lie row by row without a gap."""
    (width, height), (row, column) = tile, divmod(index, columns)
    whole = (columns * width, math.ceil(count / columns) * height)
    return SpriteTile(file, column * width, row * height, width, height, whole)


def row_of_tiles(file: str, tile: Sequence[int], columns: int, rows: int, row: int) -> list[SpriteTile]:
    """Return the tiles in one row of an image file."""
    return [tile_of(file, tile, columns, columns * rows, columns * row + column) for column in range(columns)]
