"""The demonstration: what filters of a trained network respond to, and what another one makes of a photo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.resources import as_file, files
from pathlib import Path

import torch

from phosphene.activations import activations
from phosphene.ascent import Frame
from phosphene.explain import explain
from phosphene.figure import png
from phosphene.files import write_file
from phosphene.loaders import load
from phosphene.objectives import channel
from phosphene.photo import read
from phosphene.render import render

MODEL = "builtin/vgg19"
# not block1_conv1: before its activation it is linear in the picture, so its mean over the map only answers to a colour
LAYERS = ("block1_conv2", "block2_conv1", "block3_conv1", "block4_conv1", "block5_conv1")
FILTERS = 24
COLUMNS = 6
SIZE = 96
CLASSIFIER = "builtin/efficientnet-lite0"
SEEN = "block?_relu1"  # layers whose activations are shown: after a ReLU the channels that stay blank can be counted
PHOTO = "chelsea.jpg"


def demonstrate(
    folder: Path, device: str | torch.device = "cpu", watch: Callable[[Frame], None] | None = None
) -> Iterator[Path]:
    """Render the first filters of every block of the built-in VGG19, then look at the photo that ships.

    Yields each picture's path when it is written.
    """
    model = load(MODEL, device=device)
    for layer in LAYERS:
        rendered = render(model, channel(layer, range(FILTERS)), "fast", size=SIZE, watch=watch)
        sheet = png(rendered.grid(COLUMNS), rendered.spec)
        yield write_file(folder / f"vgg19_{layer}.png", sheet)
    with as_file(files("phosphene").joinpath("data", PHOTO)) as path:
        photo = read(path)
    yield from activations(model, photo, SEEN).save(folder / "activations")
    yield explain(load(CLASSIFIER, device=device), photo).save(folder / "heat_map.png", photo)
