"""Gradients through rectifiers that give 0: the values stay, the gradient goes on, and dead filters revive."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import phosphene as ph
from phosphene.rendering.relu_gradients import NEGATIVE_SLOPE, LeakyReluGradients

SEEN = [-3.0, -1.0, 0.0, 0.5, 4.0, 9.0]
L = NEGATIVE_SLOPE
# what each gives for SEEN, and the slope that passes there: little below, 1 within, 0 above
RECTIFIERS: dict[str, tuple[Callable[[Tensor], Tensor], list[float], list[float]]] = {
    "relu": (F.relu, [0, 0, 0, 0.5, 4, 9], [L, L, L, 1, 1, 1]),
    "relu in place": (lambda x: F.relu(x, inplace=True), [0, 0, 0, 0.5, 4, 9], [L, L, L, 1, 1, 1]),
    "torch.relu": (torch.relu, [0, 0, 0, 0.5, 4, 9], [L, L, L, 1, 1, 1]),
    "method": (lambda x: x.relu(), [0, 0, 0, 0.5, 4, 9], [L, L, L, 1, 1, 1]),
    "method in place": (lambda x: x.relu_(), [0, 0, 0, 0.5, 4, 9], [L, L, L, 1, 1, 1]),
    "module": (nn.ReLU(inplace=True), [0, 0, 0, 0.5, 4, 9], [L, L, L, 1, 1, 1]),
    "relu6": (F.relu6, [0, 0, 0, 0.5, 4, 6], [L, L, L, 1, 1, 0]),
    "relu6 module": (nn.ReLU6(inplace=True), [0, 0, 0, 0.5, 4, 6], [L, L, L, 1, 1, 0]),
    "hardtanh": (lambda x: F.hardtanh(x, -2.0, 3.0), [-2, -1, 0, 0.5, 3, 3], [L, 1, 1, 1, 0, 0]),
    "hardtanh by name": (
        lambda x: F.hardtanh(x, max_val=3.0, min_val=-2.0),
        [-2, -1, 0, 0.5, 3, 3],
        [L, 1, 1, 1, 0, 0],
    ),
}


@pytest.mark.parametrize("name", RECTIFIERS)
def test_values_stay_and_slopes_pass_where_they_are_cut_off_below(name: str) -> None:
    rectifier, values, slopes = RECTIFIERS[name]
    leaf = torch.tensor(SEEN, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([2.0, 3, 5, 7, 11, 13], dtype=torch.float64)
    with LeakyReluGradients():
        result = rectifier(leaf.clone())
        (slope,) = torch.autograd.grad((weights * result).sum(), leaf)
    assert result.tolist() == values
    assert slope.tolist() == [
        NEGATIVE_SLOPE * a if b == L else a * b for a, b in zip(weights.tolist(), slopes, strict=True)
    ]


def test_other_functions_are_left_alone() -> None:
    leaf = torch.tensor(SEEN, requires_grad=True)
    with LeakyReluGradients():
        silent = torch.autograd.grad(F.gelu(leaf).sum() + leaf.clamp(min=0).sum() + leaf.exp().sum(), leaf)[0]
    expected = torch.autograd.grad(F.gelu(leaf).sum() + leaf.clamp(min=0).sum() + leaf.exp().sum(), leaf)[0]
    assert torch.equal(silent, expected)


def dead_filter_net() -> nn.Sequential:
    """Return a network whose filter 1 sees, in faint noise, only what a ReLU has cut off; 0 and 2 see the rest."""
    first, second = nn.Conv2d(3, 3, 3, padding=1).double(), nn.Conv2d(3, 3, 1, groups=3).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        first.weight.copy_(torch.randn(3, 3, 3, 3, generator=generator, dtype=torch.float64))
        cast(Tensor, first.bias).copy_(torch.tensor([6.0, -4.0, 6.0]) - 0.5 * first.weight.sum((1, 2, 3)))
        second.weight.fill_(1.0)
        cast(Tensor, second.bias).zero_()
    return nn.Sequential(first, nn.ReLU6(inplace=True), second).eval()


def test_a_filter_that_sees_only_zeros_at_the_start_is_revived_and_the_others_stay_as_they_are() -> None:
    model = ph.load(dead_filter_net(), input_size=24)
    drawn = ph.render(model, ph.channel("2", range(3)), "vivid", size=24, steps=24)
    assert drawn.start_scores[1] == 0
    assert drawn.scores[1] > 0.02
    assert drawn.history[0, 1] == 0
    assert drawn.dead.tolist() == [False] * 3
    assert drawn.spec["woken"] == ["filter_1"]
    alone = ph.render(model, ph.channel("2", [0, 2]), "vivid", size=24, steps=24)
    assert "woken" not in alone.spec
    assert torch.allclose(drawn.images[[0, 2]], alone.images, atol=1e-12, rtol=0)


def test_a_revived_picture_has_its_own_film_and_history() -> None:
    model = ph.load(dead_filter_net(), input_size=24)
    drawn = ph.render(model, ph.channel("2", range(3)), "vivid", size=24, steps=24, film=4)
    assert torch.equal(drawn.moments[-1], drawn.images)
    first = model.module.get_submodule("0")
    with torch.no_grad():
        under = first(drawn.moments[0][1:2])[0, 1]
    assert bool((under < 0).all())  # at the start all of it lies below the ReLU
    assert bool((drawn.history[:, 1] > 0).any())
    assert drawn.history.shape == (24, 3)


def test_what_cannot_be_revived_stays_dead() -> None:
    net = dead_filter_net()
    with torch.no_grad():
        cast(Tensor, net[0].bias)[1] = -1000
    drawn = ph.render(ph.load(net, input_size=24), ph.channel("2", range(3)), "fast", size=24, steps=8)
    assert drawn.dead.tolist() == [False, True, False]
    assert "woken" not in drawn.spec
