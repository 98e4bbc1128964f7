"""What a visitor gets to blend: the photo, the accentuated picture, and the responses of the library between them."""

from __future__ import annotations

import base64
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from test_live_photo import classifying, photo
from torch import nn

import phosphene as ph
from phosphene.errors import ChannelNotFound, InvalidRequest, LayerNotFound
from phosphene.images import encode, grid
from phosphene.web.live.accentuation import accentuation


def of(uri: str) -> bytes:
    head, _, text = uri.partition(",")
    assert head == "data:image/webp;base64"
    return base64.b64decode(text)


@pytest.mark.parametrize("channel", [None, "3"])
def test_pictures_and_responses_are_those_of_the_library(
    channel: str | None, untouched: Callable[[nn.Module], AbstractContextManager[None]]
) -> None:
    model = classifying()
    with untouched(model.module):
        facts = accentuation(model, photo(), "conv2", channel)
    number = None if channel is None else 3
    drawn = ph.accentuate(classifying(), photo(), "conv2", number, [eighth / 8 for eighth in range(9)])
    assert facts["amounts"] == [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1]
    assert facts["responses"] == pytest.approx(drawn.scores.tolist(), rel=1e-5)
    assert of(facts["before"]) == encode.webp(grid.picture(photo()[0]), 80)
    assert of(facts["after"]) == encode.webp(drawn.pictures[-1], 80)


@pytest.mark.parametrize(("height", "width", "size"), [(300, 300, (224, 224)), (100, 1000, (87, 870)), (9, 9, (9, 9))])
def test_pictures_are_small_enough_for_the_others_who_wait(height: int, width: int, size: tuple[int, int]) -> None:
    facts = accentuation(classifying(), torch.rand(1, 3, height, width), "conv1", "0")
    assert encode.decode_image(of(facts["after"])).size == size[::-1]
    assert encode.decode_image(of(facts["before"])).size == size[::-1]


def test_what_there_is_not_is_refused() -> None:
    with pytest.raises(LayerNotFound):
        accentuation(classifying(), photo(), "conv9", None)
    with pytest.raises(ChannelNotFound):
        accentuation(classifying(), photo(), "conv1", "6")
    for typed in ("-1", "x", "1.5", "²", "9" * 5000):
        with pytest.raises(InvalidRequest, match="a channel is a whole number"):
            accentuation(classifying(), photo(), "conv1", typed)
