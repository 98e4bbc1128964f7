"""Running an atlas: a runner does the jobs that a store lacks, and their results go into the store.

Only the driver writes. It stores each job as soon as it is finished, so that a run can be stopped at any moment and in
any way, and the next one continues it.
"""

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
from phosphene.evidence.collect import evidence
from phosphene.evidence.photo_dataset import open_photos
from phosphene.evidence.statistics import Evidence
from phosphene.network.layers import Layer
from phosphene.progress import Bar, progress_bar
from phosphene.storage.store import Store, open_store

AtlasProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Summary:
    """The result of a run.

    Attributes:
        store: the address of the store.
        atlas: the name of the atlas' entry in it, None if it has no entry yet.
        jobs: of the whole atlas; `done`: those that are in the store; `rendered`: those that this run has done.
        failed: why a job failed, by its digest.
        verdicts: how many pictures are vivid, weak, unstable, dead, plain; empty if the atlas has no entry yet.
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
    *,
    progress: bool = True,
) -> Summary:
    """Do the jobs of an atlas that are not in the store yet.

    A job that fails leaves its error in the store, and the others continue. Several runs may share one store.

    Args:
        store: a folder, a URL that fsspec knows, or an open store.
        runner: does the jobs; by default `LocalRunner()`.
        photos: to compare the pictures with: a folder, a parquet file, a data set; see `open_photos`.
        watch: called with what is counted ("pictures" or "photos"), how many are done, and how many there are.
        progress: whether to show a bar; see `progress.progress_bar`.

    Raises:
        StoreRefused, OutputRefused, PhotoRefused: the store or the photos cannot be used, from the start.
        Unfinished: the store failed on the way; what was finished is kept. `finished` is a `Summary`.
        Interrupted: on Ctrl-C, likewise.

    Example:
        >>> run(atlas(load("builtin/vgg19"), "block3*"), "atlas/vgg19").verdicts
    """
    runner = runner or LocalRunner()
    if photos is not None:  # refused, if need be, before a store is made
        photos = open_photos(photos, atlas.model.channels_in)
    opened = store if isinstance(store, Store) else open_store(store, create=True)
    atlas_run = AtlasRun(atlas, opened, watch, progress=progress)
    with errors_with_summary(atlas_run):
        if photos is not None:
            atlas_run.collect_evidence(photos, runner)
        for _ in atlas_run.finished_layers(runner):
            pass
        return atlas_run.end()


class AtlasRun:
    """The progress of a run, which is shown with `progress`.

    Attributes:
        bar: counts the pictures in the store.
        done: the digests of the jobs in the store.
        pictures, total: of these jobs, and of the whole atlas.
        unfinished: jobs of each layer that are not in the store, by path.
        waiting: jobs that no worker has begun.
        failed: errors by digest.
        rendered: jobs that this run has done.
    """

    def __init__(self, atlas: Atlas, store: Store, watch: AtlasProgress | None = None, *, progress: bool) -> None:
        self.atlas, self.store, self.watch, self.progress = atlas, store, watch, progress
        self.bar: Bar
        self.done: set[str] = set()
        self.pictures, self.total = 0, sum(len(job.pictures) for job in atlas.jobs)
        self.unfinished = Counter(job.layer for job in atlas.jobs)
        self.waiting: deque[Job] = deque()
        self.failed: dict[str, str] = {}
        self.rendered = 0
        self.evidence: Evidence | None = None

    def collect_evidence(self, photos: Any, runner: Runner) -> None:
        """Show the photos to the network, at the size of the pictures, unless the store has this evidence already."""
        model, deepest = self.atlas.model, self.atlas.jobs[-1]
        size = picture_size(model, deepest)
        side = None if size == model.input_size else size[0]
        on_ray = RayPhotoRunner(runner.address, runner.workers, runner.gpu) if isinstance(runner, RayRunner) else None
        seen = 0

        def on_photos(more: int, total: int) -> None:
            nonlocal seen
            seen += more
            if self.watch:
                self.watch("photos", seen, total)

        paths = [layer.path for layer in self.atlas.layers]
        options: dict[str, Any] = {"size": side, "store": self.store, "watch": on_photos, "progress": self.progress}
        self.evidence = evidence(model, photos, paths, **options, runner=on_ray)

    def finished_layers(self, runner: Runner) -> Iterator[Layer]:
        """Have the missing jobs done, and yield each layer when the last of its jobs is done."""
        with progress_bar(self.atlas.model.name, "pictures", self.progress) as self.bar:
            self.begin()
            yield from (layer for layer in self.atlas.layers if not self.unfinished[layer.path])
            with closing(runner.run(self.atlas.model, self.missing_jobs())) as outcomes:
                for outcome in outcomes:
                    self.store_outcome(outcome)
                    if not self.unfinished[outcome.job.layer]:
                        yield self.atlas.model.find(outcome.job.layer)

    def begin(self) -> None:
        """Find out which jobs are in the store already."""
        done = self.store.done("jobs")
        for job in self.atlas.jobs:
            self.count(job) if job.digest in done else self.waiting.append(job)
        self.report_progress()

    def count(self, job: Job) -> None:
        """Count a job that is in the store."""
        self.done.add(job.digest)
        self.pictures += len(job.pictures)
        self.unfinished[job.layer] -= 1

    def missing_jobs(self) -> Iterator[Job]:
        """Yield the waiting jobs, without those that another driver has done by then."""
        while self.waiting:
            job = self.waiting.popleft()
            if self.store.has("jobs", job.digest):
                self.skip_done(job)
            else:
                yield job

    def skip_done(self, job: Job) -> None:
        """Count a job that another driver has done, and continue elsewhere, so that the two do different jobs."""
        self.count(job)
        if self.waiting:
            self.waiting.rotate(SystemRandom().randrange(len(self.waiting)))

    def store_outcome(self, outcome: Outcome) -> None:
        """Put the outcome of a job into the store, and write the entry of its layer if it was the last one."""
        job = outcome.job
        if outcome.error is not None:
            self.failed[job.digest] = outcome.error
            self.store.fail("jobs", job.digest, outcome.error)
        elif self.store.has("jobs", job.digest):
            self.skip_done(job)
        else:
            self.store.put("jobs", job.digest, outcome.files, outcome.manifest)
            self.count(job)
            self.rendered += 1
        self.report_progress()
        if not self.unfinished[job.layer]:
            self.finish(self.atlas.model.find(job.layer))

    def finish(self, layer: Layer) -> None:
        """Write the entry of a layer, unless the store has a complete one."""
        digest = layer_digest(self.atlas, layer, self.evidence)
        if not self.store.has("layers", digest) or self.store.manifest("layers", digest)["missing"]:
            write_layer(self.store, self.atlas, layer, self.done, self.evidence)

    def end(self) -> Summary:
        """Write the missing entries of layers, and the entry of the atlas last."""
        for layer in self.atlas.layers:
            self.finish(layer)
        if not self.done:
            return self.summary()
        verdicts = write_atlas(self.store, self.atlas, self.evidence)
        return self.summary(atlas_digest(self.atlas, self.evidence), verdicts)

    def report_progress(self) -> None:
        """Pass on how many pictures are in the store."""
        self.bar.done, self.bar.total = self.pictures, self.total
        if self.watch:
            self.watch("pictures", self.pictures, self.total)

    def summary(self, atlas: str | None = None, verdicts: Mapping[str, int] | None = None) -> Summary:
        """Return the state of the run."""
        jobs = len(self.atlas.jobs)
        return Summary(
            self.store.display_path(""), atlas, jobs, len(self.done), self.rendered, dict(self.failed), verdicts or {}
        )


@contextmanager
def errors_with_summary(atlas_run: AtlasRun) -> Iterator[None]:
    """Turn Ctrl-C and failures of the store into errors that say how much of a run is done."""
    try:
        yield
    except KeyboardInterrupt as error:
        kept = f"{len(atlas_run.done)} of {len(atlas_run.atlas.jobs)} jobs are done and kept"
        raise Interrupted(f"stopped; {kept}, run the same again to go on", atlas_run.summary()) from error
    except (OutputRefused, StoreRefused, EntryNotFound) as error:
        done = f"{len(atlas_run.done)} of {len(atlas_run.atlas.jobs)} jobs are done"
        raise Unfinished(f"{error} ({done})", atlas_run.summary()) from error
