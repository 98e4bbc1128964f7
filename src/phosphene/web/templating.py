"""Pages from templates. A page links to others by relative paths, so that it works from a server and from a file."""

from __future__ import annotations

import posixpath
from functools import cache, partial
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from phosphene.version import __version__


def render_template(template: str, here: str, live: bool, **context: Any) -> bytes:
    """Return a page as HTML.

    Args:
        template: its name, such as `layer.html`. It may call `to(path)`, which returns the link to a path of the site.
        here: the path of the page in the site, such as `atlas/1a2b/index.html`.
        live: whether a server is behind it, for what plain files cannot do.
        context: what the template shows; text in it is escaped.
    """
    known = {"here": here, "live": live, "to": cache(partial(link, here=here)), "version": __version__}
    return environment().get_template(template).render(known | context).encode()


@cache
def environment() -> Environment:
    """Return where templates come from; what a template does not get is an error."""
    return Environment(
        loader=PackageLoader("phosphene.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def link(path: str, here: str) -> str:
    """Return the relative link from one path of the site to another; what follows a ? or # is kept.

    >>> link("atlas/1a/conv~2F1/7.html#photos", "atlas/1a/index.html")
    'conv~2F1/7.html#photos'
    """
    cut = min((path.index(sign) for sign in "?#" if sign in path), default=len(path))
    relative = posixpath.relpath(f"/{path[:cut]}", f"/{posixpath.dirname(here)}")  # from /, whatever folder we are in
    return quote(relative, safe="/~") + path[cut:]
