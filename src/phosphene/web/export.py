"""The export: the site as plain files, for any web host or for none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from phosphene.errors import InvalidRequest
from phosphene.files import check_writable, write_file
from phosphene.web.site import Site

INDEX, MARK = "index.html", "made-by-phosphene.txt"
WHAT = (
    b"The files here were written by `phosphene export`, which may be run again into this folder.\nOpen index.html.\n"
)


def export(site: Site, folder: Path, watch: Callable[[int, int], None] | None = None) -> int:
    """Write all pages and files of a site into a folder, the index last, and return how many.

    Args:
        folder: a new or empty one, or one that holds an earlier export, which is written over.
        watch: called with how many files are written and how many there are.

    Raises:
        InvalidRequest: the folder holds anything else.
        OutputRefused: it cannot be written. StoreRefused: what is to be shown is damaged.
    """
    check_writable(folder, folder=True)
    check_own(folder)
    paths = [one for one in dict.fromkeys(site.paths()) if one != INDEX]
    write_file(folder / MARK, WHAT)
    for done, path in enumerate([*paths, INDEX], 1):
        write_file(folder / path, site.get(path).body)
        if watch:
            watch(done, len(paths) + 1)
    return len(paths) + 1


def check_own(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier export; hidden files do not matter."""
    own = {MARK, INDEX, "static", "atlas", "evidence", "runs"}
    held = {one.name for one in folder.iterdir() if not one.name.startswith(".")} if folder.exists() else set()
    if held and (MARK not in held or held - own):
        other = sorted(held - own or held)[0]
        raise InvalidRequest(f"{folder} holds other files, such as {other}; give the export a folder of its own")
