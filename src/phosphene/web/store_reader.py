"""Read what the page needs from stores: atlases, layers, filters and files.

What was read is cached for a few seconds only, so that the page follows a store that still grows.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from phosphene.atlases.report import verdicts_of
from phosphene.atlases.verdicts import Verdict
from phosphene.errors import EntryNotFound, InvalidRequest, PhospheneError, StoreRefused, nearest
from phosphene.evidence.statistics import Evidence, load_evidence
from phosphene.storage.store import MANIFEST, STORE, Store, entry_path, open_store
from phosphene.training.history import History, is_history, open_history
from phosphene.web.cache import SizedCache
from phosphene.web.urls import DIGITS

SECONDS = 3.0  # for which listings and manifests are cached
MANIFEST_BYTES, EVIDENCE_ENTRIES, JOB_DIGESTS = 24_000_000, 2, 200_000  # that are cached

Locations = dict[str, tuple[Store, str]]  # the store and the digest of each atlas, by its id


class Manifest(NamedTuple):
    """The contents of a manifest, and the SHA-256 of its bytes."""

    facts: Mapping[str, Any]
    etag: str


class AtlasFacts(NamedTuple):
    """An atlas: its id, which is the first digits of its digest, and its manifest."""

    atlas_id: str
    manifest: Mapping[str, Any]


class Filter(NamedTuple):
    """A filter that has a picture: its verdict, its row of the layer's manifest, and the manifest of its job."""

    verdict: Verdict
    picture: Mapping[str, Any]
    job: Mapping[str, Any]


class StoresAndRecords(NamedTuple):
    """The stores and training records at a place, and a sentence on each that cannot be read."""

    stores: list[Store]
    histories: list[History]
    damaged: list[str]


