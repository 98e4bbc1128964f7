"""The export: the site as plain files, for any web host or for none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from phosphene.errors import InvalidRequest, OutputRefused
from phosphene.storage.atomic import check_writable, write_file
from phosphene.web.site import Site

INDEX, MARK = "index.html", "made-by-phosphene.txt"
OWN = (MARK, INDEX, "static", "atlas", "evidence", "runs")
MARKER_TEXT = (
    "The files here were written by `phosphene export`, which may be run again into this folder.\n"
    "Open index.html. The next export takes away those of the files below that it has not:\n"
)


def export(site: Site, folder: Path, watch: Callable[[int, int], None] | None = None) -> int:
    """Write all pages and files of a site into a folder, the index last, and return how many.

    Args:
        folder: a new or empty one, or one that holds an earlier export, which is written over: of its files, those that
            the new one has not are taken away.
        watch: called with how many files are written and how many there are.

    Raises:
        InvalidRequest: the folder holds anything else.
        OutputRefused: it cannot be written. StoreRefused: what is to be shown is damaged.
    """
    check_writable(folder, folder=True)
    check_own(folder)
    paths = [one for one in dict.fromkeys(site.paths()) if one != INDEX]
    earlier = exported(folder)
    write_file(folder / MARK, marker_text([*paths, INDEX, *earlier]))  # of both, should this be cut off
    for done, path in enumerate(paths, 1):
        write_file(folder / path, site.get(path).body)
        if watch:
            watch(done, len(paths) + 1)
    kept = {one.casefold() for one in (*paths, INDEX)}  # some disks do not tell "A" from "a"
    sweep(folder, [one for one in earlier if one.casefold() not in kept])
    write_file(folder / MARK, marker_text([*paths, INDEX]))
    write_file(folder / INDEX, site.get(INDEX).body)
    if watch:
        watch(len(paths) + 1, len(paths) + 1)
    return len(paths) + 1


def check_own(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier export; hidden files do not matter."""
    own = set(OWN)
    held = {one.name for one in folder.iterdir() if not one.name.startswith(".")} if folder.exists() else set()
    if held and (MARK not in held or held - own):
        other = sorted(held - own or held)[0]
        raise InvalidRequest(f"{folder} holds other files, such as {other}; give the export a folder of its own")


def marker_text(paths: Iterable[str]) -> bytes:
    """Return what the marker file says: what it is for, and what was written."""
    return "\n".join([MARKER_TEXT, *sorted(set(paths)), ""]).encode()


def exported(folder: Path) -> list[str]:
    """Return what earlier exports wrote into a folder; only paths as an export has them count."""
    try:
        lines = (folder / MARK).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    return [one for one in lines if (parts := PurePosixPath(one).parts) and parts[0] in OWN[2:] and ".." not in parts]


def sweep(folder: Path, paths: Iterable[str]) -> None:
    """Take files away, and the folders that are empty then; nothing that links lead to outside of the folder.

    Raises:
        OutputRefused: one cannot be taken away.
    """
    root = folder.resolve()
    for path in paths:
        found = folder / path
        if not found.parent.resolve().is_relative_to(root) or not (found.is_file() or found.is_symlink()):
            continue
        try:
            found.unlink()
        except OSError as error:
            raise OutputRefused(f"{found} is of an earlier export and cannot be removed: {error.strerror}") from error
        with suppress(OSError):  # others are in there
            for above in list(PurePosixPath(path).parents)[:-1]:
                (folder / above).rmdir()
