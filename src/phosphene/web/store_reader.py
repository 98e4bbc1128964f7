"""What the page reads of stores: their atlases, layers, filters and files. It is kept for a few seconds, so that a
store that is being added to shows it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from phosphene.atlases.report import verdicts_of
from phosphene.atlases.verdicts import Verdict
from phosphene.errors import EntryNotFound, InvalidRequest, PhospheneError, StoreRefused, nearest
from phosphene.evidence.collect import Evidence, load_evidence
from phosphene.storage.store import MANIFEST, STORE, Store, entry_path, open_store
from phosphene.training.history import History, is_history, open_history
from phosphene.web.cache import SizedCache
from phosphene.web.urls import DIGITS, layer_path, layer_slug

__all__ = ["AtlasFacts", "Filter", "StoreReader", "layer_path", "layer_slug", "stores_and_records_at"]

SECONDS = 3.0  # that something is kept
MANIFESTS = 24_000_000  # bytes of manifests, as they lie in the store
EVIDENCE = 2  # whose statistics are kept
JOBS = 200_000  # whose digests are kept


class Manifest(NamedTuple):
    """What a manifest says, and the SHA-256 of its bytes."""

    facts: Mapping[str, Any]
    mark: str


class AtlasFacts(NamedTuple):
    """An atlas: the first digits of its digest, which are its address, and its manifest."""

    d: str
    manifest: Mapping[str, Any]


class Filter(NamedTuple):
    """A filter that has a picture: its verdict, its line in the layer's manifest, and the manifest of its job."""

    verdict: Verdict
    picture: Mapping[str, Any]
    job: Mapping[str, Any]


class StoresAndRecords(NamedTuple):
    """What there is at a place to be shown, and a sentence on each store or record that cannot be read."""

    stores: list[Store]
    histories: list[History]
    damaged: list[str]


