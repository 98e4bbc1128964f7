"""The result of rendering: pictures, their scores, and the request that made them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from phosphene.errors import InvalidRequest
from phosphene.images import display, encode, grid
from phosphene.network.layers import file_prefix
from phosphene.rendering.filter_sheet import SheetPicture, filter_sheet
from phosphene.storage.atomic import write_file, write_manifest

CHANNEL = re.compile("(?:filter|class)_([0-9]+)")  # at the beginning of a picture's name


@dataclass(frozen=True, eq=False)
class Rendered:
    """Finished pictures.

    Attributes:
        images: (n, c, h, w) as optimised, before the recipe's display rule; floating, on the CPU.
        scores: (n,) score of each image, without transforms.
        start_scores: (n,) score of each starting image.
        history: (steps, n) scores under the transforms, step by step.
        dead: (n,) whether the picture never left its starting score.
        plain: (n,) whether its filter wants a flat colour and no pattern: the score rose, and a flat picture in a
            colour of this one has at least nine tenths of that rise.
        names: what each picture shows, such as `filter_12`, its facet `filter_12_facet_1`, or `filter_12_opposite`.
        spec: model, layers, objective, recipe and versions that made them, in JSON terms.
        moments: images (n, c, h, w) of the film, if one was requested.
    """

    images: Tensor
    scores: Tensor
    start_scores: Tensor
    history: Tensor
    dead: Tensor
    plain: Tensor
    names: tuple[str, ...]
    spec: Mapping[str, Any]
    moments: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        size = "×".join(map(str, self.images.shape[1:]))
        dead, plain, recipe = int(self.dead.sum()), int(self.plain.sum()), self.spec["recipe"]["name"]
        return f"Rendered({len(self)} pictures of {size}, {dead} dead, {plain} plain, recipe {recipe})"

    def displayed(self, images: Tensor | None = None) -> Tensor:
        """Return the images (n, c, h, w) as shown: uint8 after the recipe's display rule."""
        images = self.images if images is None else images
        return display.to_bytes(display.DISPLAYS[self.spec["recipe"]["display"]](images))

    @cached_property
    def pictures(self) -> list[display.Picture]:
        """The pictures as PIL images; those of dead filters are not crossed out."""
        return [grid.picture(image) for image in self.displayed()]

    def grid(self, columns: int | None = None, images: Tensor | None = None, captions: bool = True) -> display.Picture:
        """Return all pictures, or images of them at any size, on one sheet; dead filters are crossed out, plain named.

        `captions`: numbered and under a caption, see `filter_sheet`. Without, as in R1 and R4.2, the pictures lie in a
        near square with 5 black pixels between them, and only dead filters are marked. Facets have a row
        for each filter.
        """
        facets, size = self.spec.get("facets", 1), self.pictures[0].size
        columns = facets if columns is None and facets > 1 else columns
        pictures = (
            self.pictures
            if images is None
            else [grid.picture(image).resize(size, Image.Resampling.NEAREST) for image in self.displayed(images)]
        )
        marks = zip(self.names, self.dead.tolist(), self.plain.tolist(), strict=True)
        marked = [SheetPicture(image, *mark) for image, mark in zip(pictures, marks, strict=True)]
        if captions:
            return filter_sheet(marked, self.spec, columns)
        return grid.grid([grid.cross_out(tile.image) if tile.dead else tile.image for tile in marked], columns)

    def metadata(self, index: int) -> dict[str, Any]:
        """Return the metadata of one picture's file; `channel` is None if it shows neither a filter nor a class."""
        number = CHANNEL.match(self.names[index])
        return {
            **self.spec,
            "layer": ", ".join(self.spec["layers"]),
            "seed": self.spec["recipe"]["seed"],
            "picture": self.names[index],
            "channel": int(number[1]) if number else None,
            "score": float(self.scores[index]),
            "dead": bool(self.dead[index]),
            "plain": bool(self.plain[index]),
        }

    def save(self, folder: str | Path, columns: int | None = None, captions: bool = True) -> list[Path]:
        """Write one PNG per picture, `grid.png` (see `grid`), and `manifest.json` last; return the paths.

        Raises:
            OutputRefused: the folder cannot be written.
        """
        directory = Path(folder)
        prefix = file_prefix(self.spec["layers"])
        pictures = [
            write_file(directory / f"{prefix}_{name}.png", encode.png(picture, self.metadata(index)))
            for index, (name, picture) in enumerate(zip(self.names, self.pictures, strict=True))
        ]
        sheet = write_file(directory / "grid.png", encode.png(self.grid(columns, captions=captions), self.spec))
        entries = [
            {
                "file": path.name,
                "picture": self.names[index],
                "score": float(self.scores[index]),
                "start_score": float(self.start_scores[index]),
                "dead": bool(self.dead[index]),
                "plain": bool(self.plain[index]),
            }
            for index, path in enumerate(pictures)
        ]
        manifest = write_manifest(directory / "manifest.json", {**self.spec, "pictures": entries, "grid": "grid.png"})
        return [*pictures, sheet, manifest]

    def save_film(self, path: str | Path) -> Path:
        """Write the moments of the ascent as an animated GIF of grids.

        Raises:
            InvalidRequest: no moments were kept.
        """
        if not self.moments:
            raise InvalidRequest("there are no moments to show; render with film=24")
        return write_file(Path(path), encode.gif([self.grid(images=images) for images in self.moments]))

    def _repr_png_(self) -> bytes:
        return encode.png(self.grid(), self.spec)
