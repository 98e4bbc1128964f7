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
    f"{number:02d}ab": {f"filter_{one}.png": bytes([number, one]) * 500 for one in range(3)} for number in range(4)
}


class Dropping(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A server whose connection drops as `fault` says: before an act, in its middle, after it, or unnoticed."""

    protocol: Any = "dropping"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    acts: ClassVar[list[str]] = []
    fault: Callable[[str], str | Exception | None] = staticmethod(lambda act: None)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        rest = path.partition("://")[2] or path
        return "/" + rest.rpartition("@")[2].strip("/") if rest.strip("/") else ""

    def act(self, name: str, action: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        self.acts.append(name)
        fault = self.fault(name)
        if isinstance(fault, Exception):
            raise fault
        if fault == "before":
            raise ConnectionResetError("dropped before")
        if fault == "silently":
            return half()
        if fault == "during":
            half()
            raise Unlisted("dropped in the middle")
        result = action()
        if fault == "after":
            raise TimeoutError("dropped after")
        return result

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        put = super().pipe_file
        self.act("put", lambda: put(path, value), lambda: put(path, value[: len(value) // 2]))

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        def move() -> None:
            old, new = self._strip_protocol(path1), self._strip_protocol(path2)
            if old not in self.store:
                raise FileNotFoundError(path1)
            self.store[new] = self.store.pop(old)

        self.act("move", move)

    def cat_file(self, path: str, **_: Any) -> Any:
        cat = super().cat_file
        return self.act("read", lambda: cat(path))

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        ls = super().ls
        return self.act("list", lambda: ls(path, detail))

    def rm_file(self, path: str) -> None:
        rm = super()._rm
        self.act("remove", lambda: rm(self._strip_protocol(path)))


class Bucket(Dropping):
    """The same, where a put that drops in its middle leaves nothing, as in an object store."""

    protocol = ("bucket", "s3")
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        put = MemoryFileSystem.pipe_file
        self.act("put", lambda: put(self, path, value))

    def mv(self, *_: Any, **__: Any) -> None:
        raise AssertionError("an object store has no renaming, only copies")


class Unlisted(Exception):
    """What a library raises that derives its errors from no builtin one."""


def begin() -> None:
    """Let fsspec know the servers, and let them be empty and never drop."""
    fsspec.register_implementation("dropping", Dropping, clobber=True)
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    Dropping.fault = staticmethod(lambda act: None)
    Dropping.acts.clear()
    for one in (MemoryFileSystem, Dropping, Bucket):
        one.store.clear()
        one.pseudo_dirs[:] = [""]


def drop(fault: Callable[[str], str | Exception | None]) -> None:
    """Let the servers drop as `fault` says of each act; None: they answer."""
    Dropping.fault = staticmethod(fault)


def contents(store: Store) -> dict[str, bytes]:
    """Return all files of a store, hidden ones too."""
    if isinstance(store.place, LocalFolder):
        root = store.place.path
        return {str(one.relative_to(root)): one.read_bytes() for one in root.rglob("*") if one.is_file()}
    assert isinstance(store.place, RemoteFiles)
    held, root_name = store.place.files.store, store.place.root + "/"
    return {name.removeprefix(root_name): one.getvalue() for name, one in held.items() if name.startswith(root_name)}


def filled(store: Store, entries: dict[str, dict[str, bytes]] = ENTRIES) -> dict[str, bytes]:
    for digest, files in entries.items():
        store.put("jobs", digest, files, {"layer": "conv1"})
    return contents(store)


def reference(tmp_path: Path) -> dict[str, bytes]:
    return filled(open_store(tmp_path / "reference", create=True))


def refusal(attempt: Callable[[], Any], intact: Any = None) -> str:
    """Return why an attempt was refused; where it was not, "" and what it returns is intact."""
    try:
        found = attempt()
    except (StoreRefused, OutputRefused) as error:
        return str(error)
    assert found == intact
    return ""