class StoreReader:
    """The atlases of some stores. Threads may share one.

    Attributes:
        stores: in the order in which they are looked through.
    """

    def __init__(self, stores: Sequence[Store], seconds: float = SECONDS) -> None:
        self.stores = tuple(stores)
        self.places: SizedCache[dict[str, tuple[Store, str]]] = SizedCache(1, seconds)
        self.manifests: SizedCache[Manifest] = SizedCache(MANIFESTS, seconds)
        self.known: SizedCache[Evidence] = SizedCache(EVIDENCE)
        self.worked: SizedCache[int] = SizedCache(1, seconds)
        self.jobs: SizedCache[frozenset[str]] = SizedCache(JOBS)

    def atlases(self) -> list[AtlasFacts]:
        """Return all atlases that can be read, by the names of their networks; see `damaged`."""
        return sorted(self.sound()[0], key=lambda one: (one.manifest["model"], one.d))

    def damaged(self) -> list[str]:
        """Return what is wrong with the atlases that cannot be read, a sentence each."""
        return self.sound()[1]

    def sound(self) -> tuple[list[AtlasFacts], list[str]]:
        """Return the atlases that can be read, and what is wrong with the others."""
        found, wrong = [], []
        for d in sorted(self.listed()):
            try:
                found.append(AtlasFacts(d, self.atlas(d)))
            except (EntryNotFound, StoreRefused) as error:
                wrong.append(str(error))
        return found, wrong

    def atlas(self, d: str) -> Mapping[str, Any]:
        """Return the manifest of an atlas.

        Raises:
            EntryNotFound: there is none of these digits. StoreRefused: it is damaged.
        """
        return self.manifest(*self.found(d)).facts

    def store_of(self, d: str) -> Store:
        """Return the store that holds an atlas."""
        return self.found(d)[0]

    def row(self, d: str, path: str) -> Mapping[str, Any]:
        """Return what the manifest of an atlas says of a layer.

        Raises:
            EntryNotFound: the atlas has no such layer.
        """
        rows: dict[str, Mapping[str, Any]] = {one["path"]: one for one in self.atlas(d)["layers"]}
        if path not in rows:
            raise EntryNotFound(f"this atlas has no layer {path!r}; the nearest are: {nearest(path, rows)}")
        return rows[path]

    def channels(self, d: str, path: str) -> int | None:
        """Return how many filters a layer has, None where no atlas of the same weights has the layer."""
        fingerprint = self.atlas(d)["fingerprint"]
        others = [one.manifest for one in self.atlases() if one.manifest["fingerprint"] == fingerprint]
        rows = (row for manifest in (self.atlas(d), *others) for row in manifest["layers"])
        return next((int(row["channels"]) for row in rows if row["path"] == path), None)

    def layer(self, d: str, path: str) -> Mapping[str, Any]:
        """Return the manifest of a layer."""
        return self.manifest(self.store_of(d), "layers", self.row(d, path)["digest"]).facts

    def verdicts(self, d: str, path: str) -> list[Verdict]:
        """Return the verdicts on a layer's pictures, in the order of its sheets; empty ones where it was not judged."""
        return verdicts_of(self.layer(d, path))

    def filter(self, d: str, path: str, n: int) -> Filter:
        """Return a filter that has a picture.

        Raises:
            EntryNotFound: the atlas has no such layer, or no picture of this filter.
        """
        found = self.layer(d, path)
        for index, picture in enumerate(found["pictures"]):
            if picture["channel"] == n:
                only = {**found, "pictures": [picture], "verdicts": found["verdicts"][index : index + 1]}
                job = self.manifest(self.store_of(d), "jobs", picture["job"]).facts
                return Filter(verdicts_of(only)[0], picture, job)
        raise EntryNotFound(f"this atlas has no picture of filter {n} of {path}; it has {len(found['pictures']):,}")

    def evidence(self, d: str) -> Evidence | None:
        """Return what photos do to the network of an atlas, without the crops; None where none were shown."""
        digest, store = self.atlas(d)["evidence"], self.store_of(d)
        return digest and self.known.get((store, digest), lambda _: (load_evidence(store, digest, sheets=False), 1))

    def photos(self, d: str) -> int | None:
        """Return how many photos were shown to the network of an atlas; None where none were."""
        digest = self.atlas(d)["evidence"]
        return int(self.manifest(self.store_of(d), "evidence", digest).facts["seen"]) if digest else None

    def unfinished(self) -> int:
        """Return how many jobs are done that belong to no atlas yet.

        Of a store behind a URL that is told only while it has no atlas: the rest would be a request for each layer.
        """

        def count(_: object) -> tuple[int, int]:
            total = 0
            for store in filter(self.is_told, self.stores):
                with suppress(EntryNotFound, StoreRefused):  # of a damaged store that cannot be told
                    total += len(store.done("jobs") - self.named(store))
            return total, 1

        return self.worked.get("", count)

    def is_told(self, store: Store) -> bool:
        """Return whether it is soon known which jobs of a store belong to no atlas."""
        return "://" not in store.url or not any(store is one for one, _ in self.listed().values())

    def named(self, store: Store) -> set[str]:
        """Return the digests of the jobs that the atlases of a store are made of."""

        def read(digest: str, _: object) -> tuple[frozenset[str], int]:
            jobs = frozenset(self.manifest(store, "layers", digest).facts["jobs"])
            return jobs, len(jobs)

        atlases = (self.atlas(d) for d, (holder, _) in self.listed().items() if holder is store)
        layers = {row["digest"] for one in atlases for row in one["layers"]}
        return {job for one in layers for job in self.jobs.get((store, one), partial(read, one))}

    def file(self, d: str, path: str, name: str) -> bytes:
        """Return a file of a layer's entry, such as "sheet.webp".

        Raises:
            EntryNotFound: there is none of that name. StoreRefused: it is damaged, or gone.
        """
        return self.file_of(self.store_of(d), "layers", self.row(d, path)["digest"], name)

    def file_of_job(self, d: str, path: str, n: int, name: str) -> bytes:
        """Return a file of the job that drew a filter, such as "filter_7.png"."""
        return self.file_of(self.store_of(d), "jobs", self.filter(d, path, n).picture["job"], name)

    def file_of_evidence(self, begin: str, name: str) -> bytes:
        """Return a file of evidence, such as "crops_0_0.webp", by the first digits of its digest."""
        for one in self.atlases():
            if (one.manifest["evidence"] or "")[:DIGITS] == begin:
                return self.file_of(self.store_of(one.d), "evidence", one.manifest["evidence"], name)
        raise EntryNotFound(f"no atlas here rests on evidence {begin!r}; begin at index.html")

    def file_of(self, store: Store, kind: str, digest: str, name: str) -> bytes:
        """Return a file of an entry."""
        return store.get(kind, digest, name, self.manifest(store, kind, digest).facts)

    def mark(self, d: str, path: str | None = None) -> tuple[str, ...]:
        """Return what changes when the manifest of an atlas does, or that of one of its layers."""
        entries = [self.found(d)]
        if path is not None:
            entries.append((self.store_of(d), "layers", self.row(d, path)["digest"]))
        return tuple(self.manifest(*one).mark for one in entries)

    def listed(self) -> dict[str, tuple[Store, str]]:
        """Return where each atlas lies, by its address."""

        def look(_: object) -> tuple[dict[str, tuple[Store, str]], int]:
            return {one[:DIGITS]: (store, one) for store in reversed(self.stores) for one in store.done("atlases")}, 1

        return self.places.get("", look)

    def found(self, d: str) -> tuple[Store, str, str]:
        """Return where an atlas lies: store, kind and digest."""
        known = self.listed()
        if d not in known:
            raise EntryNotFound(f"there is no atlas {d!r} here; there are: {', '.join(sorted(known)) or 'none'}")
        store, digest = known[d]
        return store, "atlases", digest

    def manifest(self, store: Store, kind: str, digest: str) -> Manifest:
        """Return a manifest; one whose bytes are as before is not parsed again."""

        def read(before: Manifest | None) -> tuple[Manifest, int]:
            name = f"{entry_path(kind, digest)}/{MANIFEST}"
            content = store.read(name)
            mark = hashlib.sha256(content).hexdigest()
            same = before and before.mark == mark
            return before if before and same else Manifest(store.whole(name, content), mark), len(content)

        return self.manifests.get((store, kind, digest), read)


