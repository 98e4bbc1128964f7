"""Batches: stops, memory, overflow and films; dead filters are marked in the result, the manifest and the grid."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import phosphene as ph
from fake_terminal import counts
from phosphene.images.grid import DEAD
from phosphene.progress import Bar
from phosphene.rendering.batches import in_own_colours, is_film_frame, needs_no_pattern, never_moved
from phosphene.rendering.recipes import RECIPES, Recipe, choice

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
QUICK = Recipe("quick", "", (16,), 2, choice("pixels", low=0.3, high=0.7), choice("rms", rate=2.0))


@pytest.fixture
def model(small_net: nn.Sequential) -> ph.Model:
    return ph.load(small_net, input_size=32)


# --- the bar


def test_the_bar_counts_the_steps_of_every_picture(model: ph.Model, bars: list[Bar]) -> None:
    seen: list[tuple[int, int]] = []

    def watch(frame: ph.Frame) -> None:
        seen.append((bars[0].done, bars[0].total))

    ph.render(model, ph.channel("4", range(5)), QUICK, batch=2, watch=watch)
    # two steps and the finished frame of 2, 2 and 1 pictures
    assert seen == [(done, 10) for done in (2, 4, 4, 6, 8, 8, 9, 10, 10)]
    ph.render(model, ph.channel("4", 0), "fast", size=16, steps=3)
    scales = len(RECIPES["fast"].with_settings(size=16).sizes)
    assert counts(bars)[1:] == [("1 picture", "steps", 3 * scales, 3 * scales)]


def test_the_bar_counts_pictures_that_are_tried_again(bars: list[Bar]) -> None:
    conv = nn.Conv2d(3, 3, 1).double()
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1, 1).expand(3, 3, 1, 1))
        conv.bias.fill_(-0.1)  # type: ignore[union-attr]
    net = nn.Sequential(conv, nn.ReLU())
    rendered = ph.render(ph.load(net, input_size=16), ph.channel("1", range(3)), QUICK, batch=3)
    assert rendered.dead.tolist() == [True, False, True]
    assert counts(bars) == [("3 pictures", "steps", 6 + 4, 6 + 4)]


def test_the_bar_counts_a_batch_that_did_not_fit_anew(model: ph.Model, bars: list[Bar]) -> None:
    with pytest.warns(UserWarning, match="out of memory with"):
        ph.render(model, ph.channel("4", range(7)), QUICK, batch=7, watch=narrow(2))
    assert counts(bars) == [("7 pictures", "steps", 14, 14)]


# --- stops


def test_ctrl_c_keeps_the_batches_that_are_done(model: ph.Model) -> None:
    def interrupt(frame: ph.Frame) -> None:
        if frame.items.tolist() == [4, 5] and frame.step == 1:
            raise KeyboardInterrupt

    objective = ph.channel("4", [7, 6, 5, 4, 3, 2, 1])
    with pytest.raises(ph.errors.Interrupted, match="4 of 7 done") as stopped:
        ph.render(model, objective, QUICK, batch=2, watch=interrupt)
    finished = stopped.value.finished
    assert isinstance(finished, ph.Rendered)
    assert finished.names == ("filter_7", "filter_6", "filter_5", "filter_4")
    whole = ph.render(model, objective, QUICK, batch=2)
    assert torch.equal(finished.images, whole.images[:4])
    assert torch.equal(finished.history, whole.history[:, :4])


def test_ctrl_c_in_the_first_batch_leaves_nothing(model: ph.Model) -> None:
    def interrupt(frame: ph.Frame) -> None:
        raise KeyboardInterrupt

    with pytest.raises(ph.errors.Interrupted, match="0 of 1 done") as stopped:
        ph.render(model, ph.channel("4", 0), QUICK, watch=interrupt)
    assert stopped.value.finished is None


# --- memory


def narrow(limit: int, error: type[Exception] = torch.OutOfMemoryError) -> Callable[[ph.Frame], None]:
    """Return a watcher that runs out of memory in the middle of batches larger than `limit`."""

    def watch(frame: ph.Frame) -> None:
        if len(frame.items) > limit and frame.step == 1:
            raise error("CUDA out of memory. Tried to allocate 20.00 GiB")

    return watch


def test_a_batch_that_does_not_fit_is_halved_and_the_pictures_are_the_same(model: ph.Model) -> None:
    objective = ph.channel("4", range(7))
    plain = ph.render(model, objective, "fast", size=16, steps=3, film=2)
    with pytest.warns(UserWarning, match="out of memory with") as warnings_seen:
        halved = ph.render(model, objective, "fast", size=16, steps=3, film=2, batch=7, watch=narrow(2))
    assert [str(warning.message) for warning in warnings_seen] == [
        "out of memory with 7 pictures at once; going on with 3",
        "out of memory with 3 pictures at once; going on with 1",
    ]
    assert {warning.filename for warning in warnings_seen} == {__file__}
    assert torch.equal(plain.images, halved.images)
    assert torch.equal(plain.scores, halved.scores)
    assert torch.equal(plain.history, halved.history)
    assert all(
        torch.equal(moment, halved_moment) for moment, halved_moment in zip(plain.moments, halved.moments, strict=True)
    )


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_one_picture_that_does_not_fit_is_an_error_of_its_own(
    model: ph.Model, small_net: nn.Sequential, untouched: Untouched, error: type[Exception]
) -> None:
    with untouched(small_net), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ph.errors.OutOfMemory, match="not even one picture of 16 px fits"):
            ph.render(model, ph.channel("4", range(4)), QUICK, watch=narrow(0, error))


# --- overflow


class Overflowing(nn.Module):
    """Doubles 1,200 times where its input exceeds `limit` anywhere: to infinity."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1).double()
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(3, dtype=torch.float64)[:2, :, None, None])
            self.conv.bias.zero_()  # type: ignore[union-attr]
        self.tail = nn.Identity()
        self.limit = limit

    def forward(self, image: Tensor) -> Tensor:
        act = self.conv(image)
        result: Tensor = self.tail(torch.where(act.detach().amax() > self.limit, act * 1e200 * 1e200, act))
        return result


