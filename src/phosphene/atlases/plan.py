"""The plan of an atlas: the filters of many layers as jobs. Planning touches no disk and renders nothing.

A job is a batch of filters of one layer. Its identity is the digest of its spec: the weights' bytes and everything
else that determines its pictures. Two jobs with the same digest make the same pictures, wherever they run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from phosphene.arguments import whole_number
from phosphene.errors import ChannelNotFound, LayerRefused
from phosphene.network.channel_ranges import parse_channels
from phosphene.network.layers import Layer
from phosphene.network.model import Model
from phosphene.rendering.engine.precision import chosen_precision
from phosphene.rendering.facets import with_facets
from phosphene.rendering.objectives import channel
from phosphene.rendering.recipes import DEFAULT, Recipe, find_recipe
from phosphene.storage.store import digest_of
from phosphene.version import PICTURES_VERSION

PER_JOB = 16
VERSIONS = (torch.__version__, PICTURES_VERSION)


@dataclass(frozen=True)
class Job:
    """One batch of filters of one layer.

    Attributes:
        model: the network's name.
        fingerprint: of its weights.
        input_size: (h, w) of the network's input, which limits the pictures' default size.
        channels: the filters, which are rendered together. The list is part of the identity, since rounding depends
            on the other filters of a batch.
        size: side of the pictures in pixels; None for the recipe's size, or what the network accepts of it.
        precision: fp32 or bf16.
        versions: of torch, and `PICTURES_VERSION`.
        facets: pictures of each filter; `opposite`: of what suppresses the filters.
    """

    model: str
    fingerprint: str
    input_size: tuple[int, int]
    layer: str
    channels: tuple[int, ...]
    recipe: Recipe
    size: int | None
    precision: str
    versions: tuple[str, int] = VERSIONS
    facets: int = 1
    opposite: bool = False

    @property
    def spec(self) -> dict[str, Any]:
        """Everything that determines the pictures, in JSON terms; the recipe as its digest, which ignores its name.

        Facets and opposites are in it only if there are any: the jobs of earlier stores keep their names.
        """
        return {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "input_size": list(self.input_size),
            "layer": self.layer,
            "channels": list(self.channels),
            "recipe": self.recipe.digest,
            "size": self.size,
            "precision": self.precision,
            "versions": {"torch": self.versions[0], "pictures": self.versions[1]},
            **({"facets": self.facets} if self.facets > 1 else {}),
            **({"opposite": True} if self.opposite else {}),
        }

    @cached_property
    def digest(self) -> str:
        """The job's identity: 32 hexadecimal digits."""
        return digest_of(self.spec)

    @property
    def pictures(self) -> tuple[str, ...]:
        """The names of its pictures, such as `filter_12`."""
        return with_facets(channel(self.layer, self.channels), self.facets, self.opposite).names

    @property
    def readable_spec(self) -> dict[str, Any]:
        """The spec for people to read, with the recipe in full."""
        return {**self.spec, "recipe": {**self.recipe.as_dict(), "digest": self.recipe.digest}}


@dataclass(frozen=True, eq=False)
class Atlas:
    """The plan of an atlas.

    Attributes:
        layers: those with filters in the atlas, in the order of the forward pass.
        recipes: one for each seed: first that of the pictures, then those of the pictures they are compared with.
        jobs: layer by layer, and within a layer seed by seed.
    """

    model: Model
    layers: tuple[Layer, ...]
    recipes: tuple[Recipe, ...]
    size: int | None
    jobs: tuple[Job, ...]

    def __repr__(self) -> str:
        return f"Atlas({self.filters} filters of {len(self.layers)} layers of {self.model.name}, {len(self.jobs)} jobs)"

    @property
    def filters(self) -> int:
        """How many filters the atlas has; each has one picture for each seed."""
        return sum(len(job.channels) for job in self.jobs if job.recipe == self.recipes[0] and not job.opposite)

    def jobs_of(self, layer: Layer, seed: int = 0, opposite: bool = False) -> tuple[Job, ...]:
        """Return the jobs of a layer: of its pictures, of those from a further seed, 1, 2 …, or of its opposites."""
        return tuple(
            job
            for job in self.jobs
            if (job.layer, job.recipe, job.opposite) == (layer.path, self.recipes[seed], opposite)
        )


