"""Reading one number of a convolution without running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import phosphene as ph
from phosphene.rendering.engine.forward import SHORTCUTS
from shortcut_comparison import assert_shortcuts_agree, scores_and_gradient

KINDS: dict[str, nn.Conv2d] = {
    "plain": nn.Conv2d(4, 6, 3),
    "padded": nn.Conv2d(4, 6, 3, padding=1, bias=False),
    "strided": nn.Conv2d(4, 6, (3, 5), stride=(2, 3), padding=(1, 2)),
    "dilated": nn.Conv2d(4, 6, 3, dilation=2, padding="same"),
    "grouped": nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4),
    "mirrored": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "round": nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular", groups=2),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_convolution_is_read_without_running_it(name: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), KINDS[name]).double().eval()
    model = ph.load(net, input_size=19)
    image = torch.rand(3, 3, 19, 19, dtype=torch.float64)
    assert_shortcuts_agree(model, ph.channel(".2", [5, 0, 5]), image, {"linear", "subpixel"})
    assert_shortcuts_agree(model, ph.neuron(".2", [1, 4, 0], (1, 2)), image)
    runs: list[int] = []

    def counted(*given: Any) -> Tensor:
        runs.append(1)
        return ORIGINAL(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Conv2d, "_conv_forward", counted)
        scores_and_gradient(model, ph.channel(".2", [5, 0, 5]), image, SHORTCUTS)
    assert len(runs) == 1  # the first convolution alone


ORIGINAL: Callable[..., Tensor] = nn.Conv2d._conv_forward


def test_the_mean_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, (1, 2), bias=True)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[[[2.0, -1.0]]]]))  # type: ignore[operator]
        net[0].bias.fill_(5.0)  # type: ignore[operator]
    image = torch.tensor([[[[1.0, 3.0, 2.0]]]], dtype=torch.float64)
    # 2·1 - 3 + 5 and 2·3 - 2 + 5, their mean; each pixel's share of it: 2/2, (-1 + 2)/2, -1/2
    score, gradient, shortcuts = scores_and_gradient(
        ph.load(net, input_size=(1, 3)), ph.channel(".0", 0), image, SHORTCUTS
    )
    assert score.tolist() == [6.5]
    assert gradient.flatten().tolist() == [1.0, 0.5, -0.5]
    assert shortcuts == ("linear",)
