"""Film strips: tiles are the weights on one scale for all epochs, and films are what was drawn."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from fake_training_record import record_of
from phosphene import errors
from phosphene.images import display, encode, grid
from phosphene.training.film_strip import (
    STRIP,
    evenly_spaced,
    film,
    format_metric,
    frame_layout,
    layer_strip,
    save_film,
    strip,
    strip_layout,
)
from phosphene.training.history import History

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")

Pixels = np.ndarray[Any, Any]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def history(tmp_path: Path) -> History:
    """Return three epochs of 4 filters of 2 channels; the last epoch's weights are the largest."""
    kernels = [random(4, 2, 3, 3, seed=epoch) * (epoch + 1) for epoch in range(3)]
    metrics = [{"loss": 1 / (epoch + 1), "accuracy": epoch / 4} for epoch in range(3)]
    return record_of(tmp_path / "run", {"conv1": kernels}, metrics)


def pixels(picture: display.Picture) -> Pixels:
    return np.asarray(picture.convert("RGB"))


def first_tile(page: Pixels, height: int) -> tuple[int, int]:
    """Return where the top left tile begins, if all tiles together are so high: they end 12 pixels above the edge."""
    top = len(page) - 12 - height
    return top, int(np.argmax((page[top] != 255).any(1)))


def level(weight: float, low: float, high: float) -> int:
    """Return the level of a weight on a scale, as plain arithmetic."""
    return min(255, max(0, round((weight - low) / (high - low) * 255)))


def end_of(history: History, layer: str) -> float:
    """Return the end of the signed scale over all epochs, as plain loops have it."""
    numbers = [float(weight) for epoch in history.epochs for weight in history.kernels(layer, epoch).weights.flatten()]
    typical = math.sqrt(sum(number**2 for number in numbers) / len(numbers))
    return min(max(map(abs, numbers)), 4 * typical)


# --- strips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["signed", "grey"])
def test_a_strip_has_a_row_an_epoch_on_the_scale_of_all_epochs(history: History, style: str) -> None:
    page = pixels(strip(history, "conv1", style))
    numbers = [float(weight) for epoch in range(3) for weight in history.kernels("conv1", epoch).weights.flatten()]
    end = end_of(history, "conv1")
    low, high = (-end, end) if style == "signed" else (min(numbers), max(numbers))

    def colour(grey: int) -> tuple[int, ...]:
        return tuple(map(int, colormaps["RdBu_r"](grey, bytes=True)[:3])) if style == "signed" else (grey,) * 3

    side = 48 + 1
    top, left = first_tile(page, 3 * (2 * side - 1) + 2 * 8)
    for epoch in range(3):
        weights = history.kernels("conv1", epoch).weights
        for out, channel, y, x in ((0, 0, 0, 0), (3, 1, 2, 2), (1, 0, 2, 1), (2, 1, 0, 2)):
            down = top + epoch * (2 * side - 1 + 8) + channel * side + y * 16
            across = left + out * side + x * 16
            expected = colour(level(float(weights[out, channel, y, x]), low, high))
            assert tuple(page[down, across]) == expected
            assert tuple(page[down + 15, across + 15]) == expected
    assert tuple(page[top + 48, left + 5]) == (195, 195, 195)


def test_a_first_layer_s_filters_are_in_colour(tmp_path: Path) -> None:
    kernels = [random(5, 3, 3, 3, seed=epoch) for epoch in range(2)]
    history = record_of(tmp_path / "run", {"conv1": kernels})
    page, end = pixels(strip(history, "conv1")), end_of(history, "conv1")
    top, left = first_tile(page, 2 * 96 + 8)
    for epoch in range(2):
        for out, y, x in ((0, 0, 0), (4, 2, 1), (2, 1, 2)):
            spot = page[top + epoch * (96 + 8) + y * 32, left + out * 97 + x * 32]
            assert tuple(spot) == tuple(level(float(weight), -end, end) for weight in kernels[epoch][out, :, y, x])
    grey = layer_strip(history, "conv1", "grey")
    assert grey.timeline.shape == (5, 3, 3, 3)  # R2.2b: a kernel a channel


