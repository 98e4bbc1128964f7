"""Working off one job: what its pictures are, as the bytes of files. Nothing is written here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from phosphene.atlases.plan import VERSIONS, Job
from phosphene.atlases.verdicts import Measured, measure
from phosphene.errors import ModelRefused
from phosphene.images.display import DISPLAYS, Picture, to_bytes
from phosphene.images.encode import png, webp
from phosphene.images.grid import picture
from phosphene.images.sprites import SIDE, SMALL, SpriteSheet, thumbnail, tile, tile_size
from phosphene.network.model import Model
from phosphene.rendering.engine.forward import fast_forward_pass
from phosphene.rendering.gradient_ascent import Frame
from phosphene.rendering.objectives import channel
from phosphene.rendering.render import fit_to_network, render
from phosphene.rendering.result import Rendered

AT_ONCE = 8  # pictures, which is as fast as any number on a CPU; fixed, as another number rounds otherwise
FILM = 7  # moments of a climb that are kept beside its start, at most
FILM_QUALITY = 75  # of WebP
FIGURES, MEASURES = "figures.safetensors", "measures.safetensors"


def render_job(
    model: Model, job: Job, watch: Callable[[Frame], None] | None = None
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Render one job and return its files, by name, and its manifest.

    The files are one PNG a filter; `film.webp`: how they came about, see `Film`; `figures.safetensors`: scores (n,),
    start_scores (n,), history (steps, n) and dead (n,) as in `Rendered`; `measures.safetensors`: plain (n, c), moved
    (n,) and grey (c,) as in `verdict.Measured`, of the pictures as they are saved. The bytes follow from the job alone:
    a CPU computes with one thread for as long.

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
            batch=AT_ONCE if model.like.device.type == "cpu" else len(job.channels),
            precision=job.precision,
            watch=film.beside(watch),
        )
        measured = measure(model, job.layer, rendered.displayed(), None, torch.tensor(job.channels))
    return with_film(film.sheet(rendered), files_of(job, rendered, measured), manifest_of(job, rendered))


class JobFilm:
    """How a job's pictures came about, in small: each moment is shrunk at once, so that a film takes little memory."""

    def __init__(self, display: Callable[[Tensor], Tensor]) -> None:
        self.display = display
        self.moments: dict[int, dict[int, Picture]] = {}  # by step and picture
        self.steps = 0

    def beside(self, watch: Callable[[Frame], None] | None) -> Callable[[Frame], None]:
        """Return what a climb is watched with: this, and what else watches."""

        def seen(frame: Frame) -> None:
            self.see(frame)
            if watch:
                watch(frame)

        return seen

    def see(self, frame: Frame) -> None:
        """Keep a frame, if it is one of those that are kept; of finished pictures there is the result."""
        self.steps = frame.steps
        if frame.step < frame.steps and frame.step in kept_steps(frame.steps):
            shown = to_bytes(self.display(frame.image.cpu()))
            self.moments.setdefault(frame.step, {}).update(
                {item: shrunk(one) for item, one in zip(frame.items.tolist(), shown, strict=True)}
            )

    def sheet(self, rendered: Rendered) -> SpriteSheet | None:
        """Return a row a picture, a column a moment of which the last is the picture; None where no file holds them.

        The facts are `file`, `tile` (width, height), `columns` and `steps`, after how many each moment was.
        """
        side = min(SMALL, SIDE // len(rendered))
        if not side:
            return None
        steps = sorted(self.moments)
        last = [shrunk(one) for one in rendered.displayed()]
        size = tile_size(last[0].size, side)
        tiles = [
            thumbnail(one, size)
            for index, picture in enumerate(last)
            for one in (*(self.moments[step][index] for step in steps), picture)
        ]
        columns = len(steps) + 1
        facts = {"file": "film.webp", "tile": list(size), "columns": columns, "steps": [*steps, self.steps]}
        return SpriteSheet("film.webp", webp(tile(tiles, columns), FILM_QUALITY), facts)


@cache
def kept_steps(steps: int) -> frozenset[int]:
    """Return after how many of its steps a climb is kept: the start is where most happens, so there they lie closer."""
    return frozenset(round(steps * (moment / FILM) ** 2) for moment in range(FILM + 1))


def shrunk(image: Tensor) -> Picture:
    """Return an image (c, h, w), uint8, as a tile of a film."""
    shown = picture(image).convert("RGB")
    return thumbnail(shown, tile_size(shown.size, SMALL))


def with_film(
    film: SpriteSheet | None, files: dict[str, bytes], manifest: dict[str, Any]
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return a job's files and manifest with its film among them, where there is one."""
    if film is None:
        return files, manifest
    return {**files, film.name: film.content}, {**manifest, "film": film.facts}


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
    """Return the job, what came of its recipe where the network takes only its own size, and what had to be woken."""
    recipe = {**rendered.spec["recipe"]}
    found = {name: rendered.spec[name] for name in ("size", "shortcuts", "woken") if name in rendered.spec}
    return {**job.facts, "recipe": recipe, **found}


def picture_size(model: Model, job: Job) -> tuple[int, int]:
    """Return the height and width that a job's pictures will have; see `render`."""
    with fast_forward_pass(model, channel(job.layer, job.channels[:1])) as (read, _):
        recipe, base = fit_to_network(model, read, job.recipe.at(job.size), job.size is not None, None)
    return base.shape(recipe.size)[1:]
