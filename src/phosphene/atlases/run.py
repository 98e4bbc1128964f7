"""Running an atlas: the jobs that a store lacks go to a runner, and what comes back goes into the store.

Only the driver writes. What is finished is in the store at once, so that a run may be stopped at any moment, and in any
way, and goes on where it was.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom
from typing import Any

from phosphene.atlases.entries import atlas_digest, layer_digest, write_atlas, write_layer
from phosphene.atlases.plan import Atlas, Job
from phosphene.atlases.render_job import picture_size
from phosphene.atlases.runners.local import LocalRunner
from phosphene.atlases.runners.pool import Outcome, Runner
from phosphene.atlases.runners.ray import RayRunner
from phosphene.atlases.runners.ray_photos import RayPhotoRunner
from phosphene.errors import EntryNotFound, Interrupted, OutputRefused, StoreRefused, Unfinished
from phosphene.evidence.collect import Evidence, evidence
from phosphene.evidence.photo_dataset import open_photos
from phosphene.network.layers import Layer
from phosphene.storage.store import Store, open_store

AtlasProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
        store: the place of the store.
        atlas: the name of the atlas' entry in it, None where there is none yet.
        jobs: of the whole atlas; `done`: how many of them are there; `rendered`: how many of these were done just now.
        failed: by a job's digest, why it could not be done.
        verdicts: how many pictures are vivid, weak, unstable, dead; none where there is no entry yet.
    """

    store: str
    atlas: str | None
    jobs: int
    done: int
    rendered: int
    failed: Mapping[str, str]
    verdicts: Mapping[str, int]


def run(
    atlas: Atlas,
    store: Store | str | Path,
    runner: Runner | None = None,
    photos: Any = None,
    watch: AtlasProgress | None = None,
) -> Summary:
    """Do what of an atlas is not in the store yet.

    A job that fails leaves its error in the store, and the others go on. Several runs may share one store.

    Args:
        store: a folder, a URL that fsspec knows, or an open store.
        runner: who works off the jobs, by default `LocalRunner()`.
        photos: to hold the pictures against: a folder, a parquet file, a data set; see `open_photos`.
        watch: called with what is counted ("pictures" or "photos"), how many are done, and how many there are.

    Raises:
        StoreRefused, OutputRefused, PhotoRefused: the store or the photos cannot be used, from the start.
        Unfinished: it failed on the way; what was finished is kept. `finished` is a `Summary`.
        Interrupted: on Ctrl-C, likewise.

    Example:
        >>> run(atlas(load("builtin/vgg19"), "block3*"), "atlas/vgg19").verdicts
    """
    runner = runner or LocalRunner()
    if photos is not None:  # which are refused before a store is made
        photos = open_photos(photos, atlas.model.channels_in)
    course = AtlasRun(atlas, store if isinstance(store, Store) else open_store(store, create=True), watch)
    with stopping(course):
        if photos is not None:
            course.gather(photos, runner)
        for _ in course.go(runner):
            pass
        return course.end()