class StoreReader:
    """Reads the atlases of some stores. Threads may share one.

    Attributes:
        stores: in order of precedence.
    """

    def __init__(self, stores: Sequence[Store], seconds: float = SECONDS) -> None:
        self.stores = tuple(stores)
        self.location_cache: SizedCache[Locations] = SizedCache(1, seconds)
        self.manifest_cache: SizedCache[Manifest] = SizedCache(MANIFEST_BYTES, seconds)
        self.evidence_cache: SizedCache[Evidence] = SizedCache(EVIDENCE_ENTRIES)
        self.unfinished_cache: SizedCache[int] = SizedCache(1, seconds)
        self.job_cache: SizedCache[frozenset[str]] = SizedCache(JOB_DIGESTS)

    def atlases(self) -> list[AtlasFacts]:
        """Return all atlases that can be read, by the names of their networks; see `damaged`."""
        return sorted(self.readable()[0], key=lambda atlas: (atlas.manifest["model"], atlas.atlas_id))

    def damaged(self) -> list[str]:
        """Return a sentence on each atlas that cannot be read."""
        return self.readable()[1]

    def readable(self) -> tuple[list[AtlasFacts], list[str]]:
        """Return the atlases that can be read, and a sentence on each that cannot."""
        atlases, errors = [], []
        for atlas_id in sorted(self.locations()):
            try:
                atlases.append(AtlasFacts(atlas_id, self.atlas(atlas_id)))
            except (EntryNotFound, StoreRefused) as error:
                errors.append(str(error))
        return atlases, errors

    def atlas(self, atlas_id: str) -> Mapping[str, Any]:
        """Return the manifest of an atlas.

        Raises:
            EntryNotFound: no atlas has this id. StoreRefused: the manifest is damaged.
        """
        return self.manifest(*self.locate(atlas_id)).facts

    def store_of(self, atlas_id: str) -> Store:
        """Return the store that holds an atlas."""
        return self.locate(atlas_id)[0]

    def row(self, atlas_id: str, path: str) -> Mapping[str, Any]:
        """Return the row of a layer in the manifest of an atlas.

        Raises:
            EntryNotFound: the atlas has no such layer.
        """
        rows: dict[str, Mapping[str, Any]] = {row["path"]: row for row in self.atlas(atlas_id)["layers"]}
        if path not in rows:
            raise EntryNotFound(f"this atlas has no layer {path!r}; the nearest are: {nearest(path, rows)}")
        return rows[path]

    def channels(self, atlas_id: str, path: str) -> int | None:
        """Return how many filters a layer has, None if no atlas of the same weights has the layer."""
        fingerprint = self.atlas(atlas_id)["fingerprint"]
        same = [atlas.manifest for atlas in self.atlases() if atlas.manifest["fingerprint"] == fingerprint]
        rows = (row for manifest in (self.atlas(atlas_id), *same) for row in manifest["layers"])
        return next((int(row["channels"]) for row in rows if row["path"] == path), None)

    def layer(self, atlas_id: str, path: str) -> Mapping[str, Any]:
        """Return the manifest of a layer."""
        return self.manifest(self.store_of(atlas_id), "layers", self.row(atlas_id, path)["digest"]).facts

    def verdicts(self, atlas_id: str, path: str) -> list[Verdict]:
        """Return the verdicts on a layer's pictures, in the order of its sheets; empty ones if it was not judged."""
        return verdicts_of(self.layer(atlas_id, path))

    def filter(self, atlas_id: str, path: str, channel: int) -> Filter:
        """Return a filter that has a picture.

        Raises:
            EntryNotFound: the atlas has no such layer, or no picture of this filter.
        """
        layer = self.layer(atlas_id, path)
        pictures = layer["pictures"]
        for index, picture in enumerate(pictures):
            if picture["channel"] == channel:
                only = {**layer, "pictures": [picture], "verdicts": layer["verdicts"][index : index + 1]}
                job = self.manifest(self.store_of(atlas_id), "jobs", picture["job"]).facts
                return Filter(verdicts_of(only)[0], picture, job)
        raise EntryNotFound(f"this atlas has no picture of filter {channel} of {path}; it has {len(pictures):,}")

    def evidence(self, atlas_id: str) -> Evidence | None:
        """Return the photo statistics of an atlas, without the crops; None if it was made without photos."""
        digest, store = self.atlas(atlas_id)["evidence"], self.store_of(atlas_id)
        key, read = (store, digest), lambda _: (load_evidence(store, digest, sheets=False), 1)
        return self.evidence_cache.get(key, read) if digest else None

    def photos(self, atlas_id: str) -> int | None:
        """Return how many photos the network of an atlas was shown; None if it was made without photos."""
        digest = self.atlas(atlas_id)["evidence"]
        return int(self.manifest(self.store_of(atlas_id), "evidence", digest).facts["seen"]) if digest else None

    def unfinished(self) -> int:
        """Return how many finished jobs belong to no atlas yet.

        A store behind a URL is counted only while it has no atlas: after that it would take a request per layer.
        """

        def count(_: object) -> tuple[int, int]:
            total = 0
            for store in filter(self.is_countable, self.stores):
                with suppress(EntryNotFound, StoreRefused):  # a damaged store cannot be counted
                    total += len(store.done("jobs") - self.atlas_jobs(store))
            return total, 1

        return self.unfinished_cache.get("", count)

    def is_countable(self, store: Store) -> bool:
        """Return whether it takes few requests to tell which jobs of a store belong to no atlas."""
        return "://" not in store.url or not any(store is holder for holder, _ in self.locations().values())

    def atlas_jobs(self, store: Store) -> set[str]:
        """Return the digests of the jobs that the atlases of a store are made of."""

        def read(digest: str, _: object) -> tuple[frozenset[str], int]:
            jobs = frozenset(self.manifest(store, "layers", digest).facts["jobs"])
            return jobs, len(jobs)

        atlases = (self.atlas(atlas_id) for atlas_id, (holder, _) in self.locations().items() if holder is store)
        layers = {row["digest"] for atlas in atlases for row in atlas["layers"]}
        return {job for layer in layers for job in self.job_cache.get((store, layer), partial(read, layer))}

    def file(self, atlas_id: str, path: str, name: str) -> bytes:
        """Return a file of a layer's entry, such as "sheet.webp".

        Raises:
            EntryNotFound: the entry has no file of that name. StoreRefused: the file is damaged or missing.
        """
        return self.entry_file(self.store_of(atlas_id), "layers", self.row(atlas_id, path)["digest"], name)

    def job_file(self, atlas_id: str, path: str, channel: int, name: str) -> bytes:
        """Return a file of the job that rendered a filter or its opposite, such as "filter_7.png"."""
        picture = self.filter(atlas_id, path, channel).picture
        opposite = picture.get("opposite", {})
        job = opposite["job"] if name == opposite.get("file") else picture["job"]
        return self.entry_file(self.store_of(atlas_id), "jobs", job, name)

    def evidence_file(self, digits: str, name: str) -> bytes:
        """Return a file of evidence, such as "crops_0_0.webp", by the first digits of its digest."""
        for atlas_id, manifest in self.atlases():
            if (manifest["evidence"] or "")[:DIGITS] == digits:
                return self.entry_file(self.store_of(atlas_id), "evidence", manifest["evidence"], name)
        raise EntryNotFound(f"no atlas here rests on evidence {digits!r}; begin at index.html")

    def entry_file(self, store: Store, kind: str, digest: str, name: str) -> bytes:
        """Return a file of an entry."""
        return store.get(kind, digest, name, self.manifest(store, kind, digest).facts)

    def etag(self, atlas_id: str, path: str | None = None) -> tuple[str, ...]:
        """Return a value that changes with the manifest of an atlas or, if a layer is given, with that layer's."""
        entries = [self.locate(atlas_id)]
        if path is not None:
            entries.append((self.store_of(atlas_id), "layers", self.row(atlas_id, path)["digest"]))
        return tuple(self.manifest(*entry).etag for entry in entries)

    def locations(self) -> Locations:
        """Return the store and the digest of each atlas, by its id."""

        def read(_: object) -> tuple[Locations, int]:
            stores = reversed(self.stores)  # of two atlases with one id, the first store's stays
            return {digest[:DIGITS]: (store, digest) for store in stores for digest in store.done("atlases")}, 1

        return self.location_cache.get("", read)

    def locate(self, atlas_id: str) -> tuple[Store, str, str]:
        """Return the store, kind and digest of an atlas."""
        locations = self.locations()
        if atlas_id not in locations:
            ids = ", ".join(sorted(locations)) or "none"
            raise EntryNotFound(f"there is no atlas {atlas_id!r} here; there are: {ids}")
        store, digest = locations[atlas_id]
        return store, "atlases", digest

    def manifest(self, store: Store, kind: str, digest: str) -> Manifest:
        """Return a manifest; if its bytes have not changed, it is not parsed again."""

        def read(before: Manifest | None) -> tuple[Manifest, int]:
            name = f"{entry_path(kind, digest)}/{MANIFEST}"
            content = store.read(name)
            etag = hashlib.sha256(content).hexdigest()
            same = before and before.etag == etag
            return before if before and same else Manifest(store.verified_json(name, content), etag), len(content)

        return self.manifest_cache.get((store, kind, digest), read)


