"""Rendering: the picture that an objective answers to, found by climbing its gradient from noise."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phosphene.arguments import whole_number
from phosphene.errors import Interrupted, LayerRefused, OutOfMemory, SizeRefused, Unfinished, first_line
from phosphene.images import display
from phosphene.network.memory import is_out_of_memory
from phosphene.network.model import Model
from phosphene.rendering.engine.batch_size import check_batch, chosen_batch
from phosphene.rendering.engine.cuda_graph import ascend_with_cuda_graph
from phosphene.rendering.engine.forward import fast_forward_pass
from phosphene.rendering.engine.precision import chosen_precision, float32_steps
from phosphene.rendering.gradient_ascent import AscentPlan, Frame, ReadActivations, StartImage, ascend, clean_scores
from phosphene.rendering.objectives import Address, Objective, layer
from phosphene.rendering.recipes import DEFAULT, Recipe, find_recipe
from phosphene.rendering.result import Rendered

LEAKY_SHARE = 0.25  # of the steps


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
    watch: Callable[[Frame], None] | None = None,
) -> Rendered:
    """Return the pictures that an objective answers to.

    Args:
        model: from `load`; it is used as it is and left as it was.
        objective: what to excite, such as `channel("block3_conv1", range(64))`; its `n` pictures go in batches.
        recipe: a name or a `Recipe`.
        size: side of the pictures in pixels, by default the recipe's, but at most twice the network's input.
        steps: at each scale; `seed`: of starts and transforms; both by default the recipe's.
        batch: pictures at once, or `auto`: a few on a CPU, more on a GPU, no more than the free memory holds. A batch
            that does not fit all the same is halved, with a warning.
        precision: of the network's forward pass while climbing: `fp32` as the network is, or `bf16` after the first
            fifth of the steps; scores are always taken as the network is. `auto`: see `precision.chosen_precision`.
        film: how many moments of the climb to keep, beside the start.
        photo: (1, c, h, w) in [0, 1] to start from in place of noise.
        watch: called with every `Frame`.

    Raises:
        LayerNotFound, LayerRefused, ChannelNotFound, RecipeNotFound, SizeRefused, InvalidRequest, OutOfMemory.
        Interrupted: on Ctrl-C; its `finished` holds the batches done, as `Rendered`, or None.
        Unfinished: it failed, whatever the reason, after some batches were done; `finished` holds them.

    Example:
        >>> render(load("builtin/vgg19"), channel("block3_conv1", range(4)), "fast").grid().save("grid.png")
    """
    asked = find_recipe(recipe).at(size, steps, seed)
    check_batch(batch)
    precision = chosen_precision(model, precision)
    check_film(film)
    if photo is not None:
        model.check_photo(photo)
    layers = resolved(model, objective)
    done: list[RenderedBatch] = []
    with fast_forward_pass(model, objective) as (read, shortcuts):
        fitting, base = fit_to_network(model, read, asked, size is not None, photo)
        plan = AscentPlan(objective, fitting, base, layers, model.like, float32_steps(fitting, precision))
        at_once = chosen_batch(model, batch, layers, base.shape(max(fitting.sizes))[1:])
        taken = {"batch": at_once, "precision": precision, "shortcuts": list(shortcuts())}
        spec = {**specification(model, plan), **taken}
        one_batch = partial(render_batch, read, plan, film, watch)
        try:
            for batch_done in batches(one_batch, plan, at_once):
                done.append(batch_done)
        except KeyboardInterrupt as error:
            finished = assemble(done, objective, spec) if done else None
            raise Interrupted(f"stopped with {len(finished or ())} of {objective.n} done", finished) from error
        except Exception as error:
            if not done:
                raise
            finished = assemble(done, objective, spec)
            raise Unfinished(f"{first_line(error)}; {len(finished)} of {objective.n} are done", finished) from error
    return assemble(done, objective, spec)


def check_film(film: int) -> None:
    """Refuse a number of moments that is none."""
    whole_number(film, "film")


def resolved(model: Model, objective: Objective) -> tuple[str, ...]:
    """Return the paths that the addresses of an objective stand for."""
    return tuple(one if one == "" else model.find(one).path for one in objective.layers)


def fit_to_network(
    model: Model, read: ReadActivations, recipe: Recipe, size_given: bool, photo: Tensor | None
) -> tuple[Recipe, StartImage]:
    """Return the recipe at a size that the network takes, and the shape; a size that the user gave is kept or refused.

    A network that takes only its own input size gets pictures of that size, oblong ones too.
    """
    base = StartImage(model.channels_in, photo)
    if photo is None and not size_given:
        recipe = recipe.at(size=min(recipe.size, 2 * min(model.input_size)))
    first = torch.zeros(1, dtype=torch.long, device=model.like.device)
    read_first = partial(read, items=first)
    try:
        for size in {min(recipe.sizes), max(recipe.sizes)}:
            model.check_takes(read_first, base.shape(size)[1:])
    except SizeRefused:
        if size_given or photo is not None:
            raise
        model.check_takes(read_first, model.input_size)
        recipe = replace(recipe, sizes=(min(model.input_size),), steps=recipe.steps * len(recipe.sizes))
        base = StartImage(model.channels_in, sides=model.input_size)
    return recipe, base


def specification(model: Model, plan: AscentPlan) -> dict[str, Any]:
    """Return in JSON terms everything that the pictures follow from."""
    return {
        **model.origin,
        "layers": list(plan.layers),
        "objective": plan.objective.spec,
        "recipe": {**plan.recipe.as_dict(), "digest": plan.recipe.digest},
        "size": list(plan.base.shape(plan.recipe.size)[1:]),
    }


class RenderedBatch(NamedTuple):
    """What one batch leaves behind, on the CPU."""

    items: list[int]
    images: Tensor
    start_scores: Tensor
    scores: Tensor
    history: Tensor
    moments: list[Tensor]
    woken: tuple[int, ...] = ()

    @property
    def asleep(self) -> Tensor:
        """Which pictures never left their start."""
        return never_moved(self.start_scores, torch.cat([self.history, self.scores[None]]))

    def with_woken(self, again: RenderedBatch, rows: Sequence[int]) -> RenderedBatch:
        """Return this batch with those of its rows that were tried `again` and left their start."""
        woken = [(row, number) for number, row in enumerate(rows) if not bool(again.asleep[number])]
        for row, number in woken:
            self.images[row], self.scores[row] = again.images[number], again.scores[number]
            self.history[:, row] = again.history[:, number]
            for mine, theirs in zip(self.moments, again.moments, strict=True):
                mine[row] = theirs[number]
        return self._replace(woken=tuple(self.items[row] for row, _ in woken))


def batches(one_batch: Callable[[list[int]], RenderedBatch], plan: AscentPlan, at_once: int) -> Iterator[RenderedBatch]:
    """Yield all pictures of an objective in batches; where one does not fit the memory, go on with half as many.

    Raises:
        OutOfMemory: not even one picture fits.
    """
    todo = list(range(plan.objective.n))
    while todo:
        items = todo[:at_once]
        try:
            batch = one_batch(items)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(items) == 1:
                raise OutOfMemory(
                    f"not even one picture of {plan.recipe.size} px fits the memory; give a smaller size"
                ) from error
            at_once = len(items) // 2
            # 3: the line that called `render`
            warnings.warn(f"out of memory with {len(items)} pictures at once; going on with {at_once}", stacklevel=3)
            continue
        todo = todo[len(items) :]
        yield batch


def render_batch(
    read: ReadActivations, plan: AscentPlan, film: int, watch: Callable[[Frame], None] | None, items: list[int]
) -> RenderedBatch:
    """Render some of an objective's pictures at once; those that never left their start are tried once more, leaky."""
    batch = run_ascent(ascend_with_cuda_graph if plan.like.is_cuda else ascend, read, plan, film, watch, items)
    asleep = batch.asleep.nonzero()[:, 0].tolist()
    if not asleep:
        return batch
    leaky = replace(plan, leaky=max(1, round(LEAKY_SHARE * plan.recipe.steps * len(plan.recipe.sizes))))
    again = run_ascent(ascend, read, leaky, film, watch, [items[row] for row in asleep])
    return batch.with_woken(again, asleep)


