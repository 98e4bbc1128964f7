"""Working off one job: what its pictures are, as the bytes of files. Nothing is written here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import safetensors.torch
import torch

from phosphene.ascent import Frame
from phosphene.atlas import VERSIONS, Job
from phosphene.errors import ModelRefused
from phosphene.figure import png
from phosphene.model import Model
from phosphene.objectives import channel
from phosphene.render import fitted, render
from phosphene.rendered import Rendered
from phosphene.shortcuts import fast_reading
from phosphene.verdict import Measured, measure

AT_ONCE = 8  # pictures, which is as fast as any number on a CPU; fixed, as another number rounds otherwise
FIGURES, MEASURES = "figures.safetensors", "measures.safetensors"


def work(
    model: Model, job: Job, watch: Callable[[Frame], None] | None = None
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Render one job and return its files, by name, and its manifest.

    The files are one PNG a filter; `figures.safetensors`: scores (n,), start_scores (n,), history (steps, n) and dead
    (n,) as in `Rendered`; `measures.safetensors`: plain (n, c), moved (n,) and grey (c,) as in `verdict.Measured`, of
    the pictures as they are saved. The bytes follow from the job alone: a CPU computes with one thread for as long.

    Raises:
        ModelRefused: the network is not the one that the job was planned for.
        Whatever `render` raises.
    """
    check_same(model, job)
    with one_thread():
        rendered = render(
            model,
            channel(job.layer, job.channels),
            job.recipe,
            size=job.size,
            batch=AT_ONCE if model.like.device.type == "cpu" else len(job.channels),
            precision=job.precision,
            watch=watch,
        )
        measured = measure(model, job.layer, rendered.displayed(), None, torch.tensor(job.channels))
    return files_of(job, rendered, measured), manifest_of(job, rendered)


def check_same(model: Model, job: Job) -> None:
    """Refuse a network with other weights or another input size than the job was planned for, or another torch.

    Raises:
        ModelRefused: something is different.
    """
    if job.versions != VERSIONS:
        raise ModelRefused(
            f"the atlas was planned with torch {job.versions[0]} and pictures {job.versions[1]}, this worker has "
            f"{VERSIONS[0]} and {VERSIONS[1]}; install the same versions everywhere"
        )
    now = (model.fingerprint, model.input_size)
    if now != (job.fingerprint, job.input_size):
        shown = "is now {} at {}×{} px, the atlas was planned for {} at {}×{} px".format(
            now[0], *now[1], job.fingerprint, *job.input_size
        )
        raise ModelRefused(f"{model.name} {shown}: its weights or its input size are others; plan the atlas anew")


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: sums are then taken in one order, whatever the machine, and workers do not compete."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def files_of(job: Job, rendered: Rendered, measured: Measured) -> dict[str, bytes]:
    """Return a finished job's files."""
    named = zip(rendered.names, rendered.pictures, strict=True)
    pictures = {f"{name}.png": png(one, metadata(job, rendered, index)) for index, (name, one) in enumerate(named)}
    figures = {name: getattr(rendered, name).contiguous() for name in ("scores", "start_scores", "history", "dead")}
    precision = torch.promote_types(rendered.scores.dtype, torch.float32)  # in which means over maps are taken
    plain, grey = (one.to(precision) for one in (measured.plain, measured.grey))
    measures = {"plain": plain, "moved": measured.moved, "grey": grey}
    return {**pictures, FIGURES: safetensors.torch.save(figures), MEASURES: safetensors.torch.save(measures)}


def metadata(job: Job, rendered: Rendered, index: int) -> dict[str, Any]:
    """Return what one picture's file carries about itself."""
    own = {name: rendered.metadata(index)[name] for name in ("picture", "channel", "score", "dead")}
    return {**made_by(job, rendered), **own, "seed": job.recipe.seed}


def manifest_of(job: Job, rendered: Rendered) -> dict[str, Any]:
    """Return what a finished job says of itself; the store adds the list of its files."""
    names = ("picture", "channel", "score", "dead")
    pictures = [
        {
            "file": f"{rendered.names[index]}.png",
            **{name: rendered.metadata(index)[name] for name in names},
            "start_score": float(rendered.start_scores[index]),
        }
        for index in range(len(rendered))
    ]
    return {**made_by(job, rendered), "pictures": pictures}


def made_by(job: Job, rendered: Rendered) -> dict[str, Any]:
    """Return the job, and what came of its recipe where the network takes only its own size."""
    recipe = {**rendered.spec["recipe"]}
    return {**job.facts, "recipe": recipe, "size": rendered.spec["size"], "shortcuts": rendered.spec["shortcuts"]}


def picture_size(model: Model, job: Job) -> tuple[int, int]:
    """Return the height and width that a job's pictures will have; see `render`."""
    with fast_reading(model, channel(job.layer, job.channels[:1])) as (read, _):
        recipe, base = fitted(model, read, job.recipe.at(job.size), job.size is not None, None)
    return base.shape(recipe.size)[1:]
