"""Render templates. Pages link to each other by relative paths, so that they work from a server and from a file."""

import posixpath
from functools import cache, partial
from typing import Any
from urllib.parse import quote

from phosphene.atlases.report_page import template_environment
from phosphene.version import __version__


def render_template(template: str, here: str, live: bool, **context: Any) -> bytes:
    """Return a page as HTML.

    Args:
        template: its name, such as `layer.html`. It may call `to(path)`, which returns the link to a path of the site.
        here: the path of the page in the site, such as `atlas/1a2b/index.html`.
        live: whether a server is behind the page, for what plain files cannot do.
        context: the variables of the template; text is escaped.
    """
    shared = {"here": here, "live": live, "to": cache(partial(link, here=here)), "version": __version__}
    return template_environment("phosphene.web").get_template(template).render(shared | context).encode()


def link(path: str, here: str) -> str:
    """Return the relative link from `here` to another path of the site, with its query and fragment.

    >>> link("atlas/1a/conv~2F1/7.html#photos", "atlas/1a/index.html")
    'conv~2F1/7.html#photos'
    """
    end = min((path.index(sign) for sign in "?#" if sign in path), default=len(path))
    relative = posixpath.relpath(f"/{path[:end]}", f"/{posixpath.dirname(here)}")  # absolute: needs no cwd
    return quote(relative, safe="/~") + path[end:]
