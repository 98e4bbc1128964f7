"""Rendering: the picture that excites an objective most, found by gradient ascent from noise."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from phosphene.arguments import whole_number
from phosphene.errors import InvalidRequest, SizeRefused
from phosphene.network.model import Model
from phosphene.rendering.batches import RenderPlan, Watch, assemble, collect_batches
from phosphene.rendering.engine.batch_size import check_batch, chosen_batch
from phosphene.rendering.engine.forward import fast_forward_pass
from phosphene.rendering.engine.precision import chosen_precision, float32_steps
from phosphene.rendering.facets import with_facets
from phosphene.rendering.gradient_ascent import AscentPlan, ReadActivations, StartImage
from phosphene.rendering.objectives import Objective
from phosphene.rendering.recipes import DEFAULT, Recipe, find_recipe
from phosphene.rendering.result import Rendered


def render(
    model: Model,
    objective: Objective,
    recipe: str | Recipe = DEFAULT,
    *,
    size: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    batch: int | str = "auto",
    precision: str = "auto",
    film: int = 0,
    photo: Tensor | None = None,
    watch: Watch | None = None,
    facets: int = 1,
    opposite: bool = False,
    progress: bool = True,
) -> Rendered:
    """Return the pictures that excite an objective most.

    Args:
        model: from `load`; it is used as it is and left as it was.
        objective: what to excite, such as `channel("block3_conv1", range(64))`; its `n` pictures go in batches.
        recipe: a name or a `Recipe`.
        size: side in pixels, by default that of the recipe and receptive field, at most twice the network's input.
        steps: at each scale; `seed`: of starts and transforms; both by default the recipe's.
        batch: pictures at once; `auto`: up to 8 on a CPU and 64 on a GPU, as the free memory allows. A batch that
            does not fit is halved, with a warning.
        precision: of the steps: `fp32` runs the network as it is, `bf16` from the second fifth on in bfloat16; finished
            pictures are always scored by the network as it is. `auto`: see `precision.chosen_precision`.
        film: how many moments to keep besides the start; `photo`: (1, c, h, w) in [0, 1], a start in place of noise.
        watch: called with every `Frame`; `progress`: whether to show a bar, see `progress.progress_bar`.
        facets: different pictures of each filter; `opposite`: of what suppresses it most. Scores stay the network's.

    Raises:
        LayerNotFound, LayerRefused, ChannelNotFound, RecipeNotFound, SizeRefused, InvalidRequest, OutOfMemory.
        Interrupted: on Ctrl-C; its `finished` holds the finished batches, as `Rendered`, or None.
        Unfinished: any other failure after a finished batch; `finished` holds the finished batches.

    Example:
        >>> render(load("builtin/vgg19"), channel("block3_conv1", range(4)), "fast").grid().save("grid.png")
    """
    recipe = find_recipe(recipe).with_settings(size, steps, seed)
    with prepare(model, objective, recipe, size is not None, batch, precision, film, photo, facets, opposite) as plan:
        batches = collect_batches(plan, watch, progress)
    return assemble(batches, plan)


@contextmanager
def prepare(
    model: Model,
    objective: Objective,
    recipe: Recipe,
    size_given: bool,
    batch: int | str,
    precision: str,
    film: int,
    photo: Tensor | None,
    facets: int,
    opposite: bool,
) -> Iterator[RenderPlan]:
    """Check the arguments of `render`, borrow the network, and yield the plan."""
    check_batch(batch)
    objective = with_facets(objective, facets, opposite)
    precision, film = chosen_precision(model, precision), whole_number(film, "film")
    if photo is not None:
        model.check_photo(photo)
    elif objective.compared:
        raise InvalidRequest("this objective compares pictures with the photo that they start from; give photo=")
    layers = tuple(address if address == "" else model.find(address).path for address in objective.layers)
    if photo is None and not size_given:
        recipe = recipe.with_settings(size=recipe.size_for(receptive_side(model, layers)))
    with fast_forward_pass(model, objective, maps=facets > 1) as forward:
        recipe, start = fit_to_network(model, forward.read, recipe, size_given, photo)
        ascent = AscentPlan(
            objective,
            recipe,
            start,
            layers,
            model.prototype_tensor,
            float32_steps(recipe, precision),
            facets=facets,
            opposite=opposite,
        )
        at_once = chosen_batch(model, batch, layers, start.shape(max(recipe.sizes))[1:])
        at_once = max(facets, at_once // facets * facets)
        engine = {"batch": at_once, "precision": precision, "shortcuts": list(forward.applied_shortcuts())}
        yield RenderPlan(forward.read, ascent, at_once, film, {**specification(model, ascent), **engine})


def receptive_side(model: Model, layers: Sequence[str]) -> int | None:
    """Return the longest side, in pixels, of the receptive fields of layers, None where one sees all or is unknown."""
    fields = [model.find(path).receptive_field if path else None for path in layers]
    return max(max(field.size) for field in fields if field) if fields and all(fields) else None


def fit_to_network(
    model: Model, read: ReadActivations, recipe: Recipe, size_given: bool, photo: Tensor | None
) -> tuple[Recipe, StartImage]:
    """Return the recipe at a size that the network takes, and the start; a size that the user gave is kept or refused.

    A network that takes only its own input size gets pictures of that size, even if it is not square.
    """
    start = StartImage(model.channels_in, photo)
    if photo is None and not size_given:
        recipe = recipe.with_settings(size=min(recipe.size, 2 * min(model.input_size)))
    first_item = torch.zeros(1, dtype=torch.long, device=model.prototype_tensor.device)
    try:
        for size in {min(recipe.sizes), max(recipe.sizes)}:
            model.check_takes(lambda image: read(image, first_item), start.shape(size)[1:])
    except SizeRefused:
        if size_given or photo is not None:
            raise
        model.check_takes(lambda image: read(image, first_item), model.input_size)
        recipe = replace(recipe, sizes=(min(model.input_size),), steps=recipe.steps * len(recipe.sizes))
        start = StartImage(model.channels_in, sides=model.input_size)
    return recipe, start


def specification(model: Model, ascent: AscentPlan) -> dict[str, Any]:
    """Return in JSON terms everything that determines the pictures."""
    return {
        **model.origin,
        "layers": list(ascent.layers),
        "sees": [model.find(path).field_size if path else "whole" for path in ascent.layers],
        "objective": ascent.objective.spec,
        "recipe": {**ascent.recipe.as_dict(), "digest": ascent.recipe.digest},
        "size": list(ascent.start_image.shape(ascent.recipe.size)[1:]),
        **({"facets": ascent.facets} if ascent.facets > 1 else {}),
        **({"opposite": True} if ascent.opposite else {}),
    }