def test_a_strip_of_rendered_filters_shows_the_pictures_themselves(tmp_path: Path) -> None:
    images = [torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(epoch)) for epoch in range(4)]
    history = record_of(tmp_path / "run", {"conv1": [random(3, 2, 3, 3)] * 4}, pictures=("conv2", images))
    drawn = layer_strip(history, "conv2")
    assert (drawn.timeline.noun, drawn.timeline.names, drawn.timeline.shape) == (
        "filters",
        ["3", "4", "5"],
        (3, 1, 64, 64),
    )
    page = pixels(drawn.strip())
    top, left = first_tile(page, 4 * 64 + 3 * 8)
    for epoch in range(4):
        for index in range(3):
            tile = page[top + epoch * 72 : top + epoch * 72 + 64, left + index * 65 : left + index * 65 + 64]
            assert np.array_equal(tile, (images[epoch][index] * 255).round().byte().permute(1, 2, 0).numpy())
    assert layer_strip(history, "conv1").timeline.noun == "kernels"
    both = record_of(tmp_path / "both", {"conv2": [random(3, 2, 3, 3)] * 4}, pictures=("conv2", images))
    assert [layer_strip(both, layer).timeline.noun for layer in ("conv2", 0)] == ["filters", "filters"]


def test_kernels_with_nan_are_crossed_out_and_do_not_spoil_the_scale(tmp_path: Path) -> None:
    finite, broken = random(4, 2, 3, 3), random(4, 2, 3, 3)
    broken[1, 0, 2, 2] = float("nan")
    history = record_of(tmp_path / "run", {"conv1": [finite, broken]})
    drawn = layer_strip(history, "conv1")
    page = pixels(drawn.strip())
    top, left = first_tile(page, 2 * 97 + 8)
    cross = pixels(grid.cross_out(grid.blank_tile(48, 48)))
    down = top + 2 * 49 - 1 + 8
    assert np.array_equal(page[down : down + 48, left + 49 : left + 49 + 48], cross)
    assert not np.array_equal(page[down : down + 48, left : left + 48], cross)
    assert drawn.timeline.scale is not None
    assert math.isfinite(drawn.timeline.scale[1])
    assert "crossed out: NaN or infinity" in drawn.timeline.caption