@pytest.mark.parametrize("limit", [0.1, 0.505, 0.515])
def test_a_score_that_overflows_is_an_error_with_the_layers_name(limit: float, untouched: Untouched) -> None:
    net = Overflowing(limit)  # from the start, on the way, and only in the finished picture
    frames: list[ph.Frame] = []
    recipe = Recipe("test", "", (4,), 2, choice("pixels", low=0.5, high=0.5), choice("rms", rate=2.0))
    with untouched(net), pytest.raises(ph.errors.LayerRefused, match="the score of filter_1 at 'tail' became NaN"):
        ph.render(ph.load(net, input_size=4), ph.channel("tail", 1), recipe, watch=frames.append)
    assert len(frames) == (0 if limit == 0.1 else 3)


# --- films


def test_a_film_keeps_the_start_and_evenly_spread_moments(model: ph.Model) -> None:
    frames: list[ph.Frame] = []
    pictures = ph.render(model, ph.channel("4", [0, 1]), "rms", size=16, steps=9, film=3, watch=frames.append)
    assert [frame.step for frame in frames if is_film_frame(frame, 3)] == [0, 3, 6, 9]
    assert [torch.equal(pictures.moments[k], frames[3 * k].image) for k in range(4)] == [True] * 4
    pictures = ph.render(model, ph.channel("4", 0), "rms", size=16, steps=3, film=50)
    assert len(pictures.moments) == 4
    assert not ph.render(model, ph.channel("4", 0), "rms", size=16, steps=1).moments


# --- dead filters


@pytest.fixture
def dead_net() -> nn.Sequential:
    """Return a convolution whose channel 1 has so low a bias that no picture in 0..1 gets it through the ReLU."""
    convolution = nn.Conv2d(3, 3, 3, padding=1).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        convolution.weight.copy_(0.3 * torch.randn(3, 3, 3, 3, generator=generator, dtype=torch.float64))
        convolution.bias.copy_(torch.tensor([0.0, -100.0, 0.0]))  # type: ignore[union-attr]
    return nn.Sequential(convolution, nn.ReLU(inplace=True))


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"dream"}))
def test_a_dead_filter_is_marked_after_the_relu_and_followed_uphill_before_it(
    dead_net: nn.Sequential, name: str
) -> None:
    model = ph.load(dead_net, input_size=32)
    recipe = RECIPES[name].with_settings(steps=4)
    recipe = dataclasses.replace(recipe, sizes=(12, 16) if len(recipe.sizes) > 1 else (16,))
    after = ph.render(model, ph.channel("1", range(3)), recipe)
    assert after.dead.tolist() == [False, True, False]
    assert after.scores[1] == after.start_scores[1] == 0
    before = ph.render(model, ph.channel("0", range(3)), recipe)
    assert before.dead.tolist() == [False] * 3
    # the mean of a bare convolution is the picture's mean over again, which maco fixes
    assert name == "maco" or before.scores[1] > before.start_scores[1]


def test_a_dead_filter_is_crossed_in_the_grid_and_named_in_the_manifest(
    dead_net: nn.Sequential, tmp_path: Path
) -> None:
    pictures = ph.render(ph.load(dead_net, input_size=32), ph.channel("1", range(3)), QUICK)
    pictures.save(tmp_path, columns=3)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [entry["dead"] for entry in manifest["pictures"]] == [False, True, False]
    sheet = np.asarray(pictures.grid(3, captions=False).convert("RGB"))
    tiles = [sheet[:, 21 * index : 21 * index + 16] for index in range(3)]
    on_the_diagonal = [all((tile[k, k] == DEAD).all() for k in range(16)) for tile in tiles]
    assert on_the_diagonal == [False, True, False]
    assert np.array_equal(tiles[0], np.asarray(pictures.pictures[0]))


