"""Rendering one job: its pictures, film and measurements, as the bytes of files. Nothing is written here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import safetensors.torch
import torch

from phosphene.atlases.job_film import JobFilm
from phosphene.atlases.plan import VERSIONS, Job
from phosphene.atlases.verdicts import Measurements, measure
from phosphene.errors import ModelRefused
from phosphene.images.display import DISPLAYS
from phosphene.images.encode import png
from phosphene.images.sprites import SpriteSheet
from phosphene.network.model import Model
from phosphene.rendering.engine.forward import fast_forward_pass
from phosphene.rendering.gradient_ascent import Frame
from phosphene.rendering.objectives import channel
from phosphene.rendering.render import fit_to_network, render
from phosphene.rendering.result import Rendered

AT_ONCE = 8  # pictures in a batch on a CPU, where no number is faster; fixed, since another number rounds differently
SCORES_FILE, MEASURES_FILE = "figures.safetensors", "measures.safetensors"
SCORES = ("scores", "start_scores", "history", "dead", "plain")


def render_job(
    model: Model, job: Job, watch: Callable[[Frame], None] | None = None
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Render one job and return its files, by name, and its manifest.

    The files are one PNG for each picture; `film.webp`: see `JobFilm`; `figures.safetensors`: scores (n,), start_scores
    (n,), history (steps, n), dead (n,) and plain (n,) as in `Rendered`; `measures.safetensors`: plain (n, c), moved
    (n,) and grey (c,) as in `Measurements`, of the pictures as they are saved. Of facets, film and numbers are those of
    the first, which is the filter's picture. Opposites, which are not judged, have no film and no measures. The bytes
    depend on the job alone, for which a CPU computes with one thread.

    Raises:
        ModelRefused: the network is not the one that the job was planned for.
        Whatever `render` raises.
    """
    check_same(model, job)
    film = JobFilm(DISPLAYS[job.recipe.display])
    with one_thread():
        rendered = render(
            model,
            channel(job.layer, job.channels),
            job.recipe,
            size=job.size,
            batch=AT_ONCE if model.prototype_tensor.device.type == "cpu" else len(job.pictures),
            precision=job.precision,
            watch=film.also_calling(watch),
            facets=job.facets,
            opposite=job.opposite,
            progress=False,
        )
        measurements = None if job.opposite else measure_filters(model, job, rendered)
    files = files_of(job, rendered, measurements)
    sheet = None if job.opposite else film.sheet(rendered, job.facets)
    return with_film(sheet, files, manifest_of(job, rendered))


def measure_filters(model: Model, job: Job, rendered: Rendered) -> Measurements:
    """Return the measurements of the filters' pictures."""
    return measure(model, job.layer, rendered.displayed()[:: job.facets], None, torch.tensor(job.channels))


def with_film(
    film: SpriteSheet | None, files: dict[str, bytes], manifest: dict[str, Any]
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return a job's files and manifest, with its film if it has one."""
    if film is None:
        return files, manifest
    return {**files, film.name: film.content}, {**manifest, "film": film.facts}


def check_same(model: Model, job: Job) -> None:
    """Refuse a network or versions that differ from those that a job was planned with.

    Raises:
        ModelRefused: the weights, the input size or a version differs.
    """
    if job.versions != VERSIONS:
        raise ModelRefused(
            f"the atlas was planned with torch {job.versions[0]} and pictures {job.versions[1]}, this worker has "
            f"{VERSIONS[0]} and {VERSIONS[1]}; install the same versions everywhere"
        )
    if (model.fingerprint, model.input_size) != (job.fingerprint, job.input_size):
        now, planned = (
            "{} at {}×{} px".format(weights, *size)
            for weights, size in ((model.fingerprint, model.input_size), (job.fingerprint, job.input_size))
        )
        raise ModelRefused(
            f"{model.name} is now {now}, the atlas was planned for {planned}: its weights or its input size have "
            "changed; plan the atlas again"
        )


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, so that sums have the same order on every machine and workers do not compete."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def files_of(job: Job, rendered: Rendered, measurements: Measurements | None) -> dict[str, bytes]:
    """Return a finished job's files."""
    named = zip(rendered.names, rendered.pictures, strict=True)
    pictures = {f"{name}.png": png(image, metadata(job, rendered, index)) for index, (name, image) in enumerate(named)}
    scores = {name: getattr(rendered, name)[..., :: job.facets].contiguous() for name in SCORES}
    files = {**pictures, SCORES_FILE: safetensors.torch.save(scores)}
    if measurements is None:
        return files
    precision = torch.promote_types(rendered.scores.dtype, torch.float32)  # of the means over maps
    plain, grey = measurements.plain.to(precision), measurements.grey.to(precision)
    measures = {"plain": plain, "moved": measurements.moved, "grey": grey}
    return {**files, MEASURES_FILE: safetensors.torch.save(measures)}


def metadata(job: Job, rendered: Rendered, index: int) -> dict[str, Any]:
    """Return the metadata in one picture's file."""
    return {**spec_and_recipe(job, rendered), **about_picture(rendered, index), "seed": job.recipe.seed}


def manifest_of(job: Job, rendered: Rendered) -> dict[str, Any]:
    """Return a finished job's manifest, to which the store adds the list of files.

    `pictures` has a row for each filter, with rows for its further facets, if any, under `facets`.
    """
    rows = [
        {
            "file": f"{name}.png",
            **about_picture(rendered, index),
            "start_score": float(rendered.start_scores[index]),
        }
        for index, name in enumerate(rendered.names)
    ]
    filters = [rows[first : first + job.facets] for first in range(0, len(rows), job.facets)]
    pictures = [{**first, "facets": further} if further else first for first, *further in filters]
    return {**spec_and_recipe(job, rendered), "pictures": pictures}


def about_picture(rendered: Rendered, index: int) -> dict[str, Any]:
    """Return what the file and the manifest say about one picture."""
    about = rendered.metadata(index)
    return {name: about[name] for name in ("picture", "channel", "score", "dead", "plain")}


def spec_and_recipe(job: Job, rendered: Rendered) -> dict[str, Any]:
    """Return the spec of a job, with the recipe and size that the network accepted."""
    applied = {name: rendered.spec[name] for name in ("size", "shortcuts", "woken") if name in rendered.spec}
    return {**job.readable_spec, "recipe": {**rendered.spec["recipe"]}, **applied}


def picture_size(model: Model, job: Job) -> tuple[int, int]:
    """Return the height and width of a job's pictures if its layer sees all of them; photos are seen at that size."""
    with fast_forward_pass(model, channel(job.layer, job.channels[:1])) as (read, _):
        recipe, base = fit_to_network(model, read, job.recipe.with_settings(job.size), job.size is not None, None)
    return base.shape(recipe.size)[1:]
