"""Names of layers as they stand in addresses and file names, from which they can be read again."""

from __future__ import annotations

import string
from urllib.parse import unquote

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
