"""The store of an atlas: entries that are there whole or count as not there.

store.json                                   the format's version
jobs/<digest>/filter_12.png, …               what one entry holds
jobs/<digest>/manifest.json                  written last: without it the entry is not done
jobs/<digest>/error.json                     why there is no manifest
The same content gives the same bytes, whoever writes it and however often: no times, no names of machines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from phosphene.errors import EntryNotFound, InvalidRequest, OutputRefused, PhospheneError, StoreRefused
from phosphene.storage.filesystem import PART, FileSystem, display_name, open_place, without_secrets

FORMAT = 1
KINDS = ("jobs", "layers", "evidence", "atlases")
STORE, MANIFEST, ERROR = "store.json", "manifest.json", "error.json"


@dataclass(frozen=True)
class Store:
    """A folder, or any URL that fsspec knows, of entries.

    Attributes:
        url: as typed.
    """

    url: str

    def __repr__(self) -> str:
        return f"Store({display_name(self.url)})"

    @cached_property
    def place(self) -> FileSystem:
        """Where the bytes lie."""
        return open_place(self.url)

    def read(self, name: str) -> bytes:
        """Return the bytes of a file, such as "jobs/ab12…/manifest.json".

        Raises:
            EntryNotFound: there is none.
            StoreRefused: it cannot be read.
        """
        with self.reading(name):
            return self.place.read(valid_path(name))

    def write(self, name: str, content: bytes) -> None:
        """Write a file that appears whole or not at all; a dropped connection is tried again.

        Raises:
            OutputRefused: it cannot be written.
        """
        with self.writing(name):
            self.place.write(valid_path(name), content)

    def done(self, kind: str) -> set[str]:
        """Return the digests of the finished entries; one listing."""
        with self.reading(kind):
            return self.place.folders_with(valid_kind(kind), MANIFEST)

    def has(self, kind: str, digest: str) -> bool:
        """Return whether an entry is finished now, by this driver or another."""
        with self.reading(kind):
            return self.place.has(f"{entry_path(kind, digest)}/{MANIFEST}")

    def put(self, kind: str, digest: str, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> None:
        """Write an entry, its manifest last, or replace it.

        Two drivers may do that at once: in a folder one waits for the other. Behind a URL they write the same bytes;
        should these differ (another kind of GPU), `get` finds files of the one under the manifest of the other.

        Args:
            files: bytes by name.
            manifest: in JSON terms; gets `files`, the size and SHA-256 of each.

        Raises:
            OutputRefused: it cannot be written; the entry then counts as not done.
        """
        where = entry_path(kind, digest)
        content = signed_json(
            {**manifest, "files": {valid_name(name): checksum_of(one) for name, one in files.items()}}
        )
        with self.writing(where), self.place.alone(where):
            with suppress(FileNotFoundError):
                if self.place.read(f"{where}/{MANIFEST}") != content:
                    self.place.remove(f"{where}/{MANIFEST}")  # until the new one is whole there is none
            for name in sorted(files):
                self.place.write(f"{where}/{name}", files[name])
            others = set(self.place.names(where)) - {MANIFEST, *files}
            worthless = {name for name in others if name == ERROR or name.endswith(PART)}
            self.sweep(where, worthless)
            self.place.write(f"{where}/{MANIFEST}", content)
            with suppress(Exception):  # the entry is whole
                self.sweep(where, others - worthless)  # last: until then work could be resumed from them

    def sweep(self, where: str, names: set[str]) -> None:
        """Take files of an entry away."""
        for name in sorted(names):
            self.place.remove(f"{where}/{name}")

    def manifest(self, kind: str, digest: str) -> dict[str, Any]:
        """Return what a finished entry's manifest says.

        Raises:
            EntryNotFound: the entry is not done.
            StoreRefused: it is damaged.
        """
        name = f"{entry_path(kind, digest)}/{MANIFEST}"
        return self.whole(name, self.read(name))

    def get(self, kind: str, digest: str, name: str, manifest: Mapping[str, Any] | None = None) -> bytes:
        """Return a file of a finished entry, as it was written.

        Args:
            manifest: the entry's, where it is at hand: it is then read again only if the file does not agree with it,
                as where another driver has replaced the entry meanwhile.

        Raises:
            EntryNotFound: the entry is not done, or holds no such file.
            StoreRefused: the file is damaged, or gone.
        """
        where = f"{entry_path(kind, digest)}/{name}"
        if manifest is not None:
            with suppress(EntryNotFound, StoreRefused):
                return self.agreeing(where, name, manifest["files"])
        return self.agreeing(where, name, self.manifest(kind, digest)["files"])

    def agreeing(self, where: str, name: str, files: Mapping[str, Any]) -> bytes:
        """Return the bytes of an entry's file, which have to be as its manifest says."""
        if name not in files:
            raise EntryNotFound(f"{self.shown(where)} is not in its entry, which holds {', '.join(sorted(files))}")
        try:
            content = self.read(where)
        except EntryNotFound:
            raise self.damaged(where, "it is gone") from None
        if len(content) != files[name]["bytes"]:
            raise self.damaged(where, f"it has {len(content)} bytes of {files[name]['bytes']}")
        if checksum_of(content) != files[name]:
            raise self.damaged(where, "its bytes have changed")
        return content

    def fail(self, kind: str, digest: str, message: str) -> None:
        """Record why an entry could not be made; forgotten when it is, and pointless where another driver made it."""
        if not self.has(kind, digest):
            self.write(f"{entry_path(kind, digest)}/{ERROR}", signed_json({"error": message}))

    def failures(self, kind: str) -> dict[str, str]:
        """Return why entries could not be made, by digest; none of those that were made since."""
        with self.reading(kind):
            failed = self.place.folders_with(valid_kind(kind), ERROR)
        found = {}
        for digest in sorted(failed - self.done(kind)):
            name = f"{kind}/{digest}/{ERROR}"
            with suppress(EntryNotFound):  # another driver made it meanwhile
                found[digest] = str(self.whole(name, self.read(name))["error"])
        return found

    def whole(self, name: str, content: bytes) -> dict[str, Any]:
        """Return what a JSON file of the store says.

        Raises:
            StoreRefused: it is damaged.
        """
        try:
            found: dict[str, Any] = json.loads(content)
            if found.pop("check") != digest_of(found):
                raise ValueError("its bytes have changed")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            reason = "its bytes have changed" if str(error) == "its bytes have changed" else "it is no longer JSON"
            raise self.damaged(name, reason) from error
        return found

    def damaged(self, name: str, reason: str) -> StoreRefused:
        """Return the refusal of a file."""
        folder = self.shown(name.rpartition("/")[0])
        return StoreRefused(f"{self.shown(name)} is damaged: {reason}; delete {folder} and run the same command again")

    def shown(self, name: str) -> str:
        """Return a place in the store as messages show it."""
        return f"{display_name(self.url).rstrip('/')}/{name}" if name else display_name(self.url)

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Say in a sentence what kept something from being read."""
        try:
            yield
        except PhospheneError:
            raise
        except FileNotFoundError as error:
            raise EntryNotFound(f"{self.shown(name)} is not there; run the atlas that makes it") from error
        except Exception as error:  # libraries for URLs have errors of their own
            reason = without_secrets(reason_of(error), self.url)
            raise StoreRefused(f"{self.shown(name)} cannot be read: {reason}; mend that, or give another place") from (
                error if reason == reason_of(error) else None
            )

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Say in a sentence what kept something from being written."""
        try:
            yield
        except PhospheneError:
            raise
        except Exception as error:  # libraries for URLs have errors of their own
            reason = without_secrets(reason_of(error), self.url)
            raise OutputRefused(
                f"{self.shown(name)} cannot be written: {reason}; mend that, or give another place, and run the same "
                "command again: what is finished is kept"
            ) from (error if reason == reason_of(error) else None)


