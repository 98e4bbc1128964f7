"""Gradient ascent: gradients, batches, schedules of sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import phosphene as ph
from phosphene.rendering.gradient_ascent import StartImage, box_blur, resize
from phosphene.rendering.objectives import OUTPUT
from phosphene.rendering.parameterizations import PARAMETERIZATIONS
from phosphene.rendering.recipes import RECIPES, Recipe, choice
from phosphene.rendering.step_rules import STEP_RULES
from phosphene.rendering.transforms import RandomDraws

# modest steps, in what each tensor counts in: bytes, Fourier coefficients (which start at 0.01), radians
RATES = {"pixels": 1.0, "fourier": 0.0005, "maco": 0.05}

OBJECTIVES: dict[str, Callable[[], ph.Objective]] = {
    "channel": lambda: ph.channel("4", [0, 5]),
    "neuron": lambda: ph.neuron("4", [1, 6]),
    "direction": lambda: ph.direction("4", torch.eye(8)[:2] - torch.eye(8)[2:4]),
    "logit": lambda: ph.logit([0, 4]),
    "layer": lambda: ph.layer("4"),
    "total variation": lambda: -ph.total_variation(),
    "l1": lambda: -ph.l1(),
    "l2": lambda: -ph.l2(),
    "mixture": lambda: ph.channel("4", [0, 5]) - 0.1 * ph.total_variation() - 0.1 * ph.l2(),
}


@pytest.fixture
def model(small_net: nn.Sequential) -> ph.Model:
    return ph.load(small_net, input_size=32)


@pytest.mark.parametrize("step", STEP_RULES)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_the_score_of_every_objective_rises_within_three_steps(
    model: ph.Model, parameterization: str, step: str
) -> None:
    options = {"low": 0.3, "high": 0.7} if parameterization == "pixels" else {}
    recipe = Recipe(
        "test", "", (24,), 3, choice(parameterization, **options), choice(step, rate=RATES[parameterization])
    )
    for name, objective in OBJECTIVES.items():
        pictures = ph.render(model, objective(), recipe)
        assert bool((pictures.scores > pictures.start_scores).all()), (name, pictures.start_scores, pictures.scores)
        assert torch.equal(pictures.history[0], pictures.start_scores)
        # taking contrast away is what a regulariser alone is for
        assert not objective().layers or not bool(pictures.dead.any())


def reader(module: nn.Module) -> Callable[[Tensor], dict[str | int, Tensor]]:
    def read(image: Tensor) -> dict[str | int, Tensor]:
        return {"layer": module(image)}

    return read


@pytest.mark.parametrize("size", [16, 24, 32])
def test_the_gradient_of_an_image_in_a_batch_equals_its_gradient_alone_exactly(
    model: ph.Model, small_net: nn.Sequential, size: int
) -> None:
    images = torch.rand(5, 3, size, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    channels = [7, 0, 3, 3, 5]
    objective = ph.channel("layer", channels) - 0.3 * ph.total_variation()
    read = reader(small_net[:5])

    def gradient(chosen: list[int]) -> Tensor:
        image = images[chosen].requires_grad_()
        return torch.autograd.grad(objective.score(read(image), image, torch.tensor(chosen)).sum(), image)[0]

    together = gradient([0, 1, 2, 3, 4])
    for index in range(5):
        assert torch.equal(together[index : index + 1], gradient([index]))


@pytest.mark.parametrize("name", RECIPES)
def test_a_picture_alone_equals_the_same_picture_in_a_batch_exactly(model: ph.Model, name: str) -> None:
    recipe = RECIPES[name].with_settings(steps=3)
    recipe = dataclasses.replace(recipe, sizes=(16, 20, 24) if len(recipe.sizes) > 1 else (24,))
    together = ph.render(model, ph.channel("4", [6, 1, 4]), recipe)
    for index, channel in enumerate((6, 1, 4)):
        alone = ph.render(model, ph.channel("4", channel), recipe)
        assert torch.equal(alone.images[0], together.images[index])
        assert torch.equal(alone.history[:, 0], together.history[:, index])
        assert torch.equal(alone.scores[0], together.scores[index])


def test_pictures_differ_by_seed_layer_and_channel_and_by_nothing_else(model: ph.Model) -> None:
    def start(objective: ph.Objective, seed: int = 0) -> Tensor:
        frames: list[ph.Frame] = []
        ph.render(model, objective, "fast", size=16, steps=1, seed=seed, watch=frames.append)
        return frames[0].image[0]

    assert torch.equal(start(ph.channel("4", 2)), start(ph.neuron("4", 2)))
    starts = [
        start(ph.channel("4", 2)),
        start(ph.channel("4", 3)),
        start(ph.channel("0", 2)),
        start(ph.channel("4", 2), 1),
    ]
    for index, start_image in enumerate(starts):
        assert not any(torch.equal(start_image, earlier) for earlier in starts[:index])


def test_weight_decay_pulls_the_tensor_towards_zero() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.fill_(3.0)  # type: ignore[operator]
    recipe = Recipe(
        "test", "", (2,), 1, choice("pixels", unit="one", low=0.5, high=0.5), choice("momentum", rate=1.0, keep=0.0),
        weight_decay=2.0,
    )  # fmt: skip
    # the score is the mean of 3x over four pixels: 0.75 a pixel; less 2 · 0.5; divided by its size, -1
    pictures = ph.render(ph.load(net, input_size=2), ph.channel("0", 0), recipe)
    assert pictures.images.tolist() == [[[[pytest.approx(-0.5)] * 2] * 2]]


def test_frames_cover_the_whole_ascent(model: ph.Model) -> None:
    recipe = dataclasses.replace(RECIPES["multi-scale"], sizes=(12, 16), steps=2)
    frames: list[ph.Frame] = []
    pictures = ph.render(model, ph.channel("4", [2, 7, 1]), recipe, batch=2, watch=frames.append)
    assert [(frame.step, frame.steps) for frame in frames] == [(step, 4) for step in range(5)] * 2
    assert [frame.items.tolist() for frame in frames] == [[0, 1]] * 5 + [[2]] * 5
    assert [frame.image.shape[-1] for frame in frames[:5]] == [12, 12, 16, 16, 16]
    assert torch.equal(frames[4].image, pictures.images[:2])
    assert torch.equal(torch.stack([frame.scores for frame in frames[:4]]), pictures.history[:, :2])
    assert torch.equal(torch.cat([frames[4].scores, frames[9].scores]), pictures.scores)
    for frame in frames[:2]:
        acts = model.module[:5](frame.image)  # type: ignore[index]
        expected = torch.stack([acts[0, 2].mean(), acts[1, 7].mean()])
        assert torch.allclose(frame.scores, expected, rtol=1e-12, atol=0)


def test_each_picture_of_a_batch_is_scored_by_its_own_channel(model: ph.Model, small_net: nn.Sequential) -> None:
    pictures = ph.render(model, ph.channel("4", [6, 1, 4]), "rms", size=24, steps=8)
    means = small_net[:5](pictures.images).mean((2, 3))
    assert means[range(3), [6, 1, 4]].tolist() == pytest.approx(pictures.scores.tolist(), rel=1e-12)


def test_a_network_without_gradient_is_refused(small_net: nn.Sequential) -> None:
    class Closed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_net

        @torch.no_grad()
        def forward(self, image: Tensor) -> Tensor:
            result: Tensor = self.inner(image)
            return result

    model = ph.load(Closed(), input_size=32)
    refused = r"no gradient flows from 'inner\.4' back to the image"
    for objective in (ph.channel("inner.4", 0), ph.channel("inner.4", 0) - ph.l2()):
        with pytest.raises(ph.errors.LayerRefused, match=refused):
            ph.render(model, objective, "fast", size=16)
    with pytest.raises(ph.errors.LayerRefused, match="no gradient flows from the network's output"):
        ph.render(model, ph.logit(0, OUTPUT), "fast", size=16)


def test_a_start_image_keeps_the_proportions_of_a_photo() -> None:
    assert StartImage(3).shape(20) == (3, 20, 20)
    assert StartImage(3, torch.zeros(1, 3, 40, 60)).shape(20) == (3, 20, 30)
    assert StartImage(1, sides=(64, 32)).shape(32) == (1, 64, 32)


def test_over_a_photo_only_what_was_added_is_enlarged() -> None:
    generator = torch.Generator().manual_seed(0)
    photo = torch.rand(1, 3, 24, 36, generator=generator, dtype=torch.float64)
    start_image, draws = StartImage(3, photo), RandomDraws([0])
    _, first = start_image.start(12, None, 0, draws)
    assert isinstance(first, Tensor)
    assert torch.equal(first, resize(photo, (3, 12, 18)))
    _, untouched = start_image.start(24, first, 0, draws)
    assert isinstance(untouched, Tensor)
    assert torch.allclose(untouched, photo, atol=1e-14)  # with nothing added, the photo in full detail
    _, brighter = start_image.start(24, first + 0.25, 0, draws)
    assert isinstance(brighter, Tensor)
    assert torch.allclose(brighter, photo + 0.25, atol=1e-12)


@pytest.mark.parametrize("side", [0, 1])
def test_a_box_blur_of_one_pixel_changes_nothing(side: int) -> None:
    image = torch.rand(1, 1, 5, 5)
    assert torch.equal(box_blur(image, side), image)


def test_a_box_blur_by_hand() -> None:
    row = torch.tensor([[[[0.0, 3.0, 6.0, 30.0]] * 4]])
    # mirrored without repeating the border: 3 | 0 3 6 30 | 6
    assert box_blur(row, 3)[0, 0, 0].tolist() == pytest.approx([2.0, 3.0, 13.0, 14.0])
    # a window of two pixels: the one before and the pixel itself
    assert box_blur(row, 2)[0, 0, 0].tolist() == pytest.approx([1.5, 1.5, 4.5, 18.0])
