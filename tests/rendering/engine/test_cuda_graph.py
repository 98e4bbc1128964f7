"""Gradient ascent on a GPU: the same frames as the plain loop, from steps that can be captured.

Where there is no GPU, `Recording` stands in for its graphs: it notes the operations of one step with the memory that
they read and write, undoes what they did, and repeats them without running any Python of the step. So a number that
would be frozen into a graph is frozen there too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import phosphene as ph
from phosphene.rendering.engine.cuda_graph import GraphedSteps, PredrawnNumbers, ascend_with_cuda_graph, cuda_graph
from phosphene.rendering.engine.forward import fast_forward_pass
from phosphene.rendering.facets import with_facets
from phosphene.rendering.gradient_ascent import AscentPlan, Frame, StartImage, ascend
from phosphene.rendering.photo_objectives import accent, caricature, perceptual_distance
from phosphene.rendering.recipes import RECIPES, Recipe, choice
from phosphene.rendering.transforms import RandomDraws, affine, jitter

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operations of one step, which `repeat` carries out again on the same memory."""

    def __init__(self, step: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []
        with self:
            step()
        for tensor, value in reversed(self.before):  # capturing carries nothing out
            tensor.detach().copy_(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = [
            tensor
            for tensor, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        self.before += [(tensor, tensor.detach().clone()) for tensor in written]
        output = func(*args, **kwargs)
        self.made.append((func, args, kwargs, output))
        return output

    def repeat(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, output in self.made:
                new = func(*args, **kwargs)
                olds, news = (
                    list(outputs) if isinstance(outputs, list | tuple) else [outputs] for outputs in (output, new)
                )
                for old, value in zip(olds, news, strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != value.data_ptr():
                        old.detach().copy_(value)


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    return Recording(step).repeat


def as_it_is(step: Callable[[], None]) -> Callable[[], None]:
    return step


def frames(
    model: ph.Model,
    objective: ph.Objective,
    recipe: Recipe,
    loop: Any,
    exact: int | None = None,
    facets: int = 1,
    opposite: bool = False,
    photo: Tensor | None = None,
) -> list[Frame]:
    objective = with_facets(objective, facets, opposite)
    with fast_forward_pass(model, objective, maps=facets > 1) as (read, _):
        plan = AscentPlan(
            objective,
            recipe,
            StartImage(3, photo),
            ("layer",),
            model.prototype_tensor,
            exact,
            facets=facets,
            opposite=opposite,
        )
        return list(loop(read, plan, range(objective.n)))


def assert_same(ours: list[Frame], plain: list[Frame], tolerance: float) -> None:
    assert [(frame.step, frame.steps) for frame in ours] == [(frame.step, frame.steps) for frame in plain]
    for frame, plain_frame in zip(ours, plain, strict=True):
        assert torch.equal(frame.items, plain_frame.items)
        torch.testing.assert_close(frame.scores, plain_frame.scores, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(frame.image, plain_frame.image, rtol=tolerance, atol=tolerance)


RULES = {
    "fourier": RECIPES["fourier"],
    "momentum": dataclasses.replace(RECIPES["fourier"], step_rule=choice("momentum", rate=0.1)),
    "maco": RECIPES["maco"],
    "rms": RECIPES["rms"],
    "max-step": RECIPES["max-step"],
    "multi-scale": dataclasses.replace(RECIPES["multi-scale"], sizes=(16, 20, 24)),
    "dream": dataclasses.replace(RECIPES["dream"], sizes=(18, 24)),
    "all transforms": dataclasses.replace(
        RECIPES["fourier"],
        transforms=(
            choice("scale"),
            choice("rotate"),
            choice("jitter", pixels=3),
            choice("pad", pixels=2),
            choice("blur"),
        ),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_frames_are_those_of_the_plain_loop(small_net: nn.Sequential, name: str) -> None:
    model = ph.load(small_net, input_size=32)
    recipe = RULES[name].with_settings(size=24, steps=6)
    objective = ph.channel("4", [0, 5, 3]) - 0.1 * ph.total_variation()
    plain = frames(model, objective, recipe, ascend)
    assert_same(frames(model, objective, recipe, partial(ascend_with_cuda_graph, capture=recorded)), plain, 1e-9)
    uncaptured = frames(model, objective, recipe, partial(ascend_with_cuda_graph, capture=as_it_is))
    assert_same(uncaptured, plain, 1e-9)


def test_other_objectives_and_a_direction(small_net: nn.Sequential) -> None:
    model = ph.load(small_net, input_size=32)
    for objective in (
        ph.neuron("4", [1, 2]),
        ph.direction("4", torch.eye(8)[:2]),
        ph.logit([0, 4]),
        ph.layer("4"),
    ):
        recipe = RECIPES["fast"].with_settings(size=32, steps=5)
        ours = frames(model, objective, recipe, partial(ascend_with_cuda_graph, capture=recorded))
        assert_same(ours, frames(model, objective, recipe, ascend), 1e-9)


@pytest.mark.parametrize("opposite", [False, True])
def test_facets_and_opposites(small_net: nn.Sequential, opposite: bool) -> None:
    model, recipe = ph.load(small_net, input_size=32), RECIPES["fast"].with_settings(size=24, steps=5)
    plain, ours = (
        frames(model, ph.channel("4", [0, 5]), recipe, loop, facets=2, opposite=opposite)
        for loop in (ascend, partial(ascend_with_cuda_graph, capture=recorded))
    )
    assert_same(ours, plain, 1e-9)


def test_pictures_that_are_compared_with_their_photo(small_net: nn.Sequential) -> None:
    model = ph.load(small_net, input_size=32)
    photo = torch.rand(1, 3, 30, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for recipe in (RULES["dream"].with_settings(steps=3), RECIPES["accentuate"].with_settings(24, 5)):
        for objective in (accent("4", 2) - 0.5 * perceptual_distance("0"), caricature("4")):
            ours = frames(model, objective, recipe, partial(ascend_with_cuda_graph, capture=recorded), photo=photo)
            assert_same(ours, frames(model, objective, recipe, ascend, photo=photo), 1e-9)


def test_each_number_format_and_scale_is_captured_on_its_own(small_net: nn.Sequential) -> None:
    model = ph.load(small_net.float(), input_size=32)
    captured: list[int] = []

    def counted(step: Callable[[], None]) -> Callable[[], None]:
        captured.append(1)
        return recorded(step)

    recipe = dataclasses.replace(RECIPES["multi-scale"], sizes=(16, 24), steps=5)
    objective = ph.channel("4", [0, 1])
    low = frames(model, objective, recipe, partial(ascend_with_cuda_graph, capture=counted), exact=3)
    assert len(captured) == 3  # float32 and bfloat16 at the first scale, bfloat16 at the second
    plain = frames(model, objective, recipe, ascend, exact=3)
    # in float32 the two agree to rounding; from there on bfloat16 may turn that into its own rounding
    assert_same([*low[:3]], [*plain[:3]], 1e-5)
    for frame, plain_frame in zip(low, plain, strict=True):
        torch.testing.assert_close(frame.scores, plain_frame.scores, rtol=0.02, atol=0.02)


class Forbidding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what a graph cannot hold: to look at a value, to bring a number from Python, to move to a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero", "aten::equal"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "facets"), [*((name, 1) for name in RULES), ("fourier", 2)])
def test_a_repeated_step_asks_the_host_for_nothing(small_net: nn.Sequential, name: str, facets: int) -> None:
    model = ph.load(small_net, mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.3], input_size=32)
    objective = with_facets(ph.channel("4", [0, 5]) + ph.direction("4", torch.eye(8)[:2]), facets)
    with fast_forward_pass(model, objective, ("folded",), maps=facets > 1) as (read, _):
        recipe = RULES[name].with_settings(size=24, steps=6)
        plan = AscentPlan(objective, recipe, StartImage(3), ("layer",), model.prototype_tensor, facets=facets)
        draws = plan.random_draws([0, 1])
        shape, start = plan.start_image.start(24, None, 0, draws)
        steps = GraphedSteps(read, plan, torch.tensor([0, 1]), plan.parameterization(shape, start), draws)
        steps.run()
        with Forbidding():  # type: ignore[no-untyped-call]
            steps.run()
    assert steps.step_number.item() == 2


def test_numbers_drawn_in_advance_are_those_drawn_one_by_one() -> None:
    transforms = [affine(4, 8, 0.1), jitter(5)]
    image, number = torch.zeros(3, 1, 8, 8, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    one_by_one, seeds = RandomDraws([7, 8, 9]), [7, 8, 9]
    advance = PredrawnNumbers(RandomDraws(seeds), transforms, image, 20, number)
    for step in range(20):
        number.fill_(step)
        advance.next = 0
        for low, high, shape in ((-4.0, 4.0, (2,)), (-1.0, 1.0, ()), (-1.0, 1.0, ()), (-5.0, 6.0, (2,))):
            assert torch.equal(advance.uniform(low, high, shape), one_by_one.uniform(low, high, shape))
    # and the generators stand where the plain loop leaves them
    assert torch.equal(RandomDraws.normal(advance, (4,)), one_by_one.normal((4,)))


@gpu
@pytest.mark.parametrize("name", RULES)
def test_a_gpu_makes_the_frames_of_the_plain_loop(small_net: nn.Sequential, name: str) -> None:
    model = ph.load(small_net.cuda(), input_size=32)
    recipe = RULES[name].with_settings(size=24, steps=6)
    objective = ph.channel("4", [0, 5, 3])
    assert_same(
        frames(model, objective, recipe, ascend_with_cuda_graph), frames(model, objective, recipe, ascend), 1e-9
    )


@gpu
def test_a_gpu_repeats_a_graph_and_not_python(small_net: nn.Sequential) -> None:
    model = ph.load(small_net.cuda(), input_size=32)
    runs: list[int] = []
    handle = small_net[2].register_forward_hook(lambda *_: runs.append(1))
    pictures = ph.render(model, ph.channel("4", [0, 1]), "fast", size=32, steps=50)
    handle.remove()
    assert len(runs) < 10
    on_cpu = ph.render(ph.load(small_net.cpu(), input_size=32), ph.channel("4", [0, 1]), "fast", size=32, steps=50)
    torch.testing.assert_close(pictures.scores, on_cpu.scores, rtol=1e-6, atol=1e-6)


@gpu
def test_a_network_that_looks_at_values_is_rendered_without_a_graph() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 4, 3)

        def forward(self, image: Tensor) -> Tensor:
            made: Tensor = self.convolution(image)
            return made * 2 if float(made.mean()) > 0 else made

    net = Looking().cuda().double()
    pictures = ph.render(ph.load(net, input_size=32), ph.layer(""), "fast", size=32, steps=4)
    assert bool((pictures.scores > pictures.start_scores).all())
    count = torch.zeros(1, device="cuda")

    def add() -> None:
        count.add_(1)

    repeat = cuda_graph(add)  # and the next capture is a sound one
    assert repeat is not add
    repeat()
    assert count.item() == 1
