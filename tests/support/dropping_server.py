"""Servers whose connections drop, for tests of the store, and what a store there holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from phosphene.errors import OutputRefused, StoreRefused
from phosphene.storage.filesystem import LocalFolder, RemoteFiles
from phosphene.storage.store import Store, open_store

ENTRIES = {
    f"{number:02d}ab": {f"filter_{index}.png": bytes([number, index]) * 500 for index in range(3)}
    for number in range(4)
}


class DroppingServer(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A server whose connection drops as `fault` says: before an action, in its middle, after it, or unnoticed."""

    protocol: Any = "dropping"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    actions: ClassVar[list[str]] = []
    fault: Callable[[str], str | Exception | None] = staticmethod(lambda action: None)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        rest = path.partition("://")[2] or path
        return "/" + rest.rpartition("@")[2].strip("/") if rest.strip("/") else ""

    def perform(self, name: str, action: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        self.actions.append(name)
        fault = self.fault(name)
        if isinstance(fault, Exception):
            raise fault
        if fault == "before":
            raise ConnectionResetError("dropped before")
        if fault == "silently":
            return half()
        if fault == "during":
            half()
            raise LibraryError("dropped in the middle")
        result = action()
        if fault == "after":
            raise TimeoutError("dropped after")
        return result

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        put = super().pipe_file
        self.perform("put", lambda: put(path, value), lambda: put(path, value[: len(value) // 2]))

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        def move() -> None:
            old, new = self._strip_protocol(path1), self._strip_protocol(path2)
            if old not in self.store:
                raise FileNotFoundError(path1)
            self.store[new] = self.store.pop(old)

        self.perform("move", move)

    def cat_file(self, path: str, **_: Any) -> Any:
        cat = super().cat_file
        return self.perform("read", lambda: cat(path))

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        ls = super().ls
        return self.perform("list", lambda: ls(path, detail))

    def rm_file(self, path: str) -> None:
        rm = super()._rm
        self.perform("remove", lambda: rm(self._strip_protocol(path)))


class DroppingBucket(DroppingServer):
    """The same as an object store: a put that drops in its middle leaves nothing."""

    protocol = ("bucket", "s3")
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        put = MemoryFileSystem.pipe_file
        self.perform("put", lambda: put(self, path, value))

    def mv(self, *_: Any, **__: Any) -> None:
        raise AssertionError("an object store has no renaming, only copies")


class LibraryError(Exception):
    """An error of a library that derives its errors from no builtin one."""


def reset() -> None:
    """Register the servers with fsspec, empty, and with connections that do not drop."""
    fsspec.register_implementation("dropping", DroppingServer, clobber=True)
    fsspec.register_implementation("bucket", DroppingBucket, clobber=True)
    DroppingServer.fault = staticmethod(lambda action: None)
    DroppingServer.actions.clear()
    for server in (MemoryFileSystem, DroppingServer, DroppingBucket):
        server.store.clear()
        server.pseudo_dirs[:] = [""]


def drop(fault: Callable[[str], str | Exception | None]) -> None:
    """Have connections drop as `fault` says of each action; None: they hold."""
    DroppingServer.fault = staticmethod(fault)


def contents(store: Store) -> dict[str, bytes]:
    """Return all files of a store, hidden ones too."""
    if isinstance(store.filesystem, LocalFolder):
        root = store.filesystem.path
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert isinstance(store.filesystem, RemoteFiles)
    memory, prefix = store.filesystem.files.store, store.filesystem.root + "/"
    return {name.removeprefix(prefix): file.getvalue() for name, file in memory.items() if name.startswith(prefix)}


def filled(store: Store, entries: dict[str, dict[str, bytes]] = ENTRIES) -> dict[str, bytes]:
    for digest, files in entries.items():
        store.put("jobs", digest, files, {"layer": "conv1"})
    return contents(store)


def reference(tmp_path: Path) -> dict[str, bytes]:
    return filled(open_store(tmp_path / "reference", create=True))


def refusal(attempt: Callable[[], Any], intact: Any = None) -> str:
    """Return why an attempt was refused; if it was not, return "" and check that its result is `intact`."""
    try:
        result = attempt()
    except (StoreRefused, OutputRefused) as error:
        return str(error)
    assert result == intact
    return ""
