"""Measure the pictures of recipes against real photos: `make bench-quality PHOTOS=folder`.

For every filter, with a(picture) the mean pre-activation of its channel over the map,

    E = (a(picture) - mean over photos of a) / (maximum over photos of a - mean over photos of a)

at the same size; E = 1 is as strong as the best photo. The picture is taken as it is saved: 8 bits a channel, without
transforms, float32. Figures of a cell (a model, layer and size), over its filters:

    E           median of E, and its minimum
    robust      median of (mean E after random ±4 px, ±5°, × 0.95–1.05) / E
    E at .15    median E with the picture's standard deviation brought to 0.15 (E grows with contrast)
    own         share of pictures whose own channel has the highest E of all, after halving and doubling the size
    deviation   median standard deviation of the pixels; `full` is the share of values at 0 or 255
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

import phosphene as ph
from phosphene.network.memory import keep_freed_memory
from phosphene.rendering.transforms import RandomDraws, resample

HERE = Path(__file__).parent
DRAWS = 8


@dataclass(frozen=True)
class Cell:
    """A layer to measure at, and the size of its pictures."""

    model: str
    layer: str
    size: int

    def __str__(self) -> str:
        return f"{self.model.removeprefix('builtin/')} {self.layer}"


CELLS = (
    *(Cell("builtin/vgg19", f"block{block}_conv1", 112) for block in (3, 4, 5)),
    *(Cell("builtin/efficientnet-lite0", f"_blocks.{block}", 160) for block in (5, 10, 15)),
)


@dataclass(frozen=True)
class Photos:
    """How strongly photos excite each channel of a layer, (c,) each."""

    mean: Tensor
    maximum: Tensor

    def excitation(self, activation: Tensor) -> Tensor:
        """Return E of channel means (n, c)."""
        return (activation - self.mean) / (self.maximum - self.mean)


def read_squares(folder: Path, size: int) -> Tensor:
    """Return the central squares of all photos, (n, 3, size, size) uint8."""
    squares = []
    for path in sorted(folder.glob("*.jpg")):
        with Image.open(path) as photo:
            rgb = photo.convert("RGB")
            side = min(rgb.size)
            left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
            box = (left, top, left + side, top + side)
            squares.append(pil_to_tensor(rgb.resize((size, size), Image.Resampling.BICUBIC, box=box)))
    return torch.stack(squares)


def channel_means(model: ph.Model, layers: list[str], pictures: Tensor, batch: int = 25) -> dict[str, Tensor]:
    """Return the mean over the map of every channel for pictures (n, 3, h, w) uint8 or in [0, 1]: (n, c) a layer."""
    rows: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    with model.reading(layers) as read, torch.no_grad():
        for chunk in torch.split(pictures, batch):
            image = chunk.to(model.prototype_tensor) / (255 if chunk.dtype == torch.uint8 else 1)
            for layer, act in read(image).items():
                rows[str(layer)].append(act.mean((-2, -1)).cpu())
    return {layer: torch.cat(means) for layer, means in rows.items()}


def photo_statistics(model: ph.Model, cells: list[Cell], folder: Path) -> dict[Cell, Photos]:
    """Return what the photos do at every cell of one model, in one pass a size."""
    photos = {}
    for size in sorted({cell.size for cell in cells}):
        here = [cell for cell in cells if cell.size == size]
        means = channel_means(model, [cell.layer for cell in here], read_squares(folder, size))
        for cell in here:
            photos[cell] = Photos(means[cell.layer].mean(0), means[cell.layer].amax(0))
    return photos


def measure(
    model: ph.Model, cell: Cell, photos: Photos, recipe: ph.Recipe, filters: int, sheets: Path
) -> dict[str, object]:
    """Render some filters of a cell and return their figures."""
    count = model.find(cell.layer).channels or 0
    channels = [index * count // filters for index in range(filters)]
    began = time.perf_counter()
    rendered = ph.render(model, ph.channel(cell.layer, channels), recipe, size=cell.size)
    seconds = (time.perf_counter() - began) / filters
    rendered.grid(columns=8).save(sheets / f"{recipe.name} {str(cell).replace('/', '-')}.png")
    saved = rendered.displayed()
    picture = saved.double() / 255

    def excitation(pictures: Tensor) -> Tensor:
        return photos.excitation(channel_means(model, [cell.layer], pictures.float())[cell.layer])

    def own_excitation(pictures: Tensor) -> Tensor:
        return excitation(pictures).gather(1, torch.tensor(channels)[:, None])[:, 0]

    draws = RandomDraws(range(filters))
    moved = []
    for _ in range(DRAWS):
        shift, turn, scale = draws.uniform(-4, 4, (2,)), draws.uniform(-5, 5), draws.uniform(0.95, 1.05)
        moved.append(own_excitation(resample(picture, shift, turn, scale)))
    centre, deviation = picture.mean((1, 2, 3), keepdim=True), picture.flatten(1).std(1).view(-1, 1, 1, 1)
    half = F.interpolate(picture, scale_factor=0.5, mode="bilinear", antialias=True)
    blurred = F.interpolate(half, size=(cell.size, cell.size), mode="bilinear")
    clean = own_excitation(picture)
    return {
        "cell": str(cell),
        "size": cell.size,
        "recipe": recipe.name,
        "channels": channels,
        "E": clean.tolist(),
        "median E": median(clean),
        "lowest E": float(clean.min()),
        "robust": median(torch.stack(moved).mean(0) / clean),
        "E at .15": median(own_excitation((picture - centre) * 0.15 / deviation + centre)),
        "own": float((excitation(blurred).argmax(1) == torch.tensor(channels)).double().mean()),
        "deviation": median(deviation),
        "full": float(((saved == 0) | (saved == 255)).double().mean()),
        "dead": int(rendered.dead.sum()),
        "seconds": seconds,
    }


def median(values: Tensor) -> float:
    """Return the median: of an even number of values midway between the two in the middle (torch takes the lower)."""
    return float(values.double().quantile(0.5))


HEADINGS = ("median E", "lowest E", "robust", "E at .15", "own", "deviation", "full", "dead", "seconds")


def show(row: dict[str, object]) -> str:
    """Return one line of the table."""
    figures = "".join(
        f"{row[name]:>10.2f}" if isinstance(row[name], float) else f"{row[name]:>10}" for name in HEADINGS
    )
    return f"{row['cell']!s:<32}{row['recipe']!s:<14}{figures}"


def main() -> None:
    """Print the table of every recipe at every cell, and write it to bench/results/quality.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="a folder of JPEG photos")
    names = [name for name in ph.RECIPES if name != "dream"]
    parser.add_argument("--recipes", nargs="+", default=names, help="names, or files that hold a recipe's JSON")
    parser.add_argument("--cells", nargs="+", default=[""], help="parts of the cells' names")
    parser.add_argument("--filters", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sheets", type=Path, default=HERE / "sheets", help="where the sheets of pictures go")
    parser.add_argument("--out", type=Path, default=HERE / "results/quality.json")
    options = parser.parse_args()
    options.sheets.mkdir(parents=True, exist_ok=True)
    recipes = [
        ph.RECIPES[name] if name in ph.RECIPES else ph.Recipe.from_json(Path(name).read_text())
        for name in options.recipes
    ]
    cells = [cell for cell in CELLS if any(part in str(cell) for part in options.cells)]
    print(f"{'':<46}" + "".join(f"{name:>10}" for name in HEADINGS))
    rows = []
    for name in dict.fromkeys(cell.model for cell in cells):
        keep_freed_memory()
        model = ph.load(name, device=options.device)
        here = [cell for cell in cells if cell.model == name]
        for cell, photos in photo_statistics(model, here, options.photos).items():
            for recipe in recipes:
                rows.append(measure(model, cell, photos, recipe, options.filters, options.sheets))
                print(show(rows[-1]), flush=True)
    machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    if options.device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**machine, "phosphene": ph.__version__, "rows": rows}, indent=1) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
