"""Where bytes lie: in a folder, or wherever fsspec reaches by a URL. A file there appears whole or not at all.

A place raises what its disk or its connection raises; `store` says it in a sentence.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from phosphene.errors import ExtraMissing, InvalidRequest, OutputRefused
from phosphene.storage.atomic import check_writable, write_file

WAITS = (0.2, 1.0, 4.0)  # seconds before each further try when a connection drops
# What stays so however often it is tried. All else may be a dropped connection, of a type that only its library knows.
FINAL = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError, ImportError)
FINAL_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG}
# There a put shows all of its bytes or none, so that they go straight to their name: renaming would mean a copy.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss", "tos", "memory"}
PART = ".part"  # how the names of unfinished files end


class FileSystem(Protocol):
    """Names of files are relative, with "/" between folders; a folder is there where a file in it is."""

    def read(self, name: str) -> bytes:
        """Return a file's bytes; FileNotFoundError where there is none."""

    def write(self, name: str, content: bytes) -> None:
        """Put a file there, or replace one, at once."""

    def remove(self, name: str) -> None:
        """Take a file away, if it is there."""

    def has(self, name: str) -> bool:
        """Return whether a file is there now."""

    def names(self, folder: str) -> list[str]:
        """Return the names of the files and folders in a folder, hidden ones too; none where there is no folder."""

    def folders_with(self, folder: str, name: str) -> set[str]:
        """Return the folders in a folder that hold a file of that name."""

    def check_writable(self) -> None:
        """Raise what a write would raise; leaves nothing behind."""

    def alone(self, folder: str) -> Any:
        """Return a context in which no other process is in the same context for that folder, where that is possible."""


class LocalFolder:
    """A folder on a disk."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()  # the user's code may change the working folder meanwhile

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        for _ in range(3):
            try:
                write_file(self.path / name, content)
                return
            except OutputRefused as refused:
                last: BaseException = refused.__cause__ or refused
            if not isinstance(last, FileNotFoundError):  # that is: another writer swept our unfinished file away
                break
        raise last

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        return exists(f"{self.path}/{name}")

    def names(self, folder: str) -> list[str]:
        try:
            return os.listdir(self.path / folder)
        except FileNotFoundError:
            return []

    def folders_with(self, folder: str, name: str) -> set[str]:
        return {one for one in self.names(folder) if exists(f"{self.path}/{folder}/{one}/{name}")}

    def check_writable(self) -> None:
        try:
            check_writable(self.path, folder=True)
        except OutputRefused as refused:
            raise refused.__cause__ or refused from None

    @contextmanager
    def alone(self, folder: str) -> Iterator[None]:
        (self.path / folder).mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path / folder, os.O_RDONLY)
        try:
            with locked(handle):
                yield
        finally:
            os.close(handle)


def exists(path: str) -> bool:
    """Return whether a file is there; unlike `os.path.exists`, a disk that fails is no answer."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextmanager
def locked(handle: int) -> Iterator[None]:
    """Hold a lock on an open folder, which goes with its process and leaves no file; not every disk has such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing would not do where a process was forked meanwhile


class RemoteFiles:
    """Files behind a URL. A connection that drops is tried again; each try does the whole of it anew."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.files, root = url_to_fs(url)
        self.root = root.rstrip("/")
        protocols = self.files.protocol
        self.whole_puts = bool(OBJECT_STORES.intersection([protocols] if isinstance(protocols, str) else protocols))

    def path(self, name: str) -> str:
        return f"{self.root}/{name}".rstrip("/")

    def read(self, name: str) -> bytes:
        return bytes(with_retries(lambda: self.files.cat_file(self.path(name))))

    def write(self, name: str, content: bytes) -> None:
        if self.whole_puts:
            with_retries(lambda: self.files.pipe_file(self.path(name), content))
        else:
            with_retries(lambda: self.replace(self.path(name), content))

    def replace(self, path: str, content: bytes) -> None:
        """Write a file by way of a temporary name beside it: not all servers keep a half-sent file to themselves."""
        folder, _, name = path.rpartition("/")
        temporary = f"{folder}/.{name}.{secrets.token_hex(4)}{PART}"
        self.files.makedirs(folder, exist_ok=True)
        try:
            self.files.pipe_file(temporary, content)
            self.files.invalidate_cache()
            arrived = self.files.size(temporary)
            if arrived != len(content):
                raise ConnectionError(f"{arrived} of {len(content)} bytes arrived")
            self.files.mv(temporary, path)
        except BaseException as error:
            with suppress(Exception):
                self.files.rm_file(temporary)
            if isinstance(error, FileNotFoundError):  # another writer swept it away
                raise ConnectionError(f"{error} is gone") from error
            raise

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            with_retries(lambda: self.files.rm_file(self.path(name)))

    def has(self, name: str) -> bool:
        self.files.invalidate_cache()  # another driver may have written
        try:
            with_retries(lambda: self.files.info(self.path(name)))  # `exists` would take a dropped connection for a no
        except FileNotFoundError:
            return False
        return True

    def names(self, folder: str) -> list[str]:
        self.files.invalidate_cache()
        try:
            found = with_retries(lambda: self.files.ls(self.path(folder), detail=False))
        except FileNotFoundError:
            return []
        return [name for one in found if (name := self.inside(one, folder))]

    def folders_with(self, folder: str, name: str) -> set[str]:
        if not self.whole_puts:  # `find` would leave out silently what a dropped connection kept from it
            return {one for one in self.names(folder) if self.has(f"{folder}/{one}/{name}")}
        self.files.invalidate_cache()
        try:
            found = with_retries(lambda: self.files.find(self.path(folder)))  # one request a thousand files
        except FileNotFoundError:
            return set()
        parts = (self.inside(one, folder).split("/") for one in found)
        return {one[0] for one in parts if one[1:] == [name]}

    def inside(self, path: str, folder: str) -> str:
        """Return a listed path relative to the folder; listings may lack the slash at the front."""
        return path.strip("/").removeprefix(self.path(folder).strip("/")).strip("/")

    def check_writable(self) -> None:
        name = f".{secrets.token_hex(4)}{PART}"
        self.write(name, b"")
        self.remove(name)

    @contextmanager
    def alone(self, folder: str) -> Iterator[None]:
        yield  # there are no locks behind URLs


def with_retries(action: Callable[[], Any]) -> Any:
    """Return what an action returns, trying again after what may have been a dropped connection."""
    for wait in WAITS:
        try:
            return action()
        except Exception as error:
            if isinstance(error, FINAL) or getattr(error, "errno", None) in FINAL_NUMBERS:
                raise
        time.sleep(wait)
    return action()


def open_place(url: str) -> FileSystem:
    """Return the folder, or what is behind the URL.

    Raises:
        InvalidRequest: it is neither.
        ExtraMissing: the URL needs a package that is not installed.
    """
    if not url:
        raise InvalidRequest("an empty name is no place for a store; give a folder or a URL")
    scheme, mark, path = url.partition("://")
    if not mark:
        return LocalFolder(Path(url))
    if scheme in ("file", "local"):
        return LocalFolder(Path(path))
    if "::" in url or "?" in url:
        raise InvalidRequest(f"{display_name(url)} is no place for a store: give a URL without :: and ?")
    try:
        return RemoteFiles(url)
    except ImportError as error:
        advice = f"install it with: pip install {package(scheme, error)}"
        raise ExtraMissing(f"{display_name(url)} needs a package that is not installed; {advice}") from error
    except ValueError as error:
        reason = without_secrets(str(error), url)
        raise InvalidRequest(
            f"{display_name(url)} is no place for a store: {reason}; give a folder, or another URL"
        ) from None


def package(scheme: str, error: ImportError) -> str:
    """Return what to install for a URL scheme, as fsspec knows it."""
    from fsspec.registry import known_implementations

    top: str = known_implementations[scheme]["class"].split(".")[0]
    missing = getattr(error.__cause__, "name", None) or top
    return {"smbclient": "smbprotocol", "webdav4": "webdav4[fsspec]"}.get(missing, missing)


def display_name(url: str) -> str:
    """Return a URL as messages may show it: without user, password and query."""
    return re.sub(r"://(?:[^/\s]*@|[^/\s:]*:[^\s]*@)", "://", re.sub(r"(://[^\s?]*)\?\S+", r"\1", url))


def without_secrets(text: str, url: str) -> str:
    """Return a text, such as an error's, without the credentials of a URL."""
    user = re.search(r"://([^/\s]*|[^/\s:]*:[^\s]*)@", url)
    password = user[1].partition(":")[2] if user else ""
    for secret in (password, unquote(password)):
        text = text.replace(secret, "…") if secret else text
    return display_name(text)
