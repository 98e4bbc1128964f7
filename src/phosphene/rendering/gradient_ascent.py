"""Gradient ascent: the plain loop, which moves a batch of images up the gradient of an objective."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phosphene.errors import LayerRefused
from phosphene.rendering.facets import kept_apart
from phosphene.rendering.objectives import Acts, InPhoto, MapOf, Objective
from phosphene.rendering.parameterizations import PARAMETERIZATIONS, Parameterization
from phosphene.rendering.recipes import Recipe
from phosphene.rendering.relu_gradients import LeakyReluGradients
from phosphene.rendering.step_rules import STEP_RULES, State, StepRule
from phosphene.rendering.transforms import TRANSFORMS, RandomDraws, Transform

ReadActivations = Callable[[Tensor, Tensor], Acts]  # runs the network: image (b, c, h, w), items (b,) -> activations
Shape = tuple[int, int, int]  # (c, h, w)


class Frame(NamedTuple):
    """One step of an ascent: `image` (b, c, h, w) before step `step` of `steps`, and its scores (b,) under transforms.

    `items` are the indices of the rows among the objective's pictures. The last frame, `step == steps`, holds the
    finished image and its scores without transforms.
    """

    step: int
    steps: int
    items: Tensor
    scores: Tensor
    image: Tensor


@dataclass(frozen=True)
class StartImage:
    """What images start from: a photo (1, c, h, w), whose proportions they keep, or noise if there is none.

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
        self, size: int, previous: Tensor | None, blur: int, draws: RandomDraws
    ) -> tuple[Shape, Tensor | RandomDraws]:
        """Return the shape at a scale and its start: noise, the photo, or the previous scale's image enlarged.

        Over a photo, only what the previous scale added to it is enlarged, so that the photo keeps its detail.
        """
        shape = self.shape(size)
        if self.photo is None:
            return shape, draws if previous is None else box_blur(resize(previous, shape), blur)
        photo = self.photo.expand(len(draws.generators), -1, -1, -1)
        at_scale = resize(photo, shape)
        if previous is None:
            return shape, at_scale
        added = previous - resize(photo, (shape[0], *previous.shape[-2:])).to(previous)
        return shape, at_scale.to(previous) + box_blur(resize(added, shape), blur)


@dataclass(frozen=True)
class AscentPlan:
    """Everything besides the network that determines the pictures.

    `layers` are the paths of the objective's addresses; `prototype_tensor` has the network's device and dtype. The
    first `full_precision_steps` run in the network's own dtype and the others in bfloat16; None: all in its own. In
    the first `leaky_steps`, gradients also pass rectifiers that return 0; see `relu_gradients.py`. The objective has
    `facets` pictures of each filter in a row, which go through the ascent together; if `opposite`, scores descend.
    """

    objective: Objective
    recipe: Recipe
    start_image: StartImage
    layers: tuple[str, ...]
    prototype_tensor: Tensor
    full_precision_steps: int | None = None
    leaky_steps: int = 0
    facets: int = 1
    opposite: bool = False

    @property
    def total_steps(self) -> int:
        """The number of steps over all scales."""
        return len(self.recipe.sizes) * self.recipe.steps

    def random_draws(self, items: Sequence[int]) -> RandomDraws:
        """Return the random numbers of the given pictures; they do not depend on the rest of the batch."""
        return RandomDraws([self.picture_seed(self.objective.names[item]) for item in items])

    def transforms(self) -> list[Transform]:
        """Return the recipe's transforms."""
        return [TRANSFORMS[name](**dict(options)) for name, options in self.recipe.transforms]

    def parameterization(self, shape: Shape, start: Tensor | RandomDraws) -> Parameterization:
        """Return the recipe's parameterization of images of a shape."""
        name, options = self.recipe.parameterization
        count = len(start.generators) if isinstance(start, RandomDraws) else len(start)
        return PARAMETERIZATIONS[name]((count, *shape), start, self.prototype_tensor, **dict(options))

    def compared_photo(self, shape: Sequence[int]) -> Tensor | None:
        """Return the photo as a batch of a shape (n, c, h, w), if the objective compares pictures with it."""
        if not self.objective.compared:
            return None
        photo = self.start_image.photo
        assert photo is not None  # see `render.prepare`
        count, channels, height, width = shape
        return resize(photo, (channels, height, width)).to(self.prototype_tensor).expand(count, -1, -1, -1)

    def step_rule(self) -> StepRule:
        """Return the recipe's step rule."""
        name, options = self.recipe.step_rule
        return STEP_RULES[name](**dict(options))

    def is_bf16(self, step: int) -> bool:
        """Return whether a step, counted over all scales, runs in bfloat16."""
        return self.full_precision_steps is not None and step >= self.full_precision_steps

    def ascended(self, scores: Tensor, acts: Acts) -> Tensor:
        """Return what each picture ascends, (b,): its score or the negative, for facets less the diversity term."""
        signed = -scores if self.opposite else scores
        return kept_apart(signed, acts, self.facets) if self.facets > 1 else signed

    def with_weight_decay(self, gradient: Tensor, tensor: Tensor) -> Tensor:
        """Return the gradient with respect to the optimised tensor, less its weight decay."""
        return gradient - self.recipe.weight_decay * tensor.detach() if self.recipe.weight_decay else gradient

    def picture_seed(self, name: str) -> int:
        """Return the seed of one picture's random numbers."""
        text = f"{self.recipe.seed}/{'/'.join(self.layers)}/{name}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def ascend(read: ReadActivations, plan: AscentPlan, items: Sequence[int]) -> Iterator[Frame]:
    """Yield the frames of one batch during its ascent: the render loop."""
    recipe, draws, transforms, rule = plan.recipe, plan.random_draws(items), plan.transforms(), plan.step_rule()
    rows = torch.tensor(items, device=plan.prototype_tensor.device)
    done, image = 0, None
    for size in recipe.sizes:
        shape, start = plan.start_image.start(size, image, recipe.blur, draws)
        current, photo = plan.parameterization(shape, start), plan.compared_photo((len(items), *shape))
        state: State = None
        for step in range(recipe.steps):
            image = current.image()
            transformed = beside(image, photo)
            for transform in transforms:
                transformed = transform(transformed, draws)
            with LeakyReluGradients() if done < plan.leaky_steps else nullcontext():
                scores, ascended = score(read, plan, image, transformed, rows, plan.is_bf16(done))
            yield Frame(done, plan.total_steps, rows, scores.detach(), image.detach())
            # of the sum: each image's gradient is exactly what it would be alone
            gradient = torch.autograd.grad(ascended.sum(), current.tensor)[0]
            update, state = rule(plan.with_weight_decay(gradient, current.tensor), state)
            with torch.no_grad():
                current.tensor.add_(recipe.cooldown_factor(step) * update)
                current.project((step + 1) / recipe.steps)
            done += 1
        image = current.image().detach()
    yield finished_frame(read, plan, rows, image)


