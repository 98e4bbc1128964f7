"""The climb on a GPU: one step as one captured graph, which the host only has to start.

A step of the plain loop (`ascent.climb`) is some hundred small operations, and a GPU waits for each of them to be
launched. Here everything that changes from step to step lies on the device: the random numbers of all steps, drawn in
advance from the same generators in the same order, the pace, the state of the step rule and the number of the step. A
step then is always the same operations on the same memory, which is captured once for each batch, scale and number
format and replayed (R2.1: the whole loop inside the graph). The frames are those of the plain loop within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from phosphene.rendering.gradient_ascent import (
    AscentPlan,
    Frame,
    ReadActivations,
    ascent_direction,
    clean_scores,
    score,
)
from phosphene.rendering.parameterizations import Parameterization
from phosphene.rendering.transforms import RandomDraws, Transform

Capture = Callable[[Callable[[], None]], Callable[[], None]]


def cuda_graph(step: Callable[[], None]) -> Callable[[], None]:
    """Return what repeats a step on the GPU; the step itself where a network does what no graph can hold."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # such as a value that Python looks at in the middle of a pass
        return step
    return graph.replay


def ascend_with_cuda_graph(
    read: ReadActivations, plan: AscentPlan, items: Sequence[int], capture: Capture = cuda_graph
) -> Iterator[Frame]:
    """Yield the frames of one batch as `ascent.climb` does; `capture` returns what repeats a step."""
    recipe, draws = plan.recipe, plan.draws(items)
    rows = torch.tensor(items, device=plan.like.device)
    total, done, image = len(recipe.sizes) * recipe.steps, 0, None
    for size in recipe.sizes:
        shape, start = plan.base.start(size, image, recipe.blur, draws)
        steps = GraphedSteps(read, plan, rows, plan.parameterization(shape, start), draws)
        repeat, was_exact = steps.make, None
        for _ in range(recipe.steps):
            if was_exact is not plan.is_exact(done):  # a number format of its own is another graph
                was_exact = plan.is_exact(done)
                steps.begin(was_exact)  # this step is made at once: all that is found once is found now
                repeat = capture(steps.make) if steps.left > 1 else steps.make
            else:
                repeat()
            steps.left -= 1
            yield Frame(done, total, rows, steps.scores.clone(), steps.image.clone())
            done += 1
        image = steps.current.image().detach()
    assert image is not None
    yield Frame(total, total, rows, clean_scores(read, plan.objective, image, rows), image)


class GraphedSteps:
    """The steps at one scale, and the memory that they work in.

    Attributes:
        current: what is optimised.
        scores, image: of the images before the last step made.
        left: how many steps are to come.
    """

    def __init__(
        self, read: ReadActivations, plan: AscentPlan, rows: Tensor, current: Parameterization, draws: RandomDraws
    ) -> None:
        self.read, self.plan, self.rows, self.current = read, plan, rows, current
        recipe, device = plan.recipe, plan.like.device
        self.transforms, self.rule, self.left, self.exact = plan.transforms(), plan.step_rule(), recipe.steps, True
        self.image = current.image().detach()
        self.scores = self.image.new_zeros(len(rows))
        self.number = torch.zeros(1, dtype=torch.long, device=device)
        pace = [recipe.pace(step) for step in range(recipe.steps)]
        self.pace = torch.tensor(pace, dtype=torch.float64).to(device, self.image.dtype)
        self.drawn = PredrawnNumbers(draws, self.transforms, self.image, recipe.steps, self.number)
        self.state: dict[str, Any] | None = None

    def begin(self, exact: bool) -> None:
        """Make a step, and go on in this number format."""
        self.exact = exact
        self.make()

    def make(self) -> None:
        """Make a step: nothing in here waits for the device, or depends on which step it is but by what lies there."""
        image = self.current.image()
        seen = image
        self.drawn.next = 0
        for transform in self.transforms:
            seen = transform(seen, self.drawn)
        scores = score(self.read, self.plan.objective, image, seen, self.rows, self.exact)
        gradient = ascent_direction(scores, self.current.tensor, self.plan.recipe.weight_decay)
        update, state = self.rule(gradient, self.state)
        with torch.no_grad():
            self.image.copy_(image)
            self.scores.copy_(scores)
            self.current.tensor.add_(self.pace.index_select(0, self.number) * update)
            self.keep(state or {})
            self.number.add_(1)

    def keep(self, state: dict[str, Any]) -> None:
        """Keep the state of the step rule, numbers too, where it lay before."""
        if self.state is None:
            self.state = {name: self.laid(value) for name, value in state.items()}
        else:
            for name, value in state.items():
                self.state[name].copy_(value)

    def laid(self, value: Tensor | float) -> Tensor:
        """Return memory for a part of the state that holds it now; a number is float64, as Python's are."""
        if isinstance(value, Tensor):
            return value.clone()
        return torch.tensor(value, dtype=torch.float64).to(self.number.device)


class PredrawnNumbers(RandomDraws):
    """The random numbers of all steps, drawn in advance: each draw of a step reads its row of a table.

    They are the numbers that the plain loop draws, since a generator's next number does not depend on how many are
    asked for at once. What is drawn at a step, and in which order, is found by letting the transforms draw once.
    """

    def __init__(
        self, draws: RandomDraws, transforms: Sequence[Transform], image: Tensor, steps: int, number: Tensor
    ) -> None:
        self.generators, self.number, self.next = draws.generators, number, 0
        self.wishes: list[tuple[float, float, tuple[int, ...]]] = []
        self.tables: list[Tensor] | None = None
        with torch.no_grad():
            for transform in transforms:
                image = transform(image, self)
        counts = [math.prod(shape) for _, _, shape in self.wishes]
        rows = [torch.rand(steps, sum(counts), generator=one, dtype=torch.float64) for one in self.generators]
        pieces = torch.split(torch.stack(rows, 1), counts, -1)  # (steps, n, ·)
        self.tables = [
            (piece.reshape(steps, len(rows), *shape) * (high - low) + low).to(number.device)
            for piece, (low, high, shape) in zip(pieces, self.wishes, strict=True)
        ]

    def uniform(self, low: float, high: float, shape: tuple[int, ...] = ()) -> Tensor:
        """Return (n, *shape) numbers uniform in [low, high), float64 on the device."""
        if self.tables is None:  # while it is found out what will be drawn
            self.wishes.append((low, high, shape))
            return torch.full(
                (len(self.generators), *shape), (low + high) / 2, dtype=torch.float64, device=self.number.device
            )
        self.next += 1
        return self.tables[self.next - 1].index_select(0, self.number)[0]
