"""Step rules: how a gradient becomes an update, `rule(gradient, state) -> (update, state)`.

The gradient is that of the score, so an update is ADDED. Every statistic is taken per image: gradients are (n, ...) and
row k never depends on another row. A rule keeps its `state` between steps; it is None at the start of each scale.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, zeros_like

from phosphene.errors import InvalidRequest

State = dict[str, Any] | None
StepRule = Callable[[Tensor, State], tuple[Tensor, State]]


def image_mean(values: Tensor) -> Tensor:
    """Return the mean of each image, (n, 1, ...), one axis after the other.

    A mean over all axes at once is split over threads if the batch is one image, and then it rounds differently.
    """
    for axis in range(values.dim() - 1, 0, -1):
        values = values.mean(axis, keepdim=True)
    return values


def root_mean_square(gradient: Tensor) -> Tensor:
    """Return the root mean square of each image's gradient, (n, 1, ...)."""
    return image_mean(gradient.square()).sqrt()


def max_step(rate: float, epsilon: float = 1e-8) -> StepRule:
    """Divide by the signed maximum: rate · g / (max(g) + 1e-8) (R1, step 3)."""
    return lambda g, state: (rate * g / (g.amax(tuple(range(1, g.dim())), keepdim=True) + epsilon), state)


def std_step(rate: float, epsilon: float = 1e-8) -> StepRule:
    """Divide by the (population) standard deviation: rate · g / (std(g) + 1e-8) (R1, the variant of step 3)."""
    return lambda g, state: (rate * g / (root_mean_square(g - image_mean(g)) + epsilon), state)


def rms_step(rate: float, epsilon: float = 1e-5) -> StepRule:
    """Divide by the root mean square: rate · g / (sqrt(mean(g²)) + 1e-5) (R4.2)."""
    return lambda g, state: (rate * g / (root_mean_square(g) + epsilon), state)


def window_mean(values: Tensor, window: int) -> Tensor:
    """Return the mean over the `window` × `window` entries around each, (n, c, h, w) or (n, c, h, w, 2).

    The latter are coefficients of a spectrum, whose real and imaginary parts count together. Only entries inside count.
    """
    planes = (values[..., 0] + values[..., 1]) / 2 if values.dim() == 5 else values
    mean = F.avg_pool2d(planes, window, stride=1, padding=window // 2, count_include_pad=False)
    return mean[..., None] if values.dim() == 5 else mean


def adam(rate: float, betas: tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-8, window: int = 1) -> StepRule:
    """Adam (Kingma & Ba, ICLR 2015, algorithm 1), as ascent.

    With a `window` above 1, an odd number, it divides by the geometric mean of each entry's root mean square and that
    of the window around it: a second moment over a few steps is a rough estimate, and neighbouring entries estimate
    about the same value.
    """
    if window < 1 or window % 2 == 0:
        raise InvalidRequest(f"the window of a step rule is an odd number of entries, not {window}")

    def rule(gradient: Tensor, state: State) -> tuple[Tensor, State]:
        state = state or {"count": 0, "mean": zeros_like(gradient), "square": zeros_like(gradient)}
        count = state["count"] + 1
        mean = betas[0] * state["mean"] + (1 - betas[0]) * gradient
        square = betas[1] * state["square"] + (1 - betas[1]) * gradient.square()
        rms = (square / (1 - betas[1] ** count)).sqrt()
        if window > 1:
            rms = (rms * window_mean(rms.square(), window).sqrt()).sqrt()
        update = rate * (mean / (1 - betas[0] ** count)) / (rms + epsilon)
        return update, {"count": count, "mean": mean, "square": square}

    return rule


def normalised_adam(
    rate: float, betas: tuple[float, float] = (0.5, 0.9), epsilon: float = 1e-8, window: int = 1
) -> StepRule:
    """Adam on the gradient divided by its root mean square, so that all steps of an image weigh the same."""
    inner = adam(rate, betas, epsilon, window)
    return lambda g, state: inner(g / (root_mean_square(g) + 1e-30), state)


def momentum(rate: float, keep: float = 0.9, epsilon: float = 1e-30) -> StepRule:
    """Heavy-ball momentum on the gradient divided by its root mean square: v = keep · v + (1 − keep) · g / rms(g)."""

    def rule(gradient: Tensor, state: State) -> tuple[Tensor, State]:
        velocity = (1 - keep) * gradient / (root_mean_square(gradient) + epsilon)
        if state:
            velocity = velocity + keep * state["velocity"]
        return rate * velocity, {"velocity": velocity}

    return rule


STEP_RULES: dict[str, Callable[..., StepRule]] = {
    "max": max_step,
    "std": std_step,
    "rms": rms_step,
    "adam": adam,
    "normalised-adam": normalised_adam,
    "momentum": momentum,
}
