"""Rendering: the picture that an objective answers to, found by climbing its gradient from noise."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phosphene.ascent import Base, Frame, Read, clean_scores, climb
from phosphene.errors import Interrupted, InvalidRequest, OutOfMemory, SizeRefused
from phosphene.model import Model, is_out_of_memory
from phosphene.objectives import Address, Objective, layer
from phosphene.recipes import DEFAULT, Recipe, find_recipe
from phosphene.rendered import Rendered
from phosphene.transforms import Draws
from phosphene.version import __version__


def render(
    model: Model,
    objective: Objective,
    recipe: str | Recipe = DEFAULT,
    *,
    size: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    batch: int | str = "auto",
    film: int = 0,
    photo: Tensor | None = None,
    watch: Callable[[Frame], None] | None = None,
) -> Rendered:
    """Return the pictures that an objective answers to.

    Args:
        model: from `load`; it is used as it is and left as it was.
        objective: what to excite, such as `channel("block3_conv1", range(64))`; its `n` pictures go in batches.
        recipe: a name or a `Recipe`.
        size: side of the pictures in pixels, by default the recipe's, but at most twice the network's input.
        steps: at each scale; `seed`: of starts and transforms; both by default the recipe's.
        batch: pictures at once, or `auto`. A batch that does not fit the memory is halved, with a warning.
        film: how many moments of the climb to keep.
        photo: (1, c, h, w) in [0, 1] to start from in place of noise.
        watch: called with every `Frame`.

    Raises:
        LayerNotFound, LayerRefused, ChannelNotFound, RecipeNotFound, SizeRefused, InvalidRequest, OutOfMemory.
        Interrupted: on Ctrl-C; its `finished` holds the batches done, as `Rendered`, or None.

    Example:
        >>> render(load("builtin/vgg19"), channel("block3_conv1", range(4)), "fast").grid().save("grid.png")
    """
    asked = find_recipe(recipe).at(size, steps, seed)
    addresses = resolved(model, objective)
    with model.reading(objective.layers) as read:
        plan = fitted(model, read, asked, size is not None, photo)
        base = Base(model.channels_in, photo)
        layers = [addresses[one] for one in objective.layers]
        spec = {
            "model": model.name,
            "fingerprint": model.fingerprint,
            "layers": layers,
            "objective": objective.spec,
            "recipe": {**plan.as_dict(), "digest": plan.digest},
            "size": list(base.shape(plan.size)[1:]),
            "versions": {"phosphene": __version__, "torch": torch.__version__},
        }
        done: list[Batch] = []
        todo = list(range(objective.n))
        at_once = chosen_batch(batch, model.like.device)
        while todo:
            items = todo[:at_once]
            try:
                done.append(render_batch(read, objective, plan, items, layers, model.like, base, film, watch))
            except KeyboardInterrupt as error:
                finished = assemble(done, objective, spec) if done else None
                raise Interrupted(f"stopped with {len(finished or ())} of {objective.n} done", finished) from error
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(items) == 1:
                    raise OutOfMemory(
                        f"not even one picture of {plan.size} px fits the memory; give a smaller size"
                    ) from error
                at_once = len(items) // 2
                warnings.warn(
                    f"out of memory with {len(items)} pictures at once; going on with {at_once}", stacklevel=2
                )
                continue
            todo = todo[len(items) :]
    return assemble(done, objective, spec)


def resolved(model: Model, objective: Objective) -> dict[Address, str]:
    """Return the path that each address of an objective stands for."""
    return {one: one if one == "" else model.find(one).path for one in objective.layers}


def fitted(model: Model, read: Read, recipe: Recipe, size_given: bool, photo: Tensor | None) -> Recipe:
    """Return the recipe at a size that the network takes; a size that the user gave is kept or refused."""
    if photo is None and not size_given:
        recipe = recipe.at(size=min(recipe.size, 2 * min(model.input_size)))
    base = Base(model.channels_in, photo)
    try:
        for size in {min(recipe.sizes), max(recipe.sizes)}:
            model.check_takes(read, base.shape(size)[1:])
    except SizeRefused:
        if size_given or photo is not None or model.input_size[0] != model.input_size[1]:
            raise
        recipe = replace(recipe, sizes=(model.input_size[0],), steps=recipe.steps * len(recipe.sizes))
        model.check_takes(read, model.input_size)
    return recipe


def chosen_batch(batch: int | str, device: torch.device) -> int:
    """Return how many pictures go at once: few on a CPU, where more only cost memory, many on a GPU."""
    if batch == "auto":
        return 8 if device.type == "cpu" else 64
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise InvalidRequest(f"batch is 'auto' or a whole number of at least 1, not {batch!r}")
    return batch


class Batch(NamedTuple):
    """What one batch leaves behind, on the CPU."""

    items: list[int]
    images: Tensor
    start_scores: Tensor
    scores: Tensor
    history: Tensor
    moments: list[Tensor]


def render_batch(
    read: Read,
    objective: Objective,
    recipe: Recipe,
    items: list[int],
    layers: Sequence[str],
    like: Tensor,
    base: Base,
    film: int,
    watch: Callable[[Frame], None] | None,
) -> Batch:
    """Render some of an objective's pictures at once."""
    draws = Draws([picture_seed(recipe.seed, layers, objective.names[item]) for item in items])
    history: list[Tensor] = []
    moments: list[Tensor] = []
    start_scores = None
    for frame in climb(read, objective, recipe, torch.tensor(items, device=like.device), draws, like, base):
        if start_scores is None:
            start_scores = clean_scores(read, objective, frame.image, frame.items)
        if frame.step < frame.steps:
            history.append(frame.scores)
        if film and falls_due(frame, film):
            moments.append(frame.image.cpu())
        if watch:
            watch(frame)
    assert start_scores is not None
    return Batch(items, frame.image.cpu(), start_scores.cpu(), frame.scores.cpu(), torch.stack(history).cpu(), moments)


