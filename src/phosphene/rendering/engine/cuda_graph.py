"""Gradient ascent on a GPU: one step as a captured graph, which the host only has to launch.

A step of the plain loop (`gradient_ascent.ascend`) is some hundred small operations, and a GPU waits for each launch.
Here everything that changes from step to step lies on the device: the random numbers of all steps, drawn in advance
from the same generators in the same order, the cooldown factors, the state of the step rule and the number of the step.
So every step runs the same operations on the same memory; they are captured once for each batch, scale and number
format, and replayed (R2.1: the whole loop inside the graph). The frames are those of the plain loop within rounding.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from phosphene.rendering.gradient_ascent import AscentPlan, Frame, ReadActivations, beside, finished_frame, score
from phosphene.rendering.parameterizations import Parameterization
from phosphene.rendering.transforms import RandomDraws, Transform

Capture = Callable[[Callable[[], None]], Callable[[], None]]


def cuda_graph(step: Callable[[], None]) -> Callable[[], None]:
    """Return the replay of a step's graph, or the step itself if the network does something no graph can hold."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # such as a value that Python reads in the middle of a pass
        return step
    return graph.replay


def ascend_with_cuda_graph(
    read: ReadActivations, plan: AscentPlan, items: Sequence[int], capture: Capture = cuda_graph
) -> Iterator[Frame]:
    """Yield the frames of one batch as `gradient_ascent.ascend` does; `capture` makes the function that replays one."""
    recipe, draws = plan.recipe, plan.random_draws(items)
    rows = torch.tensor(items, device=plan.prototype_tensor.device)
    done, image = 0, None
    for size in recipe.sizes:
        shape, start = plan.start_image.start(size, image, recipe.blur, draws)
        steps = GraphedSteps(read, plan, rows, plan.parameterization(shape, start), draws)
        repeat, bf16 = steps.run, None
        for step in range(recipe.steps):
            if bf16 is not plan.is_bf16(done):  # another number format needs another graph
                bf16 = steps.bf16 = plan.is_bf16(done)
                steps.run()  # without a graph: caches are filled now
                repeat = capture(steps.run) if step < recipe.steps - 1 else steps.run
            else:
                repeat()
            yield Frame(done, plan.total_steps, rows, steps.scores.clone(), steps.image.clone())
            done += 1
        image = steps.current.image().detach()
    yield finished_frame(read, plan, rows, image)


class GraphedSteps:
    """The steps at one scale, and the memory that they work in.

    Attributes:
        current: what is optimised.
        scores, image: of the images before the last step.
        bf16: whether steps run in bfloat16, not in the network's own dtype.
    """

    def __init__(
        self, read: ReadActivations, plan: AscentPlan, rows: Tensor, current: Parameterization, draws: RandomDraws
    ) -> None:
        self.read, self.plan, self.rows, self.current = read, plan, rows, current
        recipe, device = plan.recipe, plan.prototype_tensor.device
        self.transforms, self.rule, self.bf16 = plan.transforms(), plan.step_rule(), False
        self.image = current.image().detach()
        self.photo = plan.compared_photo(self.image.shape)
        self.scores = self.image.new_zeros(len(rows))
        self.step_number = torch.zeros(1, dtype=torch.long, device=device)
        factors = [recipe.cooldown_factor(step) for step in range(recipe.steps)]
        self.cooldown_factors = torch.tensor(factors, dtype=torch.float64).to(device, self.image.dtype)
        self.random_numbers = PredrawnNumbers(draws, self.transforms, self.image, recipe.steps, self.step_number)
        self.state: dict[str, Any] | None = None

    def run(self) -> None:
        """Run a step without waiting for the device; only the values in memory depend on which step it is."""
        image = self.current.image()
        transformed = beside(image, self.photo)
        self.random_numbers.next = 0
        for transform in self.transforms:
            transformed = transform(transformed, self.random_numbers)
        scores, ascended = score(self.read, self.plan, image, transformed, self.rows, self.bf16)
        gradient = torch.autograd.grad(ascended.sum(), self.current.tensor)[0]
        update, state = self.rule(self.plan.with_weight_decay(gradient, self.current.tensor), self.state)
        with torch.no_grad():
            self.image.copy_(image)
            self.scores.copy_(scores)
            self.current.tensor.add_(self.cooldown_factors.index_select(0, self.step_number) * update)
            self.store_state(state or {})
            self.step_number.add_(1)
            self.current.project(self.step_number.to(update.dtype) / self.plan.recipe.steps)

    def store_state(self, state: dict[str, Any]) -> None:
        """Store the state of the step rule in the same memory at every step; numbers are float64, as Python's are."""
        if self.state is None:
            device = self.step_number.device
            self.state = {
                name: value.clone()
                if isinstance(value, Tensor)
                else torch.tensor(value, dtype=torch.float64).to(device)
                for name, value in state.items()
            }
            return
        for name, value in state.items():
            self.state[name].copy_(value)


class PredrawnNumbers(RandomDraws):
    """The random numbers of all steps, drawn in advance: each draw of a step reads its row of a table.

    They equal the numbers of the plain loop, since a generator's next number does not depend on how many are drawn at
    once. A first run of the transforms shows how many numbers a step draws, and in which order.
    """

    def __init__(
        self, draws: RandomDraws, transforms: Sequence[Transform], image: Tensor, steps: int, step_number: Tensor
    ) -> None:
        self.generators, self.step_number, self.next = draws.generators, step_number, 0
        self.requests: list[tuple[float, float, tuple[int, ...]]] = []
        self.tables: list[Tensor] | None = None
        with torch.no_grad():
            for transform in transforms:
                image = transform(image, self)
        counts = [math.prod(shape) for _, _, shape in self.requests]
        rows = [
            torch.rand(steps, sum(counts), generator=generator, dtype=torch.float64) for generator in self.generators
        ]
        pieces = torch.split(torch.stack(rows, 1), counts, -1)  # (steps, n, ·)
        self.tables = [
            (piece.reshape(steps, len(rows), *shape) * (high - low) + low).to(step_number.device)
            for piece, (low, high, shape) in zip(pieces, self.requests, strict=True)
        ]

    def uniform(self, low: float, high: float, shape: tuple[int, ...] = ()) -> Tensor:
        """Return (n, *shape) numbers uniform in [low, high), float64 on the device."""
        if self.tables is None:  # the first run
            self.requests.append((low, high, shape))
            return torch.full(
                (len(self.generators), *shape), (low + high) / 2, dtype=torch.float64, device=self.step_number.device
            )
        self.next += 1
        return self.tables[self.next - 1].index_select(0, self.step_number)[0]