def atlas(
    model: Model,
    layers: str | int | Sequence[str | int] = "*",
    channels: str | Sequence[int] = "all",
    recipe: str | Recipe = DEFAULT,
    *,
    size: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    precision: str = "auto",
    per_job: int = PER_JOB,
    seeds: int = 1,
    facets: int = 1,
    opposite: bool = False,
) -> Atlas:
    """Return the plan of an atlas: which filters of which layers, as jobs. Nothing is rendered yet; see `run`.

    Args:
        layers: one or more globs such as `block3*`. A glob stands for the convolutions that it matches or, if it
            matches none, for every layer with maps: `*relu*` means the ReLUs.
        channels: `all`, `0:64`, `3,7,11` or numbers; a layer with fewer channels gives those that it has.
        size, steps, seed, precision: as in `render`.
        per_job: filters in a job.
        seeds: pictures of each filter, from consecutive seeds; with 2, verdicts say whether they agree.
        facets: as in `render`, of the first seed; `opposite`: also draw what suppresses each filter most.

    Raises:
        LayerNotFound, LayerRefused, ChannelNotFound, RecipeNotFound, InvalidRequest.

    Example:
        >>> len(atlas(load("builtin/vgg19"), "block1*").jobs)
        8
    """
    whole_number(per_job, "per_job", 1)
    recipes = recipes_of_seeds(recipe, size, steps, seed, seeds)
    matching = chosen_layers(model, layers)
    kinds = kinds_of_jobs(model, recipes, size, chosen_precision(model, precision), facets, opposite)
    jobs = tuple(
        replace(kind, layer=layer.path, channels=batch)
        for layer, numbers in chosen_channels(matching, channels)
        for kind in kinds
        for batch in batches(numbers, per_job)
    )
    paths = {job.layer for job in jobs}
    return Atlas(model, tuple(layer for layer in matching if layer.path in paths), recipes, size, jobs)


def recipes_of_seeds(
    recipe: str | Recipe, size: int | None, steps: int | None, seed: int | None, seeds: int
) -> tuple[Recipe, ...]:
    """Return the recipe for each of `seeds` consecutive seeds; a size is checked, and left to the jobs."""
    whole_number(seeds, "seeds", 1)
    find_recipe(recipe).with_settings(size)
    first = find_recipe(recipe).with_settings(steps=steps, seed=seed)
    return tuple(first.with_settings(seed=first.seed + number) for number in range(seeds))


def kinds_of_jobs(
    model: Model, recipes: Sequence[Recipe], size: int | None, precision: str, facets: int, opposite: bool
) -> list[Job]:
    """Return jobs without filters: of pictures with their facets, of further seeds, and of opposites if wanted."""
    facets = whole_number(facets, "facets", 1)
    first, *further = recipes
    job = Job(model.name, model.fingerprint, model.input_size, "", (), first, size, precision, facets=facets)
    seeds = [replace(job, recipe=recipe, facets=1) for recipe in further]
    return [job, *seeds, replace(job, facets=1, opposite=True)] if opposite else [job, *seeds]


def chosen_layers(model: Model, layers: str | int | Sequence[str | int]) -> list[Layer]:
    """Return the layers that globs, paths and numbers of convolutions stand for, in the order of the network.

    Raises:
        LayerNotFound: there is no such layer.
        LayerRefused: none of them returns maps of channels.
    """
    patterns = [layers] if isinstance(layers, str | int) else list(layers)
    matching = [layer for pattern in patterns for layer in layers_matching(model, pattern)]
    if not matching:
        names = ", ".join(map(repr, patterns)) or "nothing"
        raise LayerRefused(
            f"{names} names no layer that returns maps of channels; `phosphene layers` lists what each returns"
        )
    order = [*model.layers(), *model.layers().inner_layers]
    return sorted(dict.fromkeys(matching), key=order.index)


def layers_matching(model: Model, pattern: str | int) -> list[Layer]:
    """Return the layers with maps that a glob, path or number matches; only the convolutions if it matches any."""
    if isinstance(pattern, int):
        return [model.find(pattern)]
    maps = [layer for layer in model.layers().matching(pattern) if layer.is_map]
    return [layer for layer in maps if layer.convolution] or maps


def chosen_channels(layers: Sequence[Layer], channels: str | Sequence[int]) -> Iterator[tuple[Layer, list[int]]]:
    """Yield each layer that has any of the channels, and those that it has.

    Raises:
        ChannelNotFound: no layer has that many.
        InvalidRequest: the channels are not given in a valid form.
    """
    most = max(layer.channels or 0 for layer in layers)
    text = channels if isinstance(channels, str) else ",".join(map(str, channels))
    wanted = parse_channels(text, most)
    if min(wanted) >= most:
        raise ChannelNotFound(f"there is no channel {min(wanted)}: the layers have at most {most}")
    for layer in layers:
        numbers = [number for number in wanted if number < (layer.channels or 0)]
        if numbers:
            yield layer, numbers


def batches(channels: Sequence[int], per_job: int) -> Iterator[tuple[int, ...]]:
    """Yield the channels in order, up to `per_job` at a time."""
    for start in range(0, len(channels), per_job):
        yield tuple(channels[start : start + per_job])
