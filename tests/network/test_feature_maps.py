"""Maps of the image in what layers return: channels first, channels last, and tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phosphene.errors import LayerRefused
from phosphene.network.capture import TensorAddress
from phosphene.network.feature_maps import as_map, as_map_or_none, aspect_mismatch, map_is_certain, token_grid
from phosphene.network.layers import Layer

IMAGES = torch.zeros(1, 3, 64, 32)


def layer(size: tuple[int, int] | None = None, sees: str = "unknown") -> Layer:
    return Layer("layer", TensorAddress("layer"), "Kind", False, None, size, None, sees, None)


def numbered(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape)


def test_a_map_stays_as_it_is_and_channels_last_are_brought_first() -> None:
    features = numbered(1, 5, 8, 4)
    assert as_map(features, layer((8, 4)), IMAGES) is features
    assert as_map(features.permute(0, 2, 3, 1), layer(), IMAGES).equal(features)


def test_the_table_tells_a_map_whose_proportions_are_far_from_the_image_s() -> None:
    features = numbered(1, 8, 1, 30)
    assert as_map(features, layer((1, 30), sees="part"), IMAGES) is features
    with pytest.raises(LayerRefused, match=r"layer returns \(1, 8, 1, 30\), in which no map of the image is known"):
        as_map(features, layer((1, 30)), IMAGES)


def test_tokens_are_laid_out_row_by_row_behind_the_extra_tokens() -> None:
    tokens = numbered(1, 9, 2)  # a class token and 4×2 patches of 16 px
    expected = [[[2, 4], [6, 8], [10, 12], [14, 16]], [[3, 5], [7, 9], [11, 13], [15, 17]]]
    assert as_map(tokens, layer(), IMAGES)[0].tolist() == expected


def test_a_single_position_is_no_map() -> None:
    with pytest.raises(LayerRefused, match="layer returns a single position, so there is no map"):
        as_map(numbered(1, 5, 1, 1), layer((1, 1), sees="part"), IMAGES)
    assert as_map_or_none(numbered(1, 5, 1, 1), layer((1, 1), sees="part"), IMAGES) is None
    assert as_map_or_none(None, layer(), IMAGES) is None


def test_proportions_differ_by_a_factor_either_way() -> None:
    assert aspect_mismatch((8, 4), (64, 32)) == 1
    assert aspect_mismatch((8, 8), (64, 32)) == aspect_mismatch((16, 4), (64, 32)) == 2
    assert [map_is_certain(layer(size), (64, 32)) for size in ((8, 8), (8, 9), None)] == [True, False, False]


def test_the_grid_has_as_few_extra_tokens_as_possible() -> None:
    assert token_grid(8, (64, 32)) == token_grid(9, (64, 32)) == (4, 2)
    assert token_grid(24, (64, 32)) == (4, 2)
    assert token_grid(25, (64, 32)) is None  # 17 extra tokens are too many