def falls_due(frame: Frame, moments: int) -> bool:
    """Return whether a frame is one of so many, evenly spread, of which the finished picture is the last."""
    return frame.step * moments // frame.steps > (frame.step - 1) * moments // frame.steps


def picture_seed(seed: int, layers: Sequence[str], name: str) -> int:
    """Return the seed of one picture's random numbers, the same whichever other pictures are rendered with it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{'/'.join(layers)}/{name}".encode()).digest()[:7], "big")


def assemble(batches: Sequence[Batch], objective: Objective, spec: Mapping[str, Any]) -> Rendered:
    """Return batches as one result."""
    images, start, scores = (
        torch.cat([getattr(one, name) for one in batches]) for name in ("images", "start_scores", "scores")
    )
    rises = scores > start + 1e-6 * start.abs().clamp(min=1)
    contrast = images.flatten(1).amax(1) - images.flatten(1).amin(1)
    kept = min(len(one.moments) for one in batches)
    return Rendered(
        images=images,
        scores=scores,
        start_scores=start,
        history=torch.cat([one.history for one in batches], 1),
        dead=~rises | (contrast < 2 / 255),
        names=tuple(objective.names[item] for one in batches for item in one.items),
        spec=spec,
        moments=tuple(torch.cat([one.moments[moment] for one in batches]) for moment in range(kept)),
    )


def dream(
    model: Model,
    photo: Tensor,
    address: Address,
    recipe: str | Recipe = "dream",
    *,
    size: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    watch: Callable[[Frame], None] | None = None,
) -> Rendered:
    """Return a photo (1, c, h, w) changed so that a layer sees more of what it saw in it (DeepDream).

    `size` is the short side of the result in pixels, by default the photo's own, at most the recipe's.
    """
    short = min(photo.shape[-2:])
    side = size or min(short, find_recipe(recipe).size)
    return render(model, layer(address), recipe, size=side, steps=steps, seed=seed, photo=photo, watch=watch)
