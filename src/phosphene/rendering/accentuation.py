"""Accentuation: what excites a filter or a layer in a photo, drawn into that photo."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from phosphene.arguments import finite_number, whole_number
from phosphene.errors import ChannelNotFound, InvalidRequest, LayerRefused
from phosphene.network.layers import Layer
from phosphene.network.model import Model
from phosphene.rendering.batches import Watch
from phosphene.rendering.gradient_ascent import StartImage, resize
from phosphene.rendering.objectives import Address, InPhoto, Objective, layer
from phosphene.rendering.photo_objectives import accent, caricature, perceptual_distance
from phosphene.rendering.recipes import Recipe, find_recipe
from phosphene.rendering.render import render
from phosphene.rendering.result import Rendered

FILTER_CLOSENESS, LAYER_CLOSENESS = 2.0, 0.5  # weight of the distance from the photo


def accentuate(
    model: Model,
    photo: Tensor,
    address: Address,
    channel: int | None = None,
    amount: float | Iterable[float] = 1.0,
    recipe: str | Recipe | None = None,
    *,
    size: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    watch: Watch | None = None,
    progress: bool = True,
) -> Rendered:
    """Return a photo in which that stands out to which a filter, or a whole layer, responds in it.

    Args:
        photo: (1, c, h, w) in [0, 1].
        address: the layer.
        channel: the filter (Feature Accentuation, Hamblin et al. 2024); None: whatever the layer sees (caricature).
        amount: from 0, the photo itself, to 1; of several amounts each gives a picture, from one and the same ascent.
        recipe: by default `accentuate` for a filter, `caricature` for a layer.
        size: short side of the result in pixels, by default the photo's own, at most the recipe's.
        steps, seed, watch, progress: as for `render`.

    Returns:
        One picture for each amount. `scores` are the mean of the filter's map for each, `start_scores` that for the
        photo; for a layer they are `caricature` with power 0, so 1 for the photo.

    Raises:
        LayerNotFound, LayerRefused, ChannelNotFound, RecipeNotFound, SizeRefused, InvalidRequest: as `render`.

    Example:
        >>> accentuate(load("builtin/vgg19"), read("cat.jpg"), "block4_conv1", channel=7).pictures[0].save("cat.png")
    """
    amounts = checked_amounts(amount)
    model.check_photo(photo)
    target = model.find(address)
    check_channel(target, channel)
    recipe = recipe or ("caricature" if channel is None else "accentuate")
    scaled = at_size(photo, working_size(photo, recipe, size))
    objective = subject(target, channel, earlier_layer(model, target))
    drawn = draw_into(scaled, model, objective, recipe, steps=steps, seed=seed, watch=watch, progress=progress)
    return at_amounts(model, drawn, scaled, target, channel, amounts)


def dream(
    model: Model,
    photo: Tensor,
    address: Address,
    recipe: str | Recipe = "dream",
    *,
    size: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    watch: Watch | None = None,
    progress: bool = True,
) -> Rendered:
    """Return a photo (1, c, h, w) changed so that a layer sees more of what it already sees in it (DeepDream).

    Other than `accentuate`, it is not kept close to the photo. `size` is the short side of the result in pixels, by
    default the photo's own, at most the recipe's.
    """
    model.check_photo(photo)
    return draw_into(
        photo, model, layer(address), recipe, size=size, steps=steps, seed=seed, watch=watch, progress=progress
    )


def draw_into(
    photo: Tensor, model: Model, objective: Objective, recipe: str | Recipe, *, size: int | None = None, **settings: Any
) -> Rendered:
    """Return a photo (1, c, h, w) after an ascent of an objective that starts from it; `settings` are `render`'s."""
    return render(model, objective, recipe, size=working_size(photo, recipe, size), photo=photo, **settings)


def working_size(photo: Tensor, recipe: str | Recipe, size: int | None) -> int:
    """Return the short side at which a photo is drawn into."""
    return min(*photo.shape[-2:], find_recipe(recipe).size) if size is None else size


