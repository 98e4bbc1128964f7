"""Accentuation and dreams: what they draw into a photo, how much of it, and what they leave alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import phosphene as ph
from phosphene.errors import ChannelNotFound, InvalidRequest, LayerNotFound, LayerRefused, RecipeNotFound
from phosphene.rendering.accentuation import at_size, earlier_layer

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
CHELSEA = Path(__file__).parents[2] / "src/phosphene/data/chelsea.jpg"
AMOUNTS = [0, 0.25, 0.5, 0.75, 1]


@pytest.fixture
def model(small_net: nn.Sequential) -> ph.Model:
    return ph.load(small_net, input_size=32)


def photo(height: int = 32, width: int = 48) -> Tensor:
    """Return smooth noise as a photo, (1, 3, h, w) float32 in [0, 1]."""
    noise = torch.rand(1, 3, height // 4, width // 4, generator=torch.Generator().manual_seed(5))
    return torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")


def rises(numbers: list[float]) -> bool:
    return all(less < more for less, more in pairwise(numbers))


@pytest.mark.parametrize("channel", range(8))
def test_a_filter_answers_the_more_the_larger_the_amount(
    model: ph.Model, small_net: nn.Sequential, channel: int
) -> None:
    pictures = ph.accentuate(model, photo(), "4", channel, AMOUNTS)
    assert torch.equal(pictures.images[:1], photo().double())  # amount 0 is the photo to the last bit
    assert pictures.images.min() >= 0
    assert pictures.images.max() <= 1
    with torch.no_grad():
        maps = small_net[:5](pictures.images)[:, channel]
    assert pictures.scores.tolist() == pytest.approx(maps.mean((1, 2)).tolist(), rel=1e-12)
    assert pictures.scores[0] == pictures.start_scores[0]
    above = (maps[0] - maps[0].mean()).clamp(min=0)
    above[[0, -1]], above[:, [0, 1, -2, -1]] = 0, 0  # the border of a map of 16 × 24
    assert rises([float(answer) for answer in ((maps * above).mean((1, 2)) / above.mean() * 3 + maps.mean((1, 2)))])


def test_a_layer_answers_the_more_the_larger_the_amount(model: ph.Model, small_net: nn.Sequential) -> None:
    pictures = ph.accentuate(model, photo(), "4", amount=AMOUNTS)
    assert torch.equal(pictures.images[:1], photo().double())
    with torch.no_grad():
        acts = small_net[:5](pictures.images)
    centred = acts - acts[0].mean((-2, -1), keepdim=True)
    lengths = [float((act * centred[0]).sum() / centred[0].square().sum()) for act in centred]
    assert pictures.scores.tolist() == pytest.approx(lengths, rel=1e-9)
    assert pictures.start_scores.tolist() == pytest.approx([1] * 5)
    assert rises(pictures.scores.tolist())


@pytest.mark.parametrize("channel", [5, 67, None])
def test_in_a_trained_network_the_mean_of_the_filter_rises_and_the_photo_stays(channel: int | None) -> None:
    cat = ph.read(str(CHELSEA))
    pictures = ph.accentuate(ph.load("builtin/efficientnet-lite0"), cat, "_blocks.5", channel, AMOUNTS, size=96)
    assert rises(pictures.scores.tolist())
    start, drawn = (image.flatten() - image.mean() for image in (pictures.images[0], pictures.images[-1]))
    assert float(start @ drawn / (start.norm() * drawn.norm())) > 0.85  # correlation of the pixels


def test_amounts_are_shares_of_one_and_the_same_ascent(model: ph.Model) -> None:
    pictures = ph.accentuate(model, photo(), "4", 3, [0.25, 1])
    assert torch.equal(ph.accentuate(model, photo(), "4", 3).images, pictures.images[1:])
    start = photo().double()
    torch.testing.assert_close(pictures.images[0], (0.75 * start + 0.25 * pictures.images[1:])[0], rtol=0, atol=1e-12)
    assert pictures.names == ("filter_3_amount_0.25", "filter_3_amount_1")
    assert pictures.spec["amounts"] == [0.25, 1.0]
    single = ph.accentuate(model, photo(), "4", 3)
    assert (single.names, single.metadata(0)["channel"]) == (("filter_3",), 3)


def test_the_change_is_where_the_photo_excites_the_filter() -> None:
    edge = nn.Conv2d(1, 2, 3, padding=1, bias=False)
    with torch.no_grad():
        edge.weight.copy_(torch.tensor([[-1.0, 0, 1], [-1, 0, 1], [-1, 0, 1]]).expand(2, 1, 3, 3))
    net = nn.Sequential(edge, nn.Conv2d(2, 2, 1)).double().eval()
    grey = torch.full((1, 1, 32, 32), 0.4)
    grey[..., 4:12, 16:] = 0.6  # one edge from dark to bright, at the top
    picture = ph.accentuate(ph.load(net, input_size=32, channels_in=1), grey, ".0", 0).images
    change = (picture - grey).abs()[0, 0]
    assert float(change[4:12, 14:18].mean()) > 5 * float(change[18:].mean())


def test_a_module_is_left_as_it_was(model: ph.Model, small_net: nn.Sequential, untouched: Untouched) -> None:
    small_net.train()
    small_net[4].weight.requires_grad_(False)

    def interrupt(frame: ph.Frame) -> None:
        if frame.step == 2:
            raise KeyboardInterrupt

    with untouched(small_net):
        ph.accentuate(model, photo(), "4", 2)
        ph.accentuate(model, photo(), "4")
        with pytest.raises(KeyboardInterrupt):
            ph.accentuate(model, photo(), "4", 2, watch=interrupt)


def test_the_result_is_as_large_as_the_photo_up_to_the_recipes_size(model: ph.Model) -> None:
    assert ph.accentuate(model, photo(300, 600), "4", 1, steps=1).images.shape == (1, 3, 224, 448)
    assert ph.accentuate(model, photo(), "4", 1, steps=1).images.shape == (1, 3, 32, 48)
    assert ph.accentuate(model, photo(), "4", 1, steps=1, size=20).images.shape == (1, 3, 20, 30)


def test_a_photo_of_the_right_size_is_used_as_it_is() -> None:
    image = photo()
    assert at_size(image, 32) is image
    small = at_size(image, 16)
    expected = torch.nn.functional.interpolate(image, (16, 24), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(small, expected)


def test_pictures_are_kept_close_to_the_photo_halfway_to_the_layer() -> None:
    vgg = ph.load("builtin/vgg19")
    paths = {path: earlier_layer(vgg, vgg.find(path)).path for path in ("block1_conv1", "block3_conv1", "block5_conv1")}
    assert paths == {"block1_conv1": "block1_conv1", "block3_conv1": "block2_conv1", "block5_conv1": "block3_conv3"}
    assert ph.accentuate(vgg, photo(), "block2_conv1", 4, steps=1).spec["layers"] == ["block2_conv1", "block1_conv2"]


def test_what_cannot_be_drawn_is_refused(model: ph.Model) -> None:
    with pytest.raises(ChannelNotFound, match=r"'\.4' has 8 channels, 0 to 7; there is no 8"):
        ph.accentuate(model, photo(), "4", 8)
    with pytest.raises(InvalidRequest, match="a channel is a whole number of at least 0, not -1"):
        ph.accentuate(model, photo(), "4", -1)
    with pytest.raises(LayerRefused, match="returns no map of channels"):
        ph.accentuate(model, photo(), "8", 0)
    with pytest.raises(LayerNotFound):
        ph.accentuate(model, photo(), "40", 0)
    with pytest.raises(RecipeNotFound):
        ph.accentuate(model, photo(), "4", 0, recipe="none")
    with pytest.raises(InvalidRequest, match=r"\(1, 3, height, width\)"):
        ph.accentuate(model, photo()[:, :1], "4", 0)
    with pytest.raises(InvalidRequest, match="at least 1 px"):
        ph.accentuate(model, photo(), "4", 0, size=0)
    for amount in (1.5, -0.1, [], [0.5, 2]):
        with pytest.raises(InvalidRequest, match="an amount is from 0"):
            ph.accentuate(model, photo(), "4", 0, amount)
    with pytest.raises(InvalidRequest, match="an amount is a number, not nan"):
        ph.accentuate(model, photo(), "4", 0, float("nan"))


def test_dreaming_keeps_the_photo_and_raises_the_layers_squares(model: ph.Model, small_net: nn.Sequential) -> None:
    image = torch.rand(1, 3, 40, 60, generator=torch.Generator().manual_seed(5))
    dreamt = ph.dream(model, image, "4", steps=2)
    assert dreamt.images.shape == (1, 3, 40, 60)
    before, after = (small_net[:5](picture.double()).square().mean().item() for picture in (image, dreamt.images))
    assert dreamt.scores.item() == pytest.approx(after, rel=1e-12)
    assert after > before
    # four octaves of two steps of 1.5 bytes, root mean square
    assert float((dreamt.images - image).square().mean().sqrt()) < 4 * 2 * 1.5 / 255 * 1.5
    assert ph.dream(model, image, "4", size=20, steps=1).images.shape == (1, 3, 20, 30)