def test_the_first_max_steps_are_not_falsely_dead(small_net: nn.Sequential) -> None:
    model = ph.load(small_net, input_size=32)
    # R1's start spans one byte; after one step of 2 bytes the bare picture has hardly more, but it is shown stretched
    pictures = ph.render(model, ph.channel("4", range(8)), "max-step", size=32, steps=1)
    assert not bool(pictures.dead.any())
    # the signed maximum may turn a step downhill; that filter has left its start all the same
    scores = torch.tensor([[1.0, 0.0, 2.0], [0.5, 0.0, 2.0], [1.0, 0.0, 2.0 + 1e-6]])
    assert never_moved(torch.tensor([1.0, 0.0, 2.0]), scores).tolist() == [False, True, True]


def test_a_small_score_that_moves_is_not_dead() -> None:
    assert never_moved(torch.tensor([1e-9]), torch.tensor([[1.1e-9]])).tolist() == [False]


# --- plain filters


def wants_white() -> tuple[nn.Sequential, int, str]:
    """Return two layers of weights above 0 on grey digits, as an MNIST network has that looks for ink."""
    net = nn.Sequential(nn.Conv2d(1, 4, 5, padding=2), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    for convolution in (net[0], net[2]):
        positive(convolution)
    return net, 1, "3"


def wants_red() -> tuple[nn.Sequential, int, str]:
    """Return a layer that likes red, and dislikes green and blue."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Identity())
    positive(net[0])
    with torch.no_grad():
        net[0].weight[:, 1:].neg_()  # type: ignore[index]
    return net, 3, "1"


def wants_white_after_batchnorm() -> tuple[nn.Sequential, int, str]:
    """Return a layer of weights above 0 whose outputs are normalised, so that most pictures are below its 0."""
    norm = nn.BatchNorm2d(4)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), norm, nn.ReLU())
    positive(net[0])
    with torch.no_grad():
        norm.running_mean.fill_(0.4)  # type: ignore[union-attr]
        norm.running_var.fill_(0.05)  # type: ignore[union-attr]
    return net.eval(), 1, "2"


def positive(convolution: nn.Module) -> None:
    """Give a convolution weights in 0..0.2 and no bias."""
    assert isinstance(convolution, nn.Conv2d)
    with torch.no_grad():
        convolution.weight.copy_(0.2 * torch.rand(convolution.weight.shape, generator=torch.Generator().manual_seed(1)))
        if convolution.bias is not None:
            convolution.bias.zero_()


@pytest.mark.parametrize("made", [wants_white, wants_red, wants_white_after_batchnorm])
@pytest.mark.parametrize("recipe", ["fourier", "vivid", "max-step"])
def test_a_filter_that_wants_a_flat_colour_is_plain_and_not_dead(
    made: Callable[[], tuple[nn.Sequential, int, str]], recipe: str
) -> None:
    net, channels, layer = made()
    model = ph.load(net, input_size=28, channels_in=channels)
    pictures = ph.render(model, ph.channel(layer, range(4)), recipe, size=28, steps=None if recipe == "fourier" else 60)
    assert pictures.dead.tolist() == [False] * 4
    assert pictures.plain.tolist() == [True] * 4
    medians = pictures.displayed().flatten(2).median(2).values
    if recipe != "fourier":  # which holds the contrast, so that no picture is flat
        assert bool((medians[:, 0] > 200).all())  # white, or red
        assert bool((medians[:, 1:] < 50).all())


def test_a_dead_filter_is_not_plain_and_one_that_wants_an_edge_is_neither(dead_net: nn.Sequential) -> None:
    with torch.no_grad():
        dead_net[0].weight[2] = torch.tensor([[-1.0, 0, 1]] * 3)  # type: ignore[operator]
    pictures = ph.render(ph.load(dead_net, input_size=32), ph.channel("1", range(1, 3)), "fast", size=24)
    assert pictures.dead.tolist() == [True, False]
    assert pictures.plain.tolist() == [False, False]


def test_the_colours_of_a_picture_are_its_median_and_its_purer_decile_channel_by_channel() -> None:
    # 0, .1 … 1 with median .5 in the first channel; .2 … 1 in the second; a border of 1 around .2 in the third
    levels = torch.arange(11) / 10
    framed = torch.tensor([1.0, *[0.2] * 9, 1])
    image = torch.stack([levels.flip(0), (levels + 0.2).clamp(max=1), framed]).view(1, 3, 1, 11)
    median, purer = in_own_colours(image)
    assert median.shape == purer.shape == image.shape
    torch.testing.assert_close(median[0, :, 0], torch.tensor([0.5, 0.7, 0.2])[:, None].expand(3, 11))
    torch.testing.assert_close(purer[0, :, 0], torch.tensor([0.1, 1, 0.2])[:, None].expand(3, 11))


def test_plain_is_nine_tenths_of_a_rise() -> None:
    start, scores = torch.tensor([1.0, 1, 1, 1, -3]), torch.tensor([2.0, 2, 2, 1, -1])
    flat = torch.tensor([1.91, 1.89, 2.5, 1, -1.1])
    assert needs_no_pattern(start, scores, flat).tolist() == [True, False, True, False, True]
    assert needs_no_pattern(scores, start, flat).tolist() == [False] * 5  # none rose