def at_size(photo: Tensor, size: int) -> Tensor:
    """Return a photo (1, c, h, w) in [0, 1] with another short side; one of that size is returned as it is."""
    if size < 1:
        raise InvalidRequest(f"a picture is at least 1 px wide, not {size}")
    shape = StartImage(photo.shape[1], photo).shape(size)
    return photo if shape == tuple(photo.shape[1:]) else resize(photo, shape).clamp(0, 1)


def checked_amounts(amount: float | Iterable[float]) -> list[float]:
    """Return the amounts as numbers; refuse any outside of 0 to 1."""
    numbers: list[Any] = list(amount) if isinstance(amount, Iterable) else [amount]
    amounts = [finite_number(number, "an amount is a number") for number in numbers]
    if not amounts or not all(0 <= number <= 1 for number in amounts):
        raise InvalidRequest(f"an amount is from 0, which is the photo itself, to 1, not {amount}")
    return amounts


def check_channel(target: Layer, channel: int | None) -> None:
    """Refuse a channel that a layer does not have."""
    if channel is None:
        return
    whole_number(channel, "a channel")
    count = target.channels or 0
    if not target.is_map:
        raise LayerRefused(f"{target.path} is a {target.kind} and returns no map of channels; choose a convolution")
    if channel >= count:
        raise ChannelNotFound(f"{target.path!r} has {count} channels, 0 to {count - 1}; there is no {channel}")


def subject(target: Layer, channel: int | None, earlier: Layer) -> Objective:
    """Return what a filter, or a layer, sees in a photo, less the distance from the photo at an earlier layer."""
    distance = perceptual_distance(earlier.path)
    if channel is None:
        return caricature(target.path) - LAYER_CLOSENESS * distance
    return accent(target.path, channel) - FILTER_CLOSENESS * distance


def earlier_layer(model: Model, target: Layer) -> Layer:
    """Return the convolution halfway to a layer, where pictures are kept close to their photo."""
    layers = model.layers()
    paths = [row.path for row in layers]
    own = target.path.partition("#")[0]
    before = layers[: paths.index(own) + 1] if own in paths else layers
    convolutions = [row for row in before if row.convolution] or [target]
    return convolutions[(len(convolutions) - 1) // 2]


def at_amounts(
    model: Model, drawn: Rendered, photo: Tensor, target: Layer, channel: int | None, amounts: list[float]
) -> Rendered:
    """Return a drawn picture between its photo (0) and itself (1), once for each amount, with the responses as scores.

    In between are weighted means of the pixels, which a page can show by opacity alone.
    """
    start = photo.to(drawn.images)
    change = drawn.images.clamp(0, 1) - start
    images = torch.cat([(start + number * change).clamp(0, 1) for number in amounts])
    before, *after = responses(model, torch.cat([start, images]), target, channel)
    name, count = drawn.names[0], len(amounts)
    return replace(
        drawn,
        images=images,
        scores=torch.stack(after),
        start_scores=before.expand(count),
        history=drawn.history.expand(-1, count),
        dead=drawn.dead.expand(count),
        plain=torch.zeros(count, dtype=torch.bool),
        names=(name,) if count == 1 else tuple(f"{name}_amount_{number:g}" for number in amounts),
        spec={**drawn.spec, "amounts": amounts},
    )


def responses(model: Model, images: Tensor, target: Layer, channel: int | None) -> list[Tensor]:
    """Return the response to each image (n, c, h, w), a number; the first is the photo. See `accentuate`."""
    with model.reading([target.path]) as read, torch.no_grad():
        acts = [read(image[None].to(model.prototype_tensor))[target.path].cpu() for image in images]
    if channel is not None:
        return [act[0, channel].mean() for act in acts]
    projection, none = caricature(target.path, power=0), torch.empty(0)
    return [projection.score({target.path: act, InPhoto(target.path): acts[0]}, none, none)[0] for act in acts]
