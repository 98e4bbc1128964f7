"""The result of explaining: where on a photo the evidence for a class lies, as a map and as pictures."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from phosphene.errors import InvalidRequest
from phosphene.images import display, encode, grid
from phosphene.images.photo import Region
from phosphene.inspection import overlay
from phosphene.inspection.attribution_methods import CAUTIONS, CLASS_FREE, INPUT_METHODS, SHOWN_BY_SIZE
from phosphene.inspection.class_scores import ClassScore
from phosphene.storage.atomic import write_file

QUANTILE = 0.99  # of an input gradient's positive values: what counts as full heat
TILE = 224  # least long side of the small map's picture, in pixels


@dataclass(frozen=True, eq=False)
class Heatmap:
    """Where a class score comes from.

    Attributes:
        map: (h, w) as computed: signed, unscaled, at the layer's own resolution; on the CPU.
        method: its name.
        layer: the layer's path; "input" for gradients at the image itself.
        target: the class, with its probability.
        top: the five most probable classes, most probable first.
        region: the part of the photo that the network saw, which the map covers.
        photo_size: (height, width) of the photo.
        spec: model, fingerprint, layer, method, target and versions that made it, in JSON terms.
    """

    map: Tensor
    method: str
    layer: str
    target: ClassScore
    top: tuple[ClassScore, ...]
    region: Region
    photo_size: tuple[int, int]
    spec: Mapping[str, Any]

    @property
    def evidence(self) -> Tensor:
        """The part of the map that is shown, (h, w): its positive values (R4.3); of bare gradients the magnitude."""
        return self.map.abs() if self.method in SHOWN_BY_SIZE else self.map.relu()

    @property
    def is_empty(self) -> bool:
        """Whether the map has nothing to show: no position of it speaks for the class."""
        return not bool(self.evidence.any())

    @property
    def caution(self) -> str:
        """What to keep in mind with this method, empty for most."""
        return CAUTIONS.get(self.method, "")

    @property
    def full_heat(self) -> float:
        """The value that counts as full heat: the maximum; at the input the 99th percentile of the positive values.

        A few pixels of an input gradient exceed all others many times.
        """
        if self.is_empty or self.method not in INPUT_METHODS:
            return float(self.evidence.max())
        return float(self.evidence[self.evidence > 0].double().quantile(QUANTILE))

    @property
    def heat(self) -> Tensor:
        """The map for the eye, (h, w) in [0, 1]: `evidence` divided by `full_heat`, at most 1."""
        return self.evidence if self.is_empty else (self.evidence / self.full_heat).clamp(0, 1)

    def __repr__(self) -> str:
        size = "×".join(map(str, self.map.shape))
        return f"Heatmap({self.method} of {self.target.name!r} at {self.layer}, {size}{', silent' * self.is_empty})"

    def caption(self) -> str:
        """Return in words what a picture of this shows."""
        subject = f"{self.target.name} {self.target.probability:.1%}"
        return f"{'whatever the class' if self.method in CLASS_FREE else subject} — {self.method} at {self.layer}"

    def empty_message(self) -> str:
        """Return in words what a map without any evidence means."""
        return f"nothing speaks for {self.target.name} at {self.layer}"

    def upsampled(self, photo: Tensor) -> Tensor:
        """Return the heat at every pixel of the photo (1, c, H, W): (H, W) in [0, 1], 0 outside the region.

        Bilinear, with the centres of the map's cells spread evenly over the region.

        Raises:
            InvalidRequest: the photo is of another size than the one explained.
        """
        self.check_photo(photo)
        down, across = self.region_coordinates()
        points = torch.stack([across.expand(len(down), -1), down[:, None].expand(-1, len(across))], -1)
        heat = F.grid_sample(
            self.heat[None, None].double(), points[None], "bilinear", padding_mode="border", align_corners=False
        )
        return (heat[0, 0] * self.in_region()).to(self.map.dtype).clamp(0, 1)

    def region_coordinates(self) -> tuple[Tensor, Tensor]:
        """Return the centres of the photo's rows (H,) and columns (W,), in units where the region spans -1 to 1."""
        rows, columns = (torch.arange(side, dtype=torch.float64) + 0.5 for side in self.photo_size)
        region = self.region
        return 2 * (rows - region.top) / region.height - 1, 2 * (columns - region.left) / region.width - 1

    def in_region(self) -> Tensor:
        """Return for every pixel of the photo (H, W) whether its centre lies in the region."""
        down, across = (coordinates.abs() <= 1 for coordinates in self.region_coordinates())
        return down[:, None] & across[None, :]

    def check_photo(self, photo: Tensor) -> None:
        """Refuse a photo of another size than the one that was explained."""
        if photo.dim() != 4 or tuple(photo.shape[-2:]) != self.photo_size:
            raise InvalidRequest(
                f"the heat map is of a photo of {'×'.join(map(str, self.photo_size))} px (height × width), "
                f"not of {tuple(photo.shape)}; give the photo that was explained"
            )

    def overlay(self, photo: Tensor, style: str = "plain", legend: bool = True) -> display.Picture:
        """Return the photo (1, c, H, W) at its own size with the heat on it.

        `plain`: the photo, nearly grey, under a perceptually uniform colour map that covers it more where the heat
        is greater; the part that the network did not see is faded. Below the photo is a legend: a colour bar in the
        map's own units and the caption. `legend=False` leaves it out.
        `jet` (R4.3): the photo plus 0.4 × the heat in the JET map, both in 0..255, where a sum above 255 is cut off;
        no legend, and the part that the network did not see stays as it is.
        A map without any evidence shows the photo in grey, with a sentence on it.

        Raises:
            InvalidRequest: there is no such style, or the photo is of another size than the one explained.
        """
        if style not in overlay.STYLES:
            raise InvalidRequest(f"there is no style {style!r}; there are: {', '.join(overlay.STYLES)}")
        self.check_photo(photo)
        image = overlay.rgb(photo)
        if self.is_empty:
            return overlay.with_message(overlay.desaturate(image), self.empty_message())
        heat, visible = self.upsampled(photo), self.in_region()
        if style == "jet":
            return grid.picture(overlay.add_jet(image, heat, visible))
        picture = grid.picture(overlay.fade_unseen(overlay.cover(image, heat), visible))
        return overlay.with_legend(picture, self.caption(), self.full_heat) if legend else picture

    def picture(self) -> display.Picture:
        """Return the small map itself in colour, each of its cells a square, at least 224 px on its long side."""
        side = max(1, -(-TILE // max(self.map.shape)))
        cells = self.heat.repeat_interleave(side, 0).repeat_interleave(side, 1)
        return display.colormap_image(cells, overlay.COLOURS)

    def save(self, path: str | Path, photo: Tensor, style: str = "plain") -> Path:
        """Write the overlay as a PNG that carries its spec, and return the path.

        Raises:
            OutputRefused: it cannot be written.
            InvalidRequest: as `overlay`.
        """
        return write_file(Path(path), encode.png(self.overlay(photo, style), self.metadata()))

    def metadata(self) -> dict[str, Any]:
        """Return the metadata that a file of this heat map carries."""
        return {
            **self.spec,
            "top": [asdict(score) for score in self.top],
            "map_size": list(self.map.shape),
            "strongest": self.full_heat,
            "silent": self.is_empty,
            "caution": self.caution,
            "region": self.region._asdict(),
            "photo_size": list(self.photo_size),
        }

    def _repr_png_(self) -> bytes:
        return encode.png(self.picture(), self.metadata())
