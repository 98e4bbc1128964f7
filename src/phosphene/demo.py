"""The demonstration: what filters of a trained network respond to, from its first convolution to its deepest block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from phosphene.ascent import Frame
from phosphene.figure import png
from phosphene.loaders import load
from phosphene.objectives import channel
from phosphene.render import render
from phosphene.store import write_file

MODEL = "builtin/vgg19"
# not block1_conv1: before its activation it is linear in the picture, so its mean over the map only answers to a colour
LAYERS = ("block1_conv2", "block2_conv1", "block3_conv1", "block4_conv1", "block5_conv1")
FILTERS = 24
COLUMNS = 6
SIZE = 96


def demonstrate(
    folder: Path, device: str | torch.device = "cpu", watch: Callable[[Frame], None] | None = None
) -> Iterator[Path]:
    """Render the first filters of every block of the built-in VGG19; yield each sheet's path when it is written."""
    model = load(MODEL, device=device)
    for layer in LAYERS:
        rendered = render(model, channel(layer, range(FILTERS)), "fast", size=SIZE, watch=watch)
        sheet = png(rendered.grid(COLUMNS), rendered.spec)
        yield write_file(folder / f"vgg19_{layer}.png", sheet)
