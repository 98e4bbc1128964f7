"""Draw the pictures of the README: `make docs`."""

from __future__ import annotations

from pathlib import Path

import phosphene as ph
from phosphene.figure import grid, png
from phosphene.store import write_file

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
    """Write docs/filters.png."""
    model = ph.load("builtin/vgg19")
    tiles = []
    for layer, channels in FILTERS.items():
        tiles += ph.render(model, ph.channel(layer, channels), size=112).pictures
    print(write_file(HERE / "filters.png", png(grid(tiles, columns=8), {"model": model.name, "filters": FILTERS})))


if __name__ == "__main__":
    main()