class AtlasRun:
    """How far a run has come: which jobs are there, which are still to be begun, and which have failed."""

    def __init__(self, atlas: Atlas, store: Store, watch: AtlasProgress | None) -> None:
        self.atlas, self.store, self.watch = atlas, store, watch
        self.there: set[str] = set()
        self.pictures, self.total = 0, sum(len(job.channels) for job in atlas.jobs)
        self.left = Counter(job.layer for job in atlas.jobs)
        self.waiting: deque[Job] = deque()
        self.failed: dict[str, str] = {}
        self.rendered = 0
        self.evidence: Evidence | None = None

    def gather(self, photos: Any, runner: Runner) -> None:
        """Look at the photos, at the size of the pictures, so that the two compare; a store may know them already."""
        model, deepest = self.atlas.model, self.atlas.jobs[-1]
        size = picture_size(model, deepest)
        side = None if size == model.input_size else size[0]
        show = RayPhotoRunner(runner.address, runner.workers, runner.gpu) if isinstance(runner, RayRunner) else None
        seen = 0

        def tell(more: int, total: int) -> None:
            nonlocal seen
            seen += more
            if self.watch:
                self.watch("photos", seen, total)

        paths = [layer.path for layer in self.atlas.layers]
        self.evidence = evidence(model, photos, paths, size=side, store=self.store, watch=tell, show=show)

    def go(self, runner: Runner) -> Iterator[Layer]:
        """Have all jobs done that are not, and yield each layer when the last of its jobs is."""
        self.begin()
        yield from (layer for layer in self.atlas.layers if not self.left[layer.path])
        with closing(runner.run(self.atlas.model, self.jobs())) as outcomes:
            for outcome in outcomes:
                self.land(outcome)
                if not self.left[outcome.job.layer]:
                    yield self.atlas.model.find(outcome.job.layer)

    def begin(self) -> None:
        """Find out what is in the store already."""
        done = self.store.done("jobs")
        for job in self.atlas.jobs:
            self.count(job) if job.digest in done else self.waiting.append(job)
        self.tell()

    def count(self, job: Job) -> None:
        """Count a job that is in the store."""
        self.there.add(job.digest)
        self.pictures += len(job.channels)
        self.left[job.layer] -= 1

    def jobs(self) -> Iterator[Job]:
        """Yield the jobs to do, each if it is not done by then."""
        while self.waiting:
            job = self.waiting.popleft()
            if self.store.has("jobs", job.digest):
                self.leave(job)
            else:
                yield job

    def leave(self, job: Job) -> None:
        """Count a job that another driver has done, and go on elsewhere, so that the two do not keep doing the same."""
        self.count(job)
        if self.waiting:
            self.waiting.rotate(SystemRandom().randrange(len(self.waiting)))

    def land(self, outcome: Outcome) -> None:
        """Bring what came of a job into the store, and if it was the last of its layer, what follows from these."""
        job = outcome.job
        if outcome.error is not None:
            self.failed[job.digest] = outcome.error
            self.store.fail("jobs", job.digest, outcome.error)
        elif self.store.has("jobs", job.digest):
            self.leave(job)
        else:
            self.store.put("jobs", job.digest, outcome.files, outcome.manifest)
            self.count(job)
            self.rendered += 1
        self.tell()
        if not self.left[job.layer]:
            self.finish(self.atlas.model.find(job.layer))

    def finish(self, layer: Layer) -> None:
        """Write the entry of a layer, unless it is there and whole."""
        digest = layer_digest(self.atlas, layer, self.evidence)
        if not self.store.has("layers", digest) or self.store.manifest("layers", digest)["missing"]:
            write_layer(self.store, self.atlas, layer, self.there, self.evidence)

    def end(self) -> Summary:
        """Write the entries that are not there yet, and the one of the atlas last."""
        for layer in self.atlas.layers:
            self.finish(layer)
        if not self.there:
            return self.summary()
        verdicts = write_atlas(self.store, self.atlas, self.evidence)
        return self.summary(atlas_digest(self.atlas, self.evidence), verdicts)

    def tell(self) -> None:
        """Tell how many pictures are there."""
        if self.watch:
            self.watch("pictures", self.pictures, self.total)

    def summary(self, atlas: str | None = None, verdicts: Mapping[str, int] | None = None) -> Summary:
        """Return how far it has come."""
        jobs = len(self.atlas.jobs)
        return Summary(
            self.store.shown(""), atlas, jobs, len(self.there), self.rendered, dict(self.failed), verdicts or {}
        )


@contextmanager
def stopping(course: AtlasRun) -> Iterator[None]:
    """Say what is kept when a run is stopped, or its store fails."""
    try:
        yield
    except KeyboardInterrupt as error:
        kept = f"{len(course.there)} of {len(course.atlas.jobs)} jobs are done and kept"
        raise Interrupted(f"stopped; {kept}, run the same again to go on", course.summary()) from error
    except (OutputRefused, StoreRefused, EntryNotFound) as error:
        done = f"{len(course.there)} of {len(course.atlas.jobs)} jobs are done"
        raise Unfinished(f"{error} ({done})", course.summary()) from error