def test_what_does_not_fit_is_left_out_and_said(tmp_path: Path) -> None:
    history = record_of(tmp_path / "run", {"conv1": [random(300, 40, 3, 3)]})
    for epoch in range(1, 150):
        history.epoch_folder(epoch).symlink_to(history.epoch_folder(0))
    drawn = layer_strip(history, "conv1")
    layout = strip_layout(drawn.timeline)
    caption = drawn.caption_parts(layout, "column", "line", "row")
    assert caption[0] == "the first 123 of 300 filters, one a column"  # 123 tiles of 13 pixels
    assert caption[1] == "the first 4 of 40 input channels, one a line"  # (1440 / 24 - 8) pixels for lines of 13
    assert caption[-1] == "24 of 150 epochs, evenly spread, one a row"
    assert (layout.epochs[0], layout.epochs[-1]) == (0, 149)
    page = drawn.strip()
    assert page.width < STRIP[0] + 200
    assert page.height < STRIP[1] + 150
    frame = frame_layout(drawn.timeline)
    assert (frame.filters, frame.lines, len(frame.epochs)) == (840 // 13, 40, 100)


def test_epochs_are_evenly_spread_with_both_ends() -> None:
    assert evenly_spaced(range(500), 5) == [0, 125, 250, 374, 499]
    assert evenly_spaced([3, 4, 9], 3) == [3, 4, 9]
    assert evenly_spaced([3, 4, 9], 1) == [9]


def test_numbers_have_the_digits_that_count() -> None:
    assert [format_metric(value) for value in (0.123456, 12345.6, 1e9, float("nan"), None)] == [
        "0.123",
        "12,346",
        "1e+09",
        "nan",
        "",
    ]


def test_kernels_that_are_all_zero_are_white(tmp_path: Path) -> None:
    history = record_of(tmp_path / "run", {"conv1": [torch.zeros(2, 2, 3, 3)]})
    page = pixels(strip(history, "conv1"))
    top, left = first_tile(page, 97)
    assert tuple(page[top, left]) == tuple(colormaps["RdBu_r"](128, bytes=True)[:3])


def test_metadata_says_run_layer_and_epochs(history: History, tmp_path: Path) -> None:
    path, facts = layer_strip(history, "conv1").save(tmp_path / "s.png")
    with Image.open(path) as image:
        metadata = json.loads(image.text["phosphene"])  # type: ignore[attr-defined]
    assert metadata == json.loads(json.dumps(facts))
    assert (metadata["run"], metadata["layer"], metadata["epochs"]) == (str(history.folder), "conv1", [0, 1, 2])
    assert metadata["scale"][1] == pytest.approx(end_of(history, "conv1"))


# --- films ------------------------------------------------------------------------------------------------------------


def test_a_frame_is_the_sheet_of_an_epoch_a_row_a_filter(history: History) -> None:
    frames, end = film(history, "conv1"), end_of(history, "conv1")
    assert len({frame.size for frame in frames}) == 1
    for epoch, frame in enumerate(frames):
        page, weights = pixels(frame), history.kernels("conv1", epoch).weights
        top, left = first_tile(page, 4 * 49 - 1)
        for out, channel, y, x in ((0, 0, 0, 0), (3, 1, 2, 2), (1, 0, 2, 1)):
            spot = page[top + out * 49 + y * 16, left + channel * 49 + x * 16]
            expected = level(float(weights[out, channel, y, x]), -end, end)
            assert tuple(spot) == tuple(colormaps["RdBu_r"](expected, bytes=True)[:3])


def test_a_gif_has_a_frame_an_epoch_and_rests_on_the_last(history: History, tmp_path: Path) -> None:
    frames = film(history, "conv1")
    with Image.open(save_film(frames, tmp_path / "film.gif")) as image:
        assert image.n_frames == 3
        times = []
        for index, frame in enumerate(frames):
            image.seek(index)
            times.append(image.info["duration"])
            assert np.abs(pixels(image.copy()).astype(int) - pixels(frame)).mean() < 1.5
    assert times == [800, 800, 1500]


@needs_ffmpeg
@pytest.mark.parametrize("fallback", [False, True])
def test_an_mp4_read_back_is_what_was_drawn(
    history: History, tmp_path: Path, fallback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fallback:  # an ffmpeg without libx264
        monkeypatch.setattr(encode, "CODECS", (("-c:v", "lib-there-is-not"), encode.CODECS[1]))
    frames = [
        frame.crop((0, 0, frame.width // 2 * 2 - 1, frame.height // 2 * 2 - 1)) for frame in film(history, "conv1")
    ]  # odd
    path = save_film(frames, tmp_path / "film.mp4")
    width, height = frames[0].width + 1, frames[0].height + 1
    raw = subprocess.run(
        ["ffmpeg", "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"],
        capture_output=True,
        check=True,
    ).stdout
    seen = np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)
    assert len(seen) == 20 + 20 + 37  # 0.8 s each and 1.5 s, at 25 pictures a second
    for index, frame in ((0, 0), (19, 0), (20, 1), (39, 1), (40, 2), (76, 2)):
        drawn = pixels(frames[frame]).astype(int)
        assert np.abs(seen[index, :-1, :-1] - drawn).mean() < 4
    if not fallback:  # a cell of 16 pixels has its colour in the middle
        top, left = first_tile(pixels(film(history, "conv1")[2]), 4 * 49 - 1)
        spot = slice(top + 6, top + 10), slice(left + 6, left + 10)
        assert np.abs(seen[-1][spot].astype(int) - pixels(frames[2])[spot]).max() < 12


def test_an_mp4_without_ffmpeg_is_refused_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(errors.ExtraMissing, match=r"film\.mp4 needs the program ffmpeg.*ends in \.gif, or install it"):
        save_film([Image.new("RGB", (4, 4))], tmp_path / "film.mp4")


@pytest.mark.parametrize("side", [4, 400])  # less, and more, than a pipe holds
def test_an_ffmpeg_that_fails_is_quoted(side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "ffmpeg"
    broken.write_text("#!/bin/sh\necho out of luck >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(errors.Unfinished, match=r"could not make the film \(out of luck\)"):
        save_film([Image.new("RGB", (side, side))] * 3, tmp_path / "film.mp4")
    assert not (tmp_path / "film.mp4").exists()


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_requests(history: History, tmp_path: Path) -> None:
    with pytest.raises(errors.LayerNotFound, match=r"holds nothing of a layer 'conv2'; the nearest are: conv1$"):
        strip(history, "conv2")
    with pytest.raises(errors.InvalidRequest, match="no style 'neon'; there are: signed, grey"):
        strip(history, "conv1", "neon")
    with pytest.raises(errors.InvalidRequest, match="at least one frame"):
        save_film([], tmp_path / "film.gif")
    with pytest.raises(errors.InvalidRequest, match=r"does not end in \.gif or \.mp4"):
        save_film([Image.new("RGB", (4, 4))], tmp_path / "film.avi")
    with pytest.raises(errors.InvalidRequest, match="no finished epoch"):
        strip(record_of(tmp_path / "empty", {"conv1": []}), "conv1")
    pictures = ("conv9", [torch.rand(1, 3, 8, 8)])
    with pytest.raises(errors.LayerNotFound, match="the nearest are: conv9"):
        strip(record_of(tmp_path / "films", {}, pictures=pictures), "conv8")
