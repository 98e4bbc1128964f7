"""Measure what the pictures of recipes tell a reader: `make bench-pictures PHOTOS=folder`.

For every filter of a cell (a model and a layer), the photos are put in the order of the mean of its map before the
activation, and judges that are not the network take the two-choice task of `phosphene.evidence.two_choice`. Figures of
a cell, over its filters:

    picture     mean share of right choices with the picture as the explanation, a figure a judge
    one, nine   the same with the strongest photo, and the nine strongest, in its place
    deviation   median standard deviation of a picture's values; `full` is the share of values at 0 or 255
    spectrum    median distance of the picture's amplitude spectrum from the photos' mean: the standard deviation over
                frequencies, up to .35 cycles a pixel, of the logarithm to base 2 of their ratio
    E           median of E = (a(picture) - mean over photos of a) / (maximum over photos of a - mean over photos of a),
                a being the mean of the filter's map; `above 1` is the share of filters with E above 1
    E at .2     median E with the picture's standard deviation brought to 0.2
    robust      median of (mean E after random ±4 px, ±5°, × 0.95-1.05) / E
    own         share of pictures whose own channel has the highest E of all, after halving and doubling the size
    dead        filters that the recipe calls dead
    seconds     a picture

A picture is taken as it is saved, 8 bits a channel. The judges see it at 128 px, as they see the photos; the network
sees the photos at 128 px and the picture at its own size. Recipes are chosen on `--half a` of the filters and photos,
and reported on `--half b`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

import phosphene as ph
from judges import JUDGES, SIDE, FeatureMaps, styles
from phosphene.evidence.two_choice import Style, choices, share_right
from phosphene.network.memory import keep_freed_memory
from phosphene.rendering.transforms import RandomDraws, resample

HERE = Path(__file__).parent
EXPLANATIONS = ("picture", "one", "nine")
DRAWS = 8
CONTRAST = 0.2
HIGHEST = 0.35  # cycles a pixel


@dataclass(frozen=True)
class Cell:
    """A layer to measure at."""

    model: str
    layer: str

    def __str__(self) -> str:
        return f"{self.model.removeprefix('builtin/')} {self.layer}"


CELLS = (
    *(Cell("builtin/vgg19", f"block{block}_conv1") for block in (2, 3, 4, 5)),
    *(Cell("builtin/efficientnet-lite0", f"_blocks.{block}") for block in (3, 5, 10, 15)),
)


@dataclass(frozen=True, eq=False)
class Photos:
    """Photos (n, 3, h, w) uint8, and which of them a measurement uses."""

    pixels: Tensor
    chosen: Tensor

    @cache  # noqa: B019 - one for the whole run
    def styles(self, judge: str) -> tuple[FeatureMaps, Style, Tensor]:
        """Return a judge, how it sees all photos, and that standardised for those that are used."""
        maps = JUDGES[judge]()
        everyone = styles(maps, self.pixels)
        return maps, everyone, everyone.standardised(everyone)[self.chosen]


@dataclass(frozen=True)
class Excitation:
    """How strongly each photo excites each channel of a layer, (n, c)."""

    activations: Tensor

    def of(self, activation: Tensor) -> Tensor:
        """Return E of channel means (n, c)."""
        mean = self.activations.mean(0)
        return (activation - mean) / (self.activations.amax(0) - mean)


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


def read_photos(folder: Path, half: str) -> Photos:
    """Return all photos, of which the half `a` or `b`, or `all`, are used."""
    pixels = read_squares(folder, SIDE)
    shuffled = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(1))
    middle = len(pixels) // 2
    return Photos(pixels, {"a": shuffled[:middle], "b": shuffled[middle:], "all": torch.arange(len(pixels))}[half])


def chosen_filters(count: int, filters: int, half: str) -> list[int]:
    """Return filters evenly spread over a layer; those of half `b` lie midway between the others."""
    filters = min(filters, count // 2)
    return [int((index + (0.5 if half == "b" else 0.0)) * count / filters) for index in range(filters)]


def channel_means(model: ph.Model, layers: Sequence[str], pictures: Tensor, batch: int = 25) -> dict[str, Tensor]:
    """Return the mean over the map of every channel for pictures (n, 3, h, w) uint8 or in [0, 1]: (n, c) a layer."""
    rows: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    with model.reading(list(layers)) as read, torch.no_grad():
        for chunk in torch.split(pictures, batch):
            image = chunk.to(model.prototype_tensor) / (255 if chunk.dtype == torch.uint8 else 1)
            for layer, act in read(image).items():
                rows[str(layer)].append(act.mean((-2, -1)).cpu())
    return {layer: torch.cat(means) for layer, means in rows.items()}


def prediction(photos: Photos, activations: Tensor, channels: Sequence[int], pictures: Tensor, judge: str) -> Tensor:
    """Return (n, 3) the share of right choices by the pictures, the strongest photo and the nine strongest photos.

    `activations` (photos, c) are those of the chosen photos; pictures (n · e, 3, h, w), e of each filter in turn.
    """
    maps, everyone, seen = photos.styles(judge)
    explanations = styles(maps, pictures).standardised(everyone)
    explanations = explanations.view(len(channels), -1, explanations.shape[1])
    rows = []
    for channel, explanation in zip(channels, explanations, strict=True):
        chosen = choices(activations[:, channel])
        explained = (explanation, seen[chosen.explaining[:1]], seen[chosen.explaining[:9]])
        rows.append([share_right(rows_of, seen, chosen) for rows_of in explained])
    return torch.tensor(rows)


def amplitudes(pictures: Tensor, bands: int = 12) -> Tensor:
    """Return (n, bands) the root mean square amplitude of light, in bands of frequency of equal width up to HIGHEST."""
    light = pictures.double().mean(1) / 255
    power = torch.fft.rfft2(light - light.mean((-2, -1), keepdim=True), norm="ortho").abs().square()
    side = light.shape[-1]
    frequency = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None])
    band = (frequency / HIGHEST * bands).long()
    return torch.stack([power[:, band == index].mean(1).sqrt() for index in range(bands)], 1)


def spectrum_distance(pictures: Tensor, photos: Tensor) -> Tensor:
    """Return (n,) how far the spectra of pictures lie from the mean spectrum of photos."""
    side = min(pictures.shape[-1], SIDE)
    sized = [F.interpolate(images.float(), (side, side), mode="area") for images in (pictures, photos)]
    ratio = amplitudes(sized[0]) / amplitudes(sized[1]).mean(0)
    return ratio.log2().std(1)


def excitation_figures(
    model: ph.Model, layer: str, excitation: Excitation, channels: list[int], saved: Tensor
) -> dict[str, float]:
    """Return the figures of pictures (n, 3, h, w) uint8 that the network itself gives."""
    picture, index = saved.double() / 255, torch.tensor(channels)[:, None]

    def every(pictures: Tensor) -> Tensor:
        return excitation.of(channel_means(model, [layer], pictures.float())[layer])

    def own(pictures: Tensor) -> Tensor:
        return every(pictures).gather(1, index)[:, 0]

    draws, moved = RandomDraws(range(len(channels))), []
    for _ in range(DRAWS):
        shift, turn, scale = draws.uniform(-4, 4, (2,)), draws.uniform(-5, 5), draws.uniform(0.95, 1.05)
        moved.append(own(resample(picture, shift, turn, scale)))
    centre, deviation = picture.mean((1, 2, 3), keepdim=True), picture.flatten(1).std(1).view(-1, 1, 1, 1)
    half = F.interpolate(picture, scale_factor=0.5, mode="bilinear", antialias=True)
    blurred = F.interpolate(half, size=picture.shape[-2:], mode="bilinear")
    clean = own(picture)
    return {
        "E": median(clean),
        "above 1": float((clean > 1).double().mean()),
        "E at .2": median(own((picture - centre) * CONTRAST / deviation.clamp(min=1e-3) + centre)),
        "robust": median(torch.stack(moved).mean(0) / clean),
        "own": float((every(blurred).argmax(1)[:, None] == index).double().mean()),
    }


def median(values: Tensor) -> float:
    """Return the median: of an even number of values midway between the two in the middle (torch takes the lower)."""
    return float(values.double().quantile(0.5))


def measure(
    model: ph.Model, cell: Cell, photos: Photos, excitation: Excitation, recipe: ph.Recipe, options: argparse.Namespace
) -> dict[str, object]:
    """Render some filters of a cell and return their figures."""
    channels = chosen_filters(model.find(cell.layer).channels or 0, options.filters, options.half)
    began = time.perf_counter()
    rendered = ph.render(
        model, ph.channel(cell.layer, channels), recipe, size=options.size, facets=options.facets, progress=False
    )
    seconds = (time.perf_counter() - began) / len(channels)
    rendered.grid().save(options.sheets / f"{recipe.name} {str(cell).replace('/', '-')}.png")
    everything = rendered.displayed()
    saved = everything[:: options.facets]
    judged = {
        judge: prediction(photos, excitation.activations[photos.chosen], channels, everything, judge)
        for judge in options.judges
    }
    return {
        "cell": str(cell),
        "recipe": recipe.name,
        "size": saved.shape[-1],
        "channels": channels,
        **{judge: dict(zip(EXPLANATIONS, shares.mean(0).tolist(), strict=True)) for judge, shares in judged.items()},
        "filters": {judge: shares[:, 0].tolist() for judge, shares in judged.items()},
        "deviation": median((saved / 255).flatten(1).std(1)),
        "full": float(((saved == 0) | (saved == 255)).double().mean()),
        "spectrum": median(spectrum_distance(saved, photos.pixels)),
        **excitation_figures(model, cell.layer, excitation, channels, saved),
        "dead": int(rendered.dead.sum()),
        "seconds": seconds,
    }


FIGURES = ("deviation", "full", "spectrum", "E", "above 1", "E at .2", "robust", "own", "dead", "seconds")


def judged(shares: Sequence[float]) -> str:
    """Return the shares of right choices by the picture, one photo and nine photos."""
    return " / ".join(f"{share:.3f}".removeprefix("0") for share in shares)


def show(row: dict[str, object], judges: Sequence[str]) -> str:
    """Return one line of the table."""
    figures = "".join(f"{row[name]:>10.2f}" if isinstance(row[name], float) else f"{row[name]:>10}" for name in FIGURES)
    shares = "".join(f"{judged(row[judge].values()):>22}" for judge in judges)  # type: ignore[attr-defined]
    return f"{row['cell']!s:<32}{row['recipe']!s:<14}{row['size']:>5}{shares}{figures}"


def show_sums(rows: Sequence[dict[str, object]], judges: Sequence[str]) -> None:
    """Print for each recipe and judge the sum over the cells of share - .5, over that of one photo."""
    for recipe in dict.fromkeys(str(row["recipe"]) for row in rows):
        here = [row for row in rows if row["recipe"] == recipe]
        for judge in judges:
            picture, one, nine = (
                sum(row[judge][name] - 0.5 for row in here)  # type: ignore[index]
                for name in EXPLANATIONS
            )
            print(f"{recipe:<14}{judge:<20}{picture:.2f} / {one:.2f} / {nine:.2f}  of one photo {picture / one:.2f}")


def parsed() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="a folder of JPEG photos")
    names = ["fourier", "fast", "vivid", "maco", "rms"]
    parser.add_argument("--recipes", nargs="+", default=names, help="names, or files that hold a recipe's JSON")
    parser.add_argument("--cells", nargs="+", default=[""], help="parts of the cells' names")
    parser.add_argument("--filters", type=int, default=16)
    parser.add_argument("--half", choices=("a", "b", "all"), default="b", help="of the filters and photos")
    parser.add_argument("--judges", nargs="+", choices=tuple(JUDGES), default=["efficientnet-lite1", "alexnet"])
    parser.add_argument("--facets", type=int, default=1, help="pictures of a filter, which explain it together")
    parser.add_argument("--size", type=int, help="of the pictures, by default the recipe's for the receptive field")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sheets", type=Path, default=HERE / "sheets", help="where the sheets of pictures go")
    parser.add_argument("--out", type=Path, default=HERE / "results/pictures.json")
    return parser.parse_args()


def main() -> None:
    """Print the table of every recipe at every cell, and write it to bench/results/pictures.json."""
    options = parsed()
    options.sheets.mkdir(parents=True, exist_ok=True)
    recipes = [
        ph.RECIPES[name] if name in ph.RECIPES else ph.Recipe.from_json(Path(name).read_text())
        for name in options.recipes
    ]
    cells = [cell for cell in CELLS if any(part in str(cell) for part in options.cells)]
    photos, rows = read_photos(options.photos, options.half), []
    headings = "".join(f"{judge:>22}" for judge in options.judges) + "".join(f"{name:>10}" for name in FIGURES)
    print(f"{'':<46}{'size':>5}{headings}")
    for name in dict.fromkeys(cell.model for cell in cells):
        keep_freed_memory()
        model = ph.load(name, device=options.device)
        here = [cell for cell in cells if cell.model == name]
        activations = channel_means(model, [cell.layer for cell in here], photos.pixels)
        for cell in here:
            for recipe in recipes:
                rows.append(measure(model, cell, photos, Excitation(activations[cell.layer]), recipe, options))
                print(show(rows[-1], options.judges), flush=True)
    show_sums(rows, options.judges)
    machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    if options.device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {**machine, "phosphene": ph.__version__, "half": options.half, "facets": options.facets}
    options.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