def run_ascent(
    loop: Callable[[ReadActivations, AscentPlan, list[int]], Iterator[Frame]],
    read: ReadActivations,
    plan: AscentPlan,
    film: int,
    watch: Callable[[Frame], None] | None,
    items: list[int],
) -> RenderedBatch:
    """Have some of an objective's pictures climb at once."""
    history: list[Tensor] = []
    moments: list[Tensor] = []
    start_scores = None
    for frame in loop(read, plan, items):
        if start_scores is None:
            start_scores = clean_scores(read, plan.objective, frame.image, frame.items)
            need_finite(start_scores, plan, items)
        if frame.step < frame.steps:
            history.append(frame.scores)
        if film and is_film_frame(frame, film):
            moments.append(frame.image.cpu())
        if watch:
            watch(frame)
    assert start_scores is not None
    # the history is looked at once, at the end: a look at every step would make a GPU wait
    need_finite(torch.stack([*history, frame.scores]), plan, items)
    return RenderedBatch(
        items, frame.image.cpu(), start_scores.cpu(), frame.scores.cpu(), torch.stack(history).cpu(), moments
    )


def need_finite(scores: Tensor, plan: AscentPlan, items: Sequence[int]) -> None:
    """Refuse scores (..., b) that are NaN or infinite.

    Raises:
        LayerRefused: the message names the layer and the first picture concerned.
    """
    wrong = ~scores.isfinite().reshape(-1, len(items)).all(0)
    if bool(wrong.any()):
        name = plan.objective.names[items[int(wrong.nonzero()[0])]]
        raise LayerRefused(
            f"the score of {name} at {', '.join(map(repr, plan.layers)) or 'the image'} became NaN or infinite: the "
            "network overflows on such a picture; take another recipe, a smaller rate, or --precision fp32"
        )


