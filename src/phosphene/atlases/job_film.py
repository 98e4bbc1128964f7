"""The film of a job: how its pictures came about, as small tiles in one file."""

from collections.abc import Callable
from functools import cache

from torch import Tensor

from phosphene.images.display import Picture, to_bytes
from phosphene.images.encode import webp
from phosphene.images.grid import picture
from phosphene.images.sprites import MAX_SIDE, STRIP_TILE, SpriteSheet, thumbnail, tile, tile_size
from phosphene.rendering.gradient_ascent import Frame
from phosphene.rendering.result import Rendered

MOMENTS = 7  # frames of a render that a film keeps after the first one, at most
QUALITY = 75  # of WebP


class JobFilm:
    """The frames of a job's film. Each is shrunk when it comes, so that a film takes little memory.

    Attributes:
        display: a recipe's display rule; see `DISPLAYS`.
        moments: tiles by step and index of the picture.
        steps: of the whole render.
    """

    def __init__(self, display: Callable[[Tensor], Tensor]) -> None:
        self.display = display
        self.moments: dict[int, dict[int, Picture]] = {}
        self.steps = 0

    def also_calling(self, watch: Callable[[Frame], None] | None) -> Callable[[Frame], None]:
        """Return a callback for a render, which adds each frame and passes it on to `watch`."""

        def on_frame(frame: Frame) -> None:
            self.add(frame)
            if watch:
                watch(frame)

        return on_frame

    def add(self, frame: Frame) -> None:
        """Keep a frame if its step belongs into the film; the last one comes from the finished pictures."""
        self.steps = frame.steps
        if frame.step < frame.steps and frame.step in kept_steps(frame.steps):
            images = to_bytes(self.display(frame.image.cpu()))
            self.moments.setdefault(frame.step, {}).update(
                {index: film_tile(image) for index, image in zip(frame.items.tolist(), images, strict=True)}
            )

    def sheet(self, rendered: Rendered, facets: int = 1) -> SpriteSheet | None:
        """Return the film, a row for each picture and a column for each moment, the last being the finished picture.

        Of the `facets` of a filter, it shows the first.

        The facts are `file`, `tile` (width, height), `columns` and `steps` (the step of each column). None if the
        pictures are too many for one file.
        """
        chosen = range(0, len(rendered), facets)
        side = min(STRIP_TILE, MAX_SIDE // len(chosen))
        if not side:
            return None
        steps = sorted(self.moments)
        finished = [film_tile(image) for image in rendered.displayed()[::facets]]
        size = tile_size(finished[0].size, side)
        tiles = [
            thumbnail(image, size)
            for index, last in zip(chosen, finished, strict=True)
            for image in (*(self.moments[step][index] for step in steps), last)
        ]
        columns = len(steps) + 1
        facts = {"file": "film.webp", "tile": list(size), "columns": columns, "steps": [*steps, self.steps]}
        return SpriteSheet("film.webp", webp(tile(tiles, columns), QUALITY), facts)


@cache
def kept_steps(steps: int) -> frozenset[int]:
    """Return the steps of a film, which are closer together at the start, where a picture changes most."""
    return frozenset(round(steps * (moment / MOMENTS) ** 2) for moment in range(MOMENTS + 1))


def film_tile(image: Tensor) -> Picture:
    """Return an image (c, h, w), uint8, as a tile of a film."""
    tile = picture(image).convert("RGB")
    return thumbnail(tile, tile_size(tile.size, STRIP_TILE))