def score(
    read: ReadActivations, plan: AscentPlan, image: Tensor, transformed: Tensor, items: Tensor, bf16: bool
) -> tuple[Tensor, Tensor]:
    """Return the scores (b,) of images, and what they ascend (b,).

    The network sees them `transformed`, in bfloat16 or in its own dtype.
    """
    if bf16:
        with torch.autocast(transformed.device.type, torch.bfloat16):
            acts: Acts = {
                address: act if isinstance(address, MapOf) else act.to(transformed.dtype)
                for address, act in read_compared(read, plan.objective, transformed, items).items()
            }
    else:
        acts = read_compared(read, plan.objective, transformed, items)
    check_gradient_flows({address: act for address, act in acts.items() if not isinstance(address, InPhoto)})
    scores = plan.objective.score(acts, image, items)
    return scores, plan.ascended(scores, acts)


def beside(image: Tensor, photo: Tensor | None) -> Tensor:
    """Return images (b, c, h, w), and in c more channels the photo, which so undergoes the same transforms."""
    return image if photo is None else torch.cat([image, photo], 1)


def read_compared(read: ReadActivations, objective: Objective, images: Tensor, items: Tensor) -> Acts:
    """Return the activations of images, and those of the photos `beside` them that the objective compares with."""
    if not objective.compared:
        return read(images, items)
    pictures, photos = images.chunk(2, 1)
    with torch.no_grad():
        of_photos = read(photos, items)
    return {**read(pictures, items), **{InPhoto(address): of_photos[address] for address in objective.compared}}


def check_gradient_flows(acts: Acts) -> None:
    """Refuse layers from which no gradient flows back to the image."""
    for address, act in acts.items():
        if not act.requires_grad:
            name = repr(address) if address != "" else "the network's output"
            raise LayerRefused(
                f"no gradient flows from {name} back to the image: the network cuts it off; "
                "remove its torch.no_grad() or detach(), or choose an earlier layer"
            )


def finished_frame(read: ReadActivations, plan: AscentPlan, rows: Tensor, image: Tensor | None) -> Frame:
    """Return the last frame of an ascent: the finished image, scored without transforms."""
    assert image is not None  # a recipe has at least one step
    return Frame(plan.total_steps, plan.total_steps, rows, clean_scores(read, plan, image, rows), image)


def clean_scores(read: ReadActivations, plan: AscentPlan, image: Tensor, items: Tensor) -> Tensor:
    """Return the scores of images without transforms, in the network's own dtype."""
    seen = beside(image, plan.compared_photo(image.shape))
    with torch.no_grad():
        return plan.objective.score(read_compared(read, plan.objective, seen, items), image, items)


def resize(image: Tensor, shape: Shape) -> Tensor:
    """Return images at another size, bicubic as in R3, and smoothed first if they shrink."""
    shrinks = shape[-1] < image.shape[-1]
    return F.interpolate(image, shape[-2:], mode="bicubic", align_corners=False, antialias=shrinks)


def box_blur(image: Tensor, side: int) -> Tensor:
    """Return the mean over the `side` × `side` window around each pixel, mirrored at the border."""
    if side <= 1:
        return image
    before, after = side // 2, (side - 1) // 2
    return F.avg_pool2d(F.pad(image, [before, after, before, after], mode="reflect"), side, 1)