def picture_files(picture: Mapping[str, Any]) -> list[str]:
    """Return the files of a filter by its row of the layer's manifest: its picture, further facets, its opposite."""
    further = [*picture.get("facets", ()), *filter(None, [picture.get("opposite")])]
    return [row["file"] for row in (picture, *further)]


def stores_and_records_at(place: str | Path) -> StoresAndRecords:
    """Return the stores and training records at a place: the place itself, or the folders directly inside it.

    Raises:
        InvalidRequest: the place is neither a store nor a record, and has none inside.
        StoreRefused, WeightsRefused: nothing at the place can be read; if only some can, these are returned.
    """
    folder = Path(place)
    if "://" in str(place):
        return StoresAndRecords([open_store(place)], [], [])
    try:
        inner = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise InvalidRequest(
            f"{place} cannot be read: {error.strerror}; give a store, or a training's folder"
        ) from error
    result, errors = StoresAndRecords([], [], []), list[PhospheneError]()
    for path in [folder] if is_store_or_record(folder) else inner:
        try:
            if (path / STORE).exists():
                result.stores.append(open_store(path))
            if is_history(path):
                result.histories.append(open_history(path))
        except PhospheneError as error:
            errors.append(error)
            result.damaged.append(str(error))
    if result.stores or result.histories:
        return result
    if errors:
        raise errors[0]
    raise InvalidRequest(
        f"{place} holds no store and no record of a training, nor does a folder in it; give the one that "
        "`phosphene atlas` or a Recorder wrote to"
    )


def is_store_or_record(folder: Path) -> bool:
    """Return whether a folder is itself a store or the record of a training."""
    return (folder / STORE).exists() or is_history(folder)
