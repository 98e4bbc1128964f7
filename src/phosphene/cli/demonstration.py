"""The demonstration: what filters of trained networks respond to, as a store, and what one makes of a photo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import NamedTuple

import torch

from phosphene.atlases.entries import saved
from phosphene.atlases.plan import Atlas, atlas
from phosphene.atlases.run import AtlasRun, stopping
from phosphene.atlases.runners.local import LocalRunner
from phosphene.errors import Unfinished
from phosphene.images.display import Picture
from phosphene.images.encode import png
from phosphene.images.grid import cross_out, grid
from phosphene.images.photo import read
from phosphene.inspection.activations import activations
from phosphene.inspection.explain import explain
from phosphene.network.layers import Layer
from phosphene.network.loading import load
from phosphene.storage.atomic import write_file
from phosphene.storage.store import Store, open_store

STORE = "store"  # in the demonstration's folder
COLUMNS = 6
SIZE = 96
PER_JOB = 12  # so that two processes share a layer
SEEN = "block?_relu1"  # layers whose activations are shown: after a ReLU the channels that stay blank can be counted
PHOTO = "chelsea.jpg"


class DemoSheet(NamedTuple):
    """Filters that are drawn: the first `filters` of some layers of a built-in network."""

    model: str
    layers: tuple[str, ...]
    filters: int


# not block1_conv1: before its activation it is linear in the picture, so its mean over the map only answers to a colour
SHOWN = DemoSheet("builtin/vgg19", ("block1_conv2", "block2_conv1", "block3_conv1", "block4_conv1", "block5_conv1"), 24)
NAMED = DemoSheet(
    "builtin/efficientnet-lite0", ("_blocks.5._project_conv", "_blocks.10._project_conv", "_conv_head"), 24
)
PARTS = (SHOWN, NAMED)


def demonstrate(
    folder: Path, device: str | torch.device = "cpu", watch: Callable[[str, int, int], None] | None = None
) -> Iterator[Path]:
    """Draw filters of every block of two built-in networks into a store, then look at the photo that ships.

    Yields each picture's path when it is written. What the store holds already is not drawn again.

    Args:
        watch: called with what is counted, how many are done and how many there are; see `run`.
    """
    store = open_store(folder / STORE, create=True)
    models = {part: load(part.model, device=device) for part in PARTS}
    plans = [
        atlas(model, part.layers, range(part.filters), "fast", size=SIZE, per_job=PER_JOB)
        for part, model in models.items()
    ]
    for plan in plans:
        for layer, sheet in sheets(store, plan, watch):
            name = f"{plan.model.name.removeprefix('builtin/')}_{layer.path}.png"
            yield write_file(folder / name, png(sheet, {**plan.model.origin, "layer": layer.path}))
    with as_file(files("phosphene").joinpath("data", PHOTO)) as path:
        photo = read(path)
    yield from activations(models[SHOWN], photo, SEEN).save(folder / "activations")
    yield explain(models[NAMED], photo).save(folder / "heat_map.png", photo)


def sheets(store: Store, plan: Atlas, watch: Callable[[str, int, int], None] | None) -> Iterator[tuple[Layer, Picture]]:
    """Yield the pictures of each layer on one sheet, when they are in the store; dead filters are crossed.

    Raises:
        Unfinished: some could not be drawn.
    """
    course = AtlasRun(plan, store, watch)
    with stopping(course):
        for layer in course.go(LocalRunner()):
            drawn = [one for job in plan.jobs_of(layer) if job.digest in course.there for one in saved(store, job)]
            if drawn:
                yield layer, grid([cross_out(one.image) if one.entry["dead"] else one.image for one in drawn], COLUMNS)
        summary = course.end()
    for reason in summary.failed.values():
        raise Unfinished(reason, summary)
