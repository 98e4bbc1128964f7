"""Draw the pictures of the README: `make docs`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

import phosphene as ph
from phosphene.images.captions import LETTERS, with_axis_labels
from phosphene.images.encode import png
from phosphene.rendering.filter_sheet import paste_tiles
from phosphene.storage.atomic import write_file

HERE = Path(__file__).parent
# filters that show well how the answers grow from edges to objects
FILTERS = {
    "block1_conv2": (0, 5, 6, 13, 17, 19, 20, 21),
    "block2_conv1": (3, 10, 22, 35, 47, 62, 78, 101),
    "block3_conv1": (0, 1, 2, 4, 6, 7, 12, 20),
    "block4_conv1": (5, 18, 32, 64, 96, 160, 224, 288),
    "block5_conv1": (0, 32, 64, 96, 128, 192, 256, 320),
}


def main() -> None:
    """Write docs/filters.png and docs/photo.png."""
    draw_filters()
    draw_photo()


def draw_filters() -> None:
    """Write what filters of five layers answer to, one row a layer."""
    model = ph.load("builtin/vgg19")
    tiles = []
    for layer, channels in FILTERS.items():
        tiles += ph.render(model, ph.channel(layer, channels), size=112).pictures
    numbers = [str(number) for channels in FILTERS.values() for number in channels]
    body = paste_tiles(tiles, 8, tiles[0].size, numbers, LETTERS)
    pitch = body.height // len(FILTERS)
    layers = {row * pitch + pitch // 2: layer for row, layer in enumerate(FILTERS)}
    sheet = with_axis_labels(body, layers, letters=LETTERS)
    print(write_file(HERE / "filters.png", png(sheet, {"model": model.name, "filters": FILTERS})))


def draw_photo() -> None:
    """Write a heat map beside the summary of a photo's way through a network."""
    model, photo = ph.load("builtin/efficientnet-lite0"), ph.read(HERE.parent / "src/phosphene/data/chelsea.jpg")
    summary = ph.activations(ph.load("builtin/vgg19"), photo, "*relu*").summary_picture()
    heat = ph.explain(model, photo).overlay(photo)
    enlarged = heat.resize((heat.width * summary.height // heat.height, summary.height), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", (enlarged.width + 20 + summary.width, summary.height), "white")
    sheet.paste(enlarged, (0, 0))
    sheet.paste(summary, (enlarged.width + 20, 0))
    print(write_file(HERE / "photo.png", png(sheet, {"models": ["builtin/efficientnet-lite0", "builtin/vgg19"]})))


if __name__ == "__main__":
    main()
