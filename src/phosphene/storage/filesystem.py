"""Files in a folder, or behind any URL that fsspec knows. A file appears whole or not at all.

Errors of the disk or the connection are passed on; `store` turns them into a sentence.
"""

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
# Errors that a retry cannot mend. Any other may be a dropped connection, of a type that only its library knows.
FINAL = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError, ImportError)
FINAL_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG}
# In these a put shows all of its bytes or none, so that it needs no temporary name: renaming would mean a copy.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss", "tos", "memory"}
PART = ".part"  # the end of the names of unfinished files


class FileSystem(Protocol):
    """Names of files are relative, with "/" between folders; a folder exists if it holds a file."""

    def read(self, name: str) -> bytes:
        """Return a file's bytes; FileNotFoundError if there is none."""

    def write(self, name: str, content: bytes) -> None:
        """Write or replace a file, at once."""

    def remove(self, name: str) -> None:
        """Delete a file, if it exists."""

    def has(self, name: str) -> bool:
        """Return whether a file exists now."""

    def names(self, folder: str) -> list[str]:
        """Return the names of the files and folders in a folder, hidden ones too; none if there is no folder."""

    def folders_with(self, folder: str, name: str) -> set[str]:
        """Return the folders in a folder that hold a file of that name."""

    def check_writable(self) -> None:
        """Raise the error that a write would raise; leaves nothing behind."""

    def lock(self, folder: str) -> Any:
        """Return a context that one process at a time can be in for a folder, if the file system has locks."""


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
            except OutputRefused as refusal:
                error: BaseException = refusal.__cause__ or refusal
            if not isinstance(error, FileNotFoundError):  # which means that another writer removed our unfinished file
                break
        raise error

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
        return {child for child in self.names(folder) if exists(f"{self.path}/{folder}/{child}/{name}")}

    def check_writable(self) -> None:
        try:
            check_writable(self.path, folder=True)
        except OutputRefused as refusal:
            raise refusal.__cause__ or refusal from None

    @contextmanager
    def lock(self, folder: str) -> Iterator[None]:
        (self.path / folder).mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path / folder, os.O_RDONLY)
        try:
            with locked(handle):
                yield
        finally:
            os.close(handle)


def exists(path: str) -> bool:
    """Return whether a file exists; unlike `os.path.exists`, an error of the disk is raised."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextmanager
def locked(handle: int) -> Iterator[None]:
    """Lock an open folder, if its disk has locks; the lock ends with the process and leaves no file."""
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
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough if a process was forked meanwhile


class RemoteFiles:
    """Files behind a URL. After a dropped connection the whole operation is tried again."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.files, root = url_to_fs(url)
        self.root = root.rstrip("/")
        protocols = self.files.protocol
        self.puts_are_atomic = bool(
            OBJECT_STORES.intersection([protocols] if isinstance(protocols, str) else protocols)
        )

    def path(self, name: str) -> str:
        return f"{self.root}/{name}".rstrip("/")

    def read(self, name: str) -> bytes:
        return bytes(with_retries(lambda: self.files.cat_file(self.path(name))))

    def write(self, name: str, content: bytes) -> None:
        if self.puts_are_atomic:
            with_retries(lambda: self.files.pipe_file(self.path(name), content))
        else:
            with_retries(lambda: self.replace(self.path(name), content))

    def replace(self, path: str, content: bytes) -> None:
        """Write a file under a temporary name, then rename it: some servers show a file that is half sent."""
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
            if isinstance(error, FileNotFoundError):  # another writer removed it
                raise ConnectionError(f"{error} is gone") from error
            raise

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            with_retries(lambda: self.files.rm_file(self.path(name)))

    def has(self, name: str) -> bool:
        self.files.invalidate_cache()  # another driver may have written
        try:
            with_retries(lambda: self.files.info(self.path(name)))  # a dropped connection makes `exists` False
        except FileNotFoundError:
            return False
        return True

    def names(self, folder: str) -> list[str]:
        self.files.invalidate_cache()
        try:
            paths = with_retries(lambda: self.files.ls(self.path(folder), detail=False))
        except FileNotFoundError:
            return []
        return [name for path in paths if (name := self.inside(path, folder))]

    def folders_with(self, folder: str, name: str) -> set[str]:
        if not self.puts_are_atomic:  # `find` would silently omit folders after a dropped connection
            return {child for child in self.names(folder) if self.has(f"{folder}/{child}/{name}")}
        self.files.invalidate_cache()
        try:
            paths = with_retries(lambda: self.files.find(self.path(folder)))  # one request a thousand files
        except FileNotFoundError:
            return set()
        parts = (self.inside(path, folder).split("/") for path in paths)
        return {child for child, *rest in parts if rest == [name]}

    def inside(self, path: str, folder: str) -> str:
        """Return a listed path relative to the folder; listings may lack the slash at the front."""
        return path.strip("/").removeprefix(self.path(folder).strip("/")).strip("/")

    def check_writable(self) -> None:
        name = f".{secrets.token_hex(4)}{PART}"
        self.write(name, b"")
        self.remove(name)

    @contextmanager
    def lock(self, folder: str) -> Iterator[None]:
        yield  # there are no locks behind URLs


def with_retries(action: Callable[[], Any]) -> Any:
    """Return the result of an action, which is tried again after errors that may be a dropped connection."""
    for wait in WAITS:
        try:
            return action()
        except Exception as error:
            if isinstance(error, FINAL) or getattr(error, "errno", None) in FINAL_NUMBERS:
                raise
        time.sleep(wait)
    return action()


def open_filesystem(url: str) -> FileSystem:
    """Return a folder, or the files behind a URL.

    Raises:
        InvalidRequest: it is neither.
        ExtraMissing: the URL needs a package that is not installed.
    """
    if not url:
        raise InvalidRequest("an empty name is no place for a store; give a folder or a URL")
    scheme, separator, path = url.partition("://")
    if not separator:
        return LocalFolder(Path(url))
    if scheme in ("file", "local"):
        return LocalFolder(Path(path))
    if "::" in url or "?" in url:
        raise InvalidRequest(f"{display_name(url)} is no place for a store: give a URL without :: and ?")
    try:
        return RemoteFiles(url)
    except ImportError as error:
        advice = f"install it with: pip install {package_for(scheme, error)}"
        raise ExtraMissing(f"{display_name(url)} needs a package that is not installed; {advice}") from error
    except ValueError as error:
        problem = f"is no place for a store: {without_secrets(str(error), url)}; give a folder, or another URL"
        raise InvalidRequest(f"{display_name(url)} {problem}") from None


def package_for(scheme: str, error: ImportError) -> str:
    """Return the package to install for a URL scheme, as fsspec knows it."""
    from fsspec.registry import known_implementations

    top: str = known_implementations[scheme]["class"].split(".")[0]
    missing = getattr(error.__cause__, "name", None) or top
    return {"smbclient": "smbprotocol", "webdav4": "webdav4[fsspec]"}.get(missing, missing)


def display_name(url: str) -> str:
    """Return a URL for messages: without user, password and query."""
    return re.sub(r"://(?:[^/\s]*@|[^/\s:]*:[^\s]*@)", "://", re.sub(r"(://[^\s?]*)\?\S+", r"\1", url))


def without_secrets(text: str, url: str) -> str:
    """Return a text, such as an error message, without the credentials of a URL."""
    user = re.search(r"://([^/\s]*|[^/\s:]*:[^\s]*)@", url)
    password = user[1].partition(":")[2] if user else ""
    for secret in (password, unquote(password)):
        text = text.replace(secret, "…") if secret else text
    return display_name(text)
