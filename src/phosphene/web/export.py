"""Write the site as plain files, for any web host or for none."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from phosphene.errors import InvalidRequest, OutputRefused
from phosphene.progress import progress_bar
from phosphene.storage.atomic import check_writable, write_file
from phosphene.web.site import Site

INDEX, MARKER = "index.html", "made-by-phosphene.txt"
FOLDERS = ("static", "atlas", "evidence", "runs")
MARKER_TEXT = (
    "The files here were written by `phosphene export`, which may be run again into this folder.\n"
    "Open index.html. The next export takes away those of the files below that it has not:\n"
)


def export(site: Site, folder: Path, progress: bool = True) -> int:
    """Write all pages and files of a site into a folder, the index last, and return how many.

    Args:
        folder: new, empty, or holding an earlier export, which is overwritten: files of it that this export does not
            have are removed.
        progress: whether to show a bar; see `progress.progress_bar`.

    Raises:
        InvalidRequest: the folder holds anything else.
        OutputRefused: the folder cannot be written. StoreRefused: the store is damaged.
    """
    check_writable(folder, folder=True)
    check_contents(folder)
    paths = [path for path in dict.fromkeys(site.paths()) if path != INDEX]
    earlier = exported_paths(folder)
    write_file(folder / MARKER, marker_text([*paths, INDEX, *earlier]))  # of both exports, if this is interrupted
    with progress_bar("export", "files", progress) as bar:
        bar.total = len(paths)
        for path in paths:
            write_file(folder / path, site.get(path).body)
            bar.done += 1
    kept = {path.casefold() for path in (*paths, INDEX)}  # some disks do not tell "A" from "a"
    remove_files(folder, [path for path in earlier if path.casefold() not in kept])
    write_file(folder / MARKER, marker_text([*paths, INDEX]))
    write_file(folder / INDEX, site.get(INDEX).body)
    return len(paths) + 1


def check_contents(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier export; hidden files are ignored."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.exists() else set()
    foreign = names - {MARKER, INDEX, *FOLDERS}
    if foreign or (names and MARKER not in names):
        name = sorted(foreign or names)[0]
        raise InvalidRequest(f"{folder} holds other files, such as {name}; give the export a folder of its own")


def marker_text(paths: Iterable[str]) -> bytes:
    """Return the contents of the marker file: its purpose, and the paths that were written."""
    return "\n".join([MARKER_TEXT, *sorted(set(paths)), ""]).encode()


def exported_paths(folder: Path) -> list[str]:
    """Return the paths that earlier exports wrote into a folder, without lines that no export can have written."""
    try:
        lines = (folder / MARKER).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    split = [(line, PurePosixPath(line).parts) for line in lines]
    return [line for line, parts in split if parts and parts[0] in FOLDERS and ".." not in parts]


def remove_files(folder: Path, paths: Iterable[str]) -> None:
    """Remove files, and the folders that become empty; never a file outside that a link leads to.

    Raises:
        OutputRefused: a file cannot be removed.
    """
    root = folder.resolve()
    for path in paths:
        file = folder / path
        if not file.parent.resolve().is_relative_to(root) or not (file.is_file() or file.is_symlink()):
            continue
        try:
            file.unlink()
        except OSError as error:
            raise OutputRefused(f"{file} is of an earlier export and cannot be removed: {error.strerror}") from error
        with suppress(OSError):  # the folder still holds other files
            for parent in list(PurePosixPath(path).parents)[:-1]:
                (folder / parent).rmdir()
