"""The climb: one batch of images up the gradient of an objective. The plain loop, on a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phosphene.errors import LayerRefused
from phosphene.objectives import Acts, Objective
from phosphene.parameterizations import PARAMETERIZATIONS
from phosphene.recipes import Recipe
from phosphene.steps import STEPS, State
from phosphene.transforms import TRANSFORMS, Draws

Read = Callable[[Tensor], Acts]
Shape = tuple[int, int, int]  # (c, h, w)


class Frame(NamedTuple):
    """One moment of a climb: `image` (b, c, h, w) before step `step` of `steps`, and its scores (b,) under transforms.

    `items` says which pictures of the objective the rows are. The last frame, `step == steps`, is the finished image
    with the scores that it has as it is.
    """

    step: int
    steps: int
    items: Tensor
    scores: Tensor
    image: Tensor


def climb(
    read: Read, objective: Objective, recipe: Recipe, items: Tensor, draws: Draws, like: Tensor, base: Base
) -> Iterator[Frame]:
    """Yield the frames of one batch while its images climb: the render loop."""
    transforms = [TRANSFORMS[name](**dict(options)) for name, options in recipe.transforms]
    parameterization, options = recipe.parameterization
    rule = STEPS[recipe.step_rule[0]](**dict(recipe.step_rule[1]))
    total, done, image = len(recipe.sizes) * recipe.steps, 0, None
    for size in recipe.sizes:
        shape, start = base.start(size, image, recipe.blur, draws)
        current = PARAMETERIZATIONS[parameterization]((len(items), *shape), start, like, **dict(options))
        state: State = None
        for _ in range(recipe.steps):
            image = current.image()
            seen = image
            for transform in transforms:
                seen = transform(seen, draws)
            scores = objective.score(read(seen), image, items)
            yield Frame(done, total, items, scores.detach(), image.detach())
            gradient = ascent_direction(scores, current.tensor) - recipe.weight_decay * current.tensor.detach()
            update, state = rule(gradient, state)
            with torch.no_grad():
                current.tensor.add_(update)
            done += 1
        image = current.image().detach()
    assert image is not None
    yield Frame(total, total, items, clean_scores(read, objective, image, items), image)


def ascent_direction(scores: Tensor, tensor: Tensor) -> Tensor:
    """Return d scores.sum() / d tensor: of the sum, so that each image's gradient is exactly what it is alone."""
    if not scores.requires_grad:
        raise LayerRefused("no gradient flows from this layer back to the image: the network cuts it off before")
    return torch.autograd.grad(scores.sum(), tensor)[0]


def clean_scores(read: Read, objective: Objective, image: Tensor, items: Tensor) -> Tensor:
    """Return the scores of finished images as they are, without transforms."""
    with torch.no_grad():
        return objective.score(read(image), image, items)


@dataclass(frozen=True)
class Base:
    """What images start from: a photo (1, c, h, w), whose shape they keep, or nothing, for squares of noise."""

    channels: int
    photo: Tensor | None = None

    def shape(self, size: int) -> Shape:
        """Return (c, h, w) with `size` as the short side."""
        if self.photo is None:
            return self.channels, size, size
        height, width = self.photo.shape[-2:]
        short = min(height, width)
        return self.channels, max(1, round(height * size / short)), max(1, round(width * size / short))

    def start(self, size: int, before: Tensor | None, blur: int, draws: Draws) -> tuple[Shape, Tensor | Draws]:
        """Return the shape at a scale and what to start from: noise, the photo, or the last scale's image enlarged.

        Over a photo, only what the last scale added to it is enlarged, so that the photo keeps its detail.
        """
        shape = self.shape(size)
        if before is None and self.photo is None:
            return shape, draws
        if self.photo is None:
            assert before is not None
            return shape, box_blur(resize(before, shape), blur)
        photo = self.photo.expand(len(draws.generators), -1, -1, -1)
        at_scale = resize(photo, shape)
        if before is None:
            return shape, at_scale
        added = before - resize(photo, (shape[0], *before.shape[-2:])).to(before)
        return shape, at_scale.to(before) + box_blur(resize(added, shape), blur)


def resize(image: Tensor, shape: Shape) -> Tensor:
    """Return images at another size, bicubic as R3 has it; smoothed first where they shrink."""
    shrinks = shape[-1] < image.shape[-1]
    return F.interpolate(image, shape[-2:], mode="bicubic", align_corners=False, antialias=shrinks)


def box_blur(image: Tensor, side: int) -> Tensor:
    """Return the mean over the `side` × `side` window around each pixel, mirrored at the border."""
    if side <= 1:
        return image
    before, after = side // 2, (side - 1) // 2
    return F.avg_pool2d(F.pad(image, [before, after, before, after], mode="reflect"), side, 1)
