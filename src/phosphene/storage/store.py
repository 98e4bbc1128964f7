"""The store of an atlas: an entry is complete, or it does not count.

store.json                                   the format's version
jobs/<digest>/filter_12.png, …               the files of one entry
jobs/<digest>/manifest.json                  written last: without it the entry is not done
jobs/<digest>/error.json                     why there is no manifest
The same content gives the same bytes, whoever writes it and however often: no times, no names of machines.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from phosphene.errors import EntryNotFound, InvalidRequest, OutputRefused, PhospheneError, StoreRefused
from phosphene.storage.filesystem import PART, FileSystem, display_name, open_filesystem, without_secrets

FORMAT = 1
KINDS = ("jobs", "layers", "evidence", "atlases")
STORE, MANIFEST, ERROR = "store.json", "manifest.json", "error.json"


@dataclass(frozen=True)
class Store:
    """Entries in a folder, or behind any URL that fsspec knows.

    Attributes:
        url: as the user typed it.
    """

    url: str

    def __repr__(self) -> str:
        return f"Store({display_name(self.url)})"

    @cached_property
    def filesystem(self) -> FileSystem:
        """The folder or the remote files of the store."""
        return open_filesystem(self.url)

    def read(self, name: str) -> bytes:
        """Return the bytes of a file, such as "jobs/ab12…/manifest.json".

        Raises:
            EntryNotFound: there is none.
            StoreRefused: it cannot be read.
        """
        with self.reading(name):
            return self.filesystem.read(valid_path(name))

    def write(self, name: str, content: bytes) -> None:
        """Write a file that appears whole or not at all; a dropped connection is tried again.

        Raises:
            OutputRefused: it cannot be written.
        """
        with self.writing(name):
            self.filesystem.write(valid_path(name), content)

    def done(self, kind: str) -> set[str]:
        """Return the digests of the finished entries; one listing."""
        with self.reading(kind):
            return self.filesystem.folders_with(valid_kind(kind), MANIFEST)

    def has(self, kind: str, digest: str) -> bool:
        """Return whether an entry is finished now, by this driver or by another."""
        with self.reading(kind):
            return self.filesystem.has(f"{entry_path(kind, digest)}/{MANIFEST}")

    def put(self, kind: str, digest: str, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> None:
        """Write an entry, its manifest last, or replace it.

        Two drivers may do that at once: in a folder one waits for the other. Behind a URL they write the same bytes;
        should these differ (another kind of GPU), `get` refuses files of one driver under the manifest of the other.

        Args:
            files: bytes by name.
            manifest: in JSON terms; `files`, the size and SHA-256 of each, is added.

        Raises:
            OutputRefused: it cannot be written; the entry then counts as not done.
        """
        entry = entry_path(kind, digest)
        checksums = {valid_name(name): checksum_of(content) for name, content in files.items()}
        new = signed_json({**manifest, "files": checksums})
        with self.writing(entry), self.filesystem.lock(entry):
            with suppress(FileNotFoundError):
                if self.filesystem.read(f"{entry}/{MANIFEST}") != new:
                    self.filesystem.remove(f"{entry}/{MANIFEST}")  # not done until the new one is written
            for name in sorted(files):
                self.filesystem.write(f"{entry}/{name}", files[name])
            leftovers = set(self.filesystem.names(entry)) - {MANIFEST, *files}
            worthless = {name for name in leftovers if name == ERROR or name.endswith(PART)}
            self.remove_files(entry, worthless)
            self.filesystem.write(f"{entry}/{MANIFEST}", new)
            with suppress(Exception):  # the entry is complete
                self.remove_files(entry, leftovers - worthless)  # last: until now work could be resumed from them

    def remove_files(self, entry: str, names: set[str]) -> None:
        for name in sorted(names):
            self.filesystem.remove(f"{entry}/{name}")

    def manifest(self, kind: str, digest: str) -> dict[str, Any]:
        """Return the manifest of a finished entry.

        Raises:
            EntryNotFound: the entry is not done.
            StoreRefused: it is damaged.
        """
        name = f"{entry_path(kind, digest)}/{MANIFEST}"
        return self.verified_json(name, self.read(name))

    def get(self, kind: str, digest: str, name: str, manifest: Mapping[str, Any] | None = None) -> bytes:
        """Return a file of a finished entry, as it was written.

        Args:
            manifest: the entry's, if the caller has it: it is then read again only if the file does not agree with it,
                as after another driver has replaced the entry.

        Raises:
            EntryNotFound: the entry is not done, or holds no such file.
            StoreRefused: the file is damaged, or gone.
        """
        entry = entry_path(kind, digest)
        if manifest is not None:
            with suppress(EntryNotFound, StoreRefused):
                return self.verified_file(entry, name, manifest["files"])
        return self.verified_file(entry, name, self.manifest(kind, digest)["files"])

    def verified_file(self, entry: str, name: str, checksums: Mapping[str, Any]) -> bytes:
        """Return the bytes of an entry's file, which must match the checksums in the manifest."""
        path = f"{entry}/{name}"
        if name not in checksums:
            raise EntryNotFound(
                f"{self.display_path(path)} is not in its entry, which holds {', '.join(sorted(checksums))}"
            )
        try:
            content = self.read(path)
        except EntryNotFound:
            raise self.damage_error(path, "it is gone") from None
        if len(content) != checksums[name]["bytes"]:
            raise self.damage_error(path, f"it has {len(content)} bytes of {checksums[name]['bytes']}")
        if checksum_of(content) != checksums[name]:
            raise self.damage_error(path, "its bytes have changed")
        return content

    def fail(self, kind: str, digest: str, message: str) -> None:
        """Record why an entry could not be made, unless another driver has made it; `put` deletes the record."""
        if not self.has(kind, digest):
            self.write(f"{entry_path(kind, digest)}/{ERROR}", signed_json({"error": message}))

    def failures(self, kind: str) -> dict[str, str]:
        """Return why entries could not be made, by digest, without those that were made since."""
        with self.reading(kind):
            failed = self.filesystem.folders_with(valid_kind(kind), ERROR)
        messages = {}
        for digest in sorted(failed - self.done(kind)):
            name = f"{kind}/{digest}/{ERROR}"
            with suppress(EntryNotFound):  # another driver made it meanwhile
                messages[digest] = str(self.verified_json(name, self.read(name))["error"])
        return messages

    def verified_json(self, name: str, content: bytes) -> dict[str, Any]:
        """Return the content of a JSON file of the store, checked against its own digest.

        Raises:
            StoreRefused: it is damaged.
        """
        try:
            decoded: dict[str, Any] = json.loads(content)
            if decoded.pop("check") != digest_of(decoded):
                raise ValueError("its bytes have changed")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            reason = "its bytes have changed" if str(error) == "its bytes have changed" else "it is no longer JSON"
            raise self.damage_error(name, reason) from error
        return decoded

    def damage_error(self, name: str, reason: str) -> StoreRefused:
        folder = self.display_path(name.rpartition("/")[0])
        return StoreRefused(
            f"{self.display_path(name)} is damaged: {reason}; delete {folder} and run the same command again"
        )

    def display_path(self, name: str) -> str:
        """Return a file's path or URL as messages show it."""
        return f"{display_name(self.url).rstrip('/')}/{name}" if name else display_name(self.url)

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Turn errors of the disk or the connection into a sentence."""
        with self.refusing(name, StoreRefused, "read"):
            try:
                yield
            except FileNotFoundError as error:
                raise EntryNotFound(f"{self.display_path(name)} is not there; run the atlas that makes it") from error

    def writing(self, name: str) -> AbstractContextManager[None]:
        """Turn errors of the disk or the connection into a sentence."""
        advice = ", and run the same command again: what is finished is kept"
        return self.refusing(name, OutputRefused, "written", advice)

    @contextmanager
    def refusing(self, name: str, refusal: type[PhospheneError], verb: str, advice: str = "") -> Iterator[None]:
        try:
            yield
        except PhospheneError:
            raise
        except Exception as error:  # libraries for URLs have errors of their own
            reason = without_secrets(reason_of(error), self.url)
            cause = error if reason == reason_of(error) else None
            message = f"{self.display_path(name)} cannot be {verb}: {reason}; mend that, or give another place{advice}"
            raise refusal(message) from cause


def open_store(url: str | Path, create: bool = False) -> Store:
    """Return the store in a folder or behind a URL.

    Args:
        url: a folder, or a URL that fsspec knows, such as s3://bucket/atlas.
        create: make a new store if there is none, and check that it can be written.

    Raises:
        StoreRefused: it is no store, or one of a newer format, or it cannot be read.
        OutputRefused: it cannot be written.
        ExtraMissing: the URL needs a package that is not installed.
    """
    store = Store(str(url))
    with store.reading(""):
        names = store.filesystem.names("")
    if STORE in names:
        check_format(store)
    elif not create:
        raise StoreRefused(f"{store.display_path('')} is no store; give the one that an atlas was written to")
    elif any(not name.startswith(".") for name in names):
        raise StoreRefused(f"{store.display_path('')} holds other files; give the store a folder of its own")
    if create:
        with store.writing(""):
            store.filesystem.check_writable()
        if STORE not in names:
            store.write(STORE, json_bytes({"format": FORMAT}))
    return store


def check_format(store: Store) -> None:
    """Refuse a store of a newer format."""
    try:
        version = json.loads(store.read(STORE))["format"]
        newer = int(version) > FORMAT
    except (ValueError, LookupError, TypeError) as error:
        raise StoreRefused(f'{store.display_path(STORE)} is damaged; put {{"format": {FORMAT}}} into it') from error
    if newer:
        raise StoreRefused(
            f"{store.display_path('')} has format {version}, and this phosphene knows formats up to {FORMAT}; update it"
        )


def digest_of(spec: Mapping[str, Any]) -> str:
    """Return the identity of a spec: 32 hexadecimal digits of the SHA-256 of its canonical JSON.

    Raises:
        InvalidRequest: it holds a value that JSON cannot express, such as NaN.

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
    """Return JSON as the store writes it: in ASCII, since file names may hold what UTF-8 cannot encode."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def checksum_of(content: bytes) -> dict[str, Any]:
    """Return the size and SHA-256 of a file."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def reason_of(error: Exception) -> str:
    """Return the message of an error on one line."""
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
    """Return a path that stays inside the store.

    Raises:
        InvalidRequest: it would not.
    """
    return "/".join(valid_name(part) for part in name.split("/"))


def valid_name(name: str) -> str:
    """Return the name of a file or folder, if every disk takes it."""
    if not name or name.startswith(".") or any(char in '/\\:*?"<>|' or not char.isprintable() for char in name):
        raise InvalidRequest(f"{name!r} is no name for a file in a store; use letters, digits and ._-")
    return name
