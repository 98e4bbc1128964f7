"""The climb: one batch of images up the gradient of an objective. The plain loop, on a page."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from phosphene.errors import LayerRefused
from phosphene.rendering.objectives import Acts, Objective
from phosphene.rendering.parameterizations import PARAMETERIZATIONS, Parameterization
from phosphene.rendering.recipes import Recipe
from phosphene.rendering.relu_gradients import LeakyReluGradients
from phosphene.rendering.step_rules import STEP_RULES, State, StepRule
from phosphene.rendering.transforms import TRANSFORMS, RandomDraws, Transform


class ReadActivations(Protocol):
    """What runs the network: image (b, c, h, w), items (b,) -> what the objective scores."""

    def __call__(self, image: Tensor, items: Tensor) -> Acts: ...


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


@dataclass(frozen=True)
class StartImage:
    """What images start from: a photo (1, c, h, w), whose shape they keep, or nothing, for noise.

    `sides` are the proportions (height, width) of the noise, by default a square's.
    """

    channels: int
    photo: Tensor | None = None
    sides: tuple[int, int] = (1, 1)

    def shape(self, size: int) -> Shape:
        """Return (c, h, w) with `size` as the short side."""
        height, width = self.sides if self.photo is None else self.photo.shape[-2:]
        short = min(height, width)
        return self.channels, max(1, round(height * size / short)), max(1, round(width * size / short))

    def start(
        self, size: int, before: Tensor | None, blur: int, draws: RandomDraws
    ) -> tuple[Shape, Tensor | RandomDraws]:
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


@dataclass(frozen=True)
class AscentPlan:
    """Everything that decides what the pictures become, beside the network.

    `layers` are the paths that the objective's addresses stand for; `like` has the network's device and dtype. The
    first `exact` steps are computed as the network is, those after them in bfloat16; None: all as it is. In the first
    `leaky` steps gradients pass rectifiers that give 0; see `leaky`.
    """

    objective: Objective
    recipe: Recipe
    base: StartImage
    layers: tuple[str, ...]
    like: Tensor
    exact: int | None = None
    leaky: int = 0

    def draws(self, items: Sequence[int]) -> RandomDraws:
        """Return the random numbers of some pictures: the same whichever others are rendered with them."""
        return RandomDraws([self.picture_seed(self.objective.names[item]) for item in items])

    def transforms(self) -> list[Transform]:
        """Return the recipe's transforms."""
        return [TRANSFORMS[name](**dict(options)) for name, options in self.recipe.transforms]

    def parameterization(self, shape: Shape, start: Tensor | RandomDraws) -> Parameterization:
        """Return what is optimised for images of a shape."""
        name, options = self.recipe.parameterization
        count = len(start.generators) if isinstance(start, RandomDraws) else len(start)
        return PARAMETERIZATIONS[name]((count, *shape), start, self.like, **dict(options))

    def step_rule(self) -> StepRule:
        """Return the recipe's step rule."""
        name, options = self.recipe.step_rule
        return STEP_RULES[name](**dict(options))

    def is_exact(self, step: int) -> bool:
        """Return whether a step, counted over all scales, is computed as the network is."""
        return self.exact is None or step < self.exact

    def picture_seed(self, name: str) -> int:
        """Return the seed of one picture's random numbers."""
        text = f"{self.recipe.seed}/{'/'.join(self.layers)}/{name}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def ascend(read: ReadActivations, plan: AscentPlan, items: Sequence[int]) -> Iterator[Frame]:
    """Yield the frames of one batch while its images climb: the render loop."""
    recipe, draws, transforms, rule = plan.recipe, plan.draws(items), plan.transforms(), plan.step_rule()
    rows = torch.tensor(items, device=plan.like.device)
    total, done, image = len(recipe.sizes) * recipe.steps, 0, None
    for size in recipe.sizes:
        shape, start = plan.base.start(size, image, recipe.blur, draws)
        current = plan.parameterization(shape, start)
        state: State = None
        for step in range(recipe.steps):
            image = current.image()
            seen = image
            for transform in transforms:
                seen = transform(seen, draws)
            with LeakyReluGradients() if done < plan.leaky else nullcontext():
                scores = score(read, plan.objective, image, seen, rows, plan.is_exact(done))
            yield Frame(done, total, rows, scores.detach(), image.detach())
            update, state = rule(ascent_direction(scores, current.tensor, recipe.weight_decay), state)
            with torch.no_grad():
                current.tensor.add_(recipe.pace(step) * update)
            done += 1
        image = current.image().detach()
    assert image is not None
    yield Frame(total, total, rows, clean_scores(read, plan.objective, image, rows), image)


def score(
    read: ReadActivations, objective: Objective, image: Tensor, seen: Tensor, items: Tensor, exact: bool
) -> Tensor:
    """Return the scores (b,) of images of which the network sees `seen`, in bfloat16 unless `exact`."""
    if exact:
        acts = read(seen, items)
    else:
        with torch.autocast(seen.device.type, torch.bfloat16):
            acts = {address: act.to(seen.dtype) for address, act in read(seen, items).items()}
    need_gradient(acts)
    return objective.score(acts, image, items)


def ascent_direction(scores: Tensor, tensor: Tensor, weight_decay: float) -> Tensor:
    """Return the gradient of scores with respect to what is optimised, less the weight decay."""
    # of the sum, so that each image's gradient is exactly what it is alone
    gradient = torch.autograd.grad(scores.sum(), tensor)[0]
    return gradient - weight_decay * tensor.detach() if weight_decay else gradient


def need_gradient(acts: Acts) -> None:
    """Refuse layers that no gradient leads back from."""
    for address, act in acts.items():
        if not act.requires_grad:
            where = repr(address) if address != "" else "the network's output"
            raise LayerRefused(
                f"no gradient flows from {where} back to the image: the network cuts it off before; "
                "take away its torch.no_grad() or detach(), or choose an earlier layer"
            )


def clean_scores(read: ReadActivations, objective: Objective, image: Tensor, items: Tensor) -> Tensor:
    """Return the scores of finished images as they are, without transforms."""
    with torch.no_grad():
        return objective.score(read(image, items), image, items)


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