def open_store(url: str | Path, create: bool = False) -> Store:
    """Return the store at a place.

    Args:
        url: a folder, or a URL that fsspec knows, such as s3://bucket/atlas.
        create: begin a store where there is none, and find out whether it can be written.

    Raises:
        StoreRefused: it is no store, or one of a newer format, or it cannot be read.
        OutputRefused: it cannot be written.
        ExtraMissing: the URL needs a package that is not installed.
    """
    store = Store(str(url))
    with store.reading(""):
        names = store.place.names("")
    if STORE in names:
        check_format(store)
    elif not create:
        raise StoreRefused(f"{store.shown('')} is no store; give the one that an atlas was written to")
    elif any(not one.startswith(".") for one in names):
        raise StoreRefused(f"{store.shown('')} holds other files; give the store a folder of its own")
    if create:
        with store.writing(""):
            store.place.check_writable()
        if STORE not in names:
            store.write(STORE, json_bytes({"format": FORMAT}))
    return store


def check_format(store: Store) -> None:
    """Refuse a store of a newer format."""
    try:
        version = json.loads(store.read(STORE))["format"]
        newer = int(version) > FORMAT
    except (ValueError, LookupError, TypeError) as error:
        raise StoreRefused(f'{store.shown(STORE)} is damaged; put {{"format": {FORMAT}}} into it') from error
    if newer:
        raise StoreRefused(
            f"{store.shown('')} has format {version}, and this phosphene knows formats up to {FORMAT}; update phosphene"
        )


def digest_of(spec: Mapping[str, Any]) -> str:
    """Return the identity of a spec: 32 hexadecimal digits of the SHA-256 of its canonical JSON.

    Raises:
        InvalidRequest: it holds what JSON does not, such as NaN.

    >>> digest_of({"b": 1, "a": [0.5]}) == digest_of({"a": (0.5,), "b": 1})
    True
    """
    try:
        plain = json.loads(json.dumps(dict(spec), allow_nan=False))  # so that 1 and "1" sort alike
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{error}, in {str(dict(spec))[:200]}; give numbers, text and lists of them") from error
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def signed_json(content: Mapping[str, Any]) -> bytes:
    """Return JSON that carries its own digest, as `check`."""
    return json_bytes({**content, "check": digest_of(content)})


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """Return JSON as the store writes it: ASCII, since names of files may hold what UTF-8 does not."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def checksum_of(content: bytes) -> dict[str, Any]:
    """Return the size and SHA-256 of a file."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def reason_of(error: Exception) -> str:
    """Return what an error says, on one line."""
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())


def valid_kind(kind: str) -> str:
    """Return a kind of entry.

    Raises:
        InvalidRequest: there is no such kind.
    """
    if kind not in KINDS:
        raise InvalidRequest(f"a store has no {kind!r}; it has {', '.join(KINDS)}")
    return kind


def entry_path(kind: str, digest: str) -> str:
    """Return the folder of an entry."""
    return f"{valid_kind(kind)}/{valid_name(digest)}"


def valid_path(name: str) -> str:
    """Return a name that stays inside the store.

    Raises:
        InvalidRequest: it would not.
    """
    return "/".join(valid_name(one) for one in name.split("/"))


def valid_name(name: str) -> str:
    """Return a name of one file or folder."""
    if not name or name.startswith(".") or any(one in '/\\:*?"<>|' or not one.isprintable() for one in name):
        raise InvalidRequest(f"{name!r} is no name for a file in a store; use letters, digits and ._-")
    return name