def is_film_frame(frame: Frame, moments: int) -> bool:
    """Return whether a frame is the start or one of so many, evenly spread, of which the finished picture is last."""
    return frame.step * moments // frame.steps > (frame.step - 1) * moments // frame.steps


def assemble(done: Sequence[RenderedBatch], objective: Objective, spec: Mapping[str, Any]) -> Rendered:
    """Return batches as one result."""
    images, start, scores = (
        torch.cat([getattr(one, name) for one in done]) for name in ("images", "start_scores", "scores")
    )
    history = torch.cat([one.history for one in done], 1)
    shown = display.DISPLAYS[spec["recipe"]["display"]](images)
    kept = min(len(one.moments) for one in done)
    woken = [objective.names[item] for one in done for item in one.woken]
    return Rendered(
        images=images,
        scores=scores,
        start_scores=start,
        history=history,
        dead=never_moved(start, torch.cat([history, scores[None]])) | without_contrast(shown),
        names=tuple(objective.names[item] for one in done for item in one.items),
        spec={**spec, "woken": woken} if woken else spec,
        moments=tuple(torch.cat([one.moments[moment] for one in done]) for moment in range(kept)),
    )


def never_moved(start: Tensor, scores: Tensor) -> Tensor:
    """Return for each picture whether its scores (steps, n) all equal its starting score (n,), within rounding."""
    return ((scores - start).abs() <= 1e-6 * start.abs()).all(0)


def without_contrast(shown: Tensor) -> Tensor:
    """Return for each displayed image (n, c, h, w) in [0, 1] whether all its values are within two bytes."""
    return shown.flatten(1).amax(1) - shown.flatten(1).amin(1) < 2 / 255


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
    model.check_photo(photo)
    short = min(photo.shape[-2:])
    side = min(short, find_recipe(recipe).size) if size is None else size
    return render(model, layer(address), recipe, size=side, steps=steps, seed=seed, photo=photo, watch=watch)
