"""The atlas: every filter of many layers, planned as jobs. Planning touches no disk and renders nothing.

A job is a batch of filters of one layer, and its identity is the digest of its whole spec: of the weights' bytes, and
of all that its pictures follow from. Two jobs of one digest make the same pictures, whoever works them off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from phosphene.arguments import whole_number
from phosphene.errors import ChannelNotFound, LayerRefused
from phosphene.network.channel_ranges import parse_channels
from phosphene.network.layers import Layer
from phosphene.network.model import Model
from phosphene.rendering.engine.precision import chosen_precision
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
        input_size: (h, w) that the network takes, which limits the pictures' default size.
        channels: rendered together, so that the list is part of the identity: in company a filter rounds otherwise.
        size: side of the pictures in pixels, None for the recipe's, or what of it the network takes.
        precision: fp32 or bf16.
        versions: of torch, and of what `PICTURES` counts.
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

    @property
    def spec(self) -> dict[str, Any]:
        """Everything that the pictures follow from, in JSON terms; the recipe by its digest, which minds no name."""
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
        }

    @cached_property
    def digest(self) -> str:
        """The job's identity: 32 hexadecimal digits."""
        return digest_of(self.spec)

    @property
    def pictures(self) -> tuple[str, ...]:
        """The names of its pictures, such as `filter_12`."""
        return channel(self.layer, self.channels).names

    @property
    def facts(self) -> dict[str, Any]:
        """The spec for people to read: the recipe in full."""
        return {**self.spec, "recipe": {**self.recipe.as_dict(), "digest": self.recipe.digest}}


@dataclass(frozen=True, eq=False)
class Atlas:
    """The plan of an atlas.

    Attributes:
        layers: those whose filters are drawn, in the order of the forward pass.
        recipes: one a seed: of the pictures themselves, and of those that they are held against.
        jobs: of all layers, one layer after the other, and within a layer one seed after the other.
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
        """How many filters it shows; with several seeds, each has as many pictures."""
        return sum(len(job.channels) for job in self.jobs if job.recipe == self.recipes[0])

    def jobs_of(self, layer: Layer, seed: int = 0) -> tuple[Job, ...]:
        """Return the jobs of a layer: of its pictures, or with `seed` 1, 2 … of those from another seed."""
        return tuple(job for job in self.jobs if job.layer == layer.path and job.recipe == self.recipes[seed])


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
) -> Atlas:
    """Return the plan of an atlas: which filters of which layers, cut into jobs. Nothing is rendered yet; see `run`.

    Args:
        layers: a glob such as `block3*`, or several. Of what a glob names the convolutions are taken, or, where it
            names none, whatever returns maps; `*relu*` takes the ReLUs.
        channels: `all`, `0:64`, `3,7,11` or numbers; of each layer those that it has.
        size, steps, seed, precision: as in `render`.
        per_job: filters a job.
        seeds: how many pictures of each filter, from seeds that follow one another; with 2, verdicts say whether they
            agree.

    Raises:
        LayerNotFound, LayerRefused, ChannelNotFound, RecipeNotFound, InvalidRequest.

    Example:
        >>> len(atlas(load("builtin/vgg19"), "block1*").jobs)
        8
    """
    for name, count in (("per_job", per_job), ("seeds", seeds)):
        whole_number(count, name, 1)
    find_recipe(recipe).at(size)
    first = find_recipe(recipe).at(steps=steps, seed=seed)
    recipes = tuple(first.at(seed=first.seed + number) for number in range(seeds))
    found = chosen_layers(model, layers)
    fingerprint, precision = model.fingerprint, chosen_precision(model, precision)
    jobs = tuple(
        Job(model.name, fingerprint, model.input_size, layer.path, batch, one, size, precision)
        for layer, listed in chosen_channels(found, channels)
        for one in recipes
        for batch in batches(listed, per_job)
    )
    drawn = {job.layer for job in jobs}
    return Atlas(model, tuple(layer for layer in found if layer.path in drawn), recipes, size, jobs)


def chosen_layers(model: Model, layers: str | int | Sequence[str | int]) -> list[Layer]:
    """Return the layers that globs, paths and numbers of convolutions mean, each once, in the order of the network.

    Raises:
        LayerNotFound: there is none of that name.
        LayerRefused: none of them returns maps of channels.
    """
    patterns = [layers] if isinstance(layers, str | int) else list(layers)
    named = [layer for pattern in patterns for layer in layers_matching(model, pattern)]
    if not named:
        shown = ", ".join(map(repr, patterns)) or "nothing"
        raise LayerRefused(
            f"{shown} names no layer that returns maps of channels; `phosphene layers` lists what each returns"
        )
    known = [*model.layers(), *model.layers().unlisted]
    return sorted(dict.fromkeys(named), key=known.index)


def layers_matching(model: Model, pattern: str | int) -> list[Layer]:
    """Return the layers with maps that one glob, path or number means: the convolutions, where any is among them."""
    if isinstance(pattern, int):
        return [model.find(pattern)]
    maps = [layer for layer in model.layers().matching(pattern) if layer.is_map]
    return [layer for layer in maps if layer.convolution] or maps


def chosen_channels(layers: Sequence[Layer], channels: str | Sequence[int]) -> Iterator[tuple[Layer, list[int]]]:
    """Yield each layer that has some of the channels, and which.

    Raises:
        ChannelNotFound: no layer has so many.
        InvalidRequest: they are not given as channels are.
    """
    most = max(layer.channels or 0 for layer in layers)
    text = channels if isinstance(channels, str) else ",".join(map(str, channels))
    wanted = parse_channels(text, most)
    if min(wanted) >= most:
        raise ChannelNotFound(f"there is no channel {min(wanted)}: the layers have at most {most}")
    for layer in layers:
        listed = [one for one in wanted if one < (layer.channels or 0)]
        if listed:
            yield layer, listed


def batches(listed: Sequence[int], per_job: int) -> Iterator[tuple[int, ...]]:
    """Yield the channels in order, so many at a time."""
    for start in range(0, len(listed), per_job):
        yield tuple(listed[start : start + per_job])