def stores_and_records_at(place: str | Path) -> StoresAndRecords:
    """Return the stores and the records of trainings at a place: it is one, or a folder with some one level down.

    Raises:
        InvalidRequest: it is neither.
        StoreRefused, WeightsRefused: nothing there can be read; of several what can is returned.
    """
    folder = Path(place)
    if "://" in str(place):
        return StoresAndRecords([open_store(place)], [], [])
    try:
        inner = sorted(one for one in folder.iterdir() if one.is_dir())
    except OSError as error:
        raise InvalidRequest(
            f"{place} cannot be read: {error.strerror}; give a store, or a training's folder"
        ) from error
    found, refused = StoresAndRecords([], [], []), list[PhospheneError]()
    for one in [folder] if is_shown(folder) else inner:
        try:
            if (one / STORE).exists():
                found.stores.append(open_store(one))
            if is_history(one):
                found.histories.append(open_history(one))
        except PhospheneError as error:
            refused.append(error)
            found.damaged.append(str(error))
    if found.stores or found.histories:
        return found
    if refused:
        raise refused[0]
    raise InvalidRequest(
        f"{place} holds no store and no record of a training, nor does a folder in it; give the one that "
        "`phosphene atlas` or a Recorder wrote to"
    )


def is_shown(folder: Path) -> bool:
    """Return whether a folder is itself a store or the record of a training."""
    return (folder / STORE).exists() or is_history(folder)
