"""The result of explaining: where on a photo the evidence for a class lies, and the pictures that show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from phosphene.errors import ChannelNotFound, InvalidRequest, nearest
from phosphene.images import captions, display, encode, grid
from phosphene.images.photo import Region
from phosphene.inspection.attribution_methods import CAUTIONS, CLASS_FREE, INPUT_METHODS, SHOWN_BY_SIZE
from phosphene.storage.atomic import write_file

STYLES = ("plain", "jet")
COLOURS = "inferno"  # perceptually uniform; its dark end vanishes into the photo
STRONGEST = 0.8  # how much of the photo the heat covers where it is greatest
JET_SHARE = 0.4  # R4.3
GREYED = 0.8  # how far the photo's own colours are taken away, lest they be read as heat
UNSEEN = 0.5  # how far the part of a photo that the network does not see is faded to white
QUANTILE = 0.99  # of an input gradient's positive values: what counts as full heat
TILE = 224  # least long side of the small map's picture, in pixels
NARROWEST = 200  # a legend is no narrower, in pixels


@dataclass(frozen=True)
class ClassScore:
    """A class and its probability."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True, eq=False)
class Heatmap:
    """Where a class score comes from.

    Attributes:
        map: (h, w) as computed: signed, unscaled, at the layer's own resolution; on the CPU.
        method: its name; `layer`: the layer's path, "input" for gradients at the image itself.
        target: the class, with its probability.
        top: the five most probable classes, most probable first.
        region: the part of the photo that the network saw, and the map covers.
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
        """The part of the map that is shown, (h, w): what is positive (R4.3); of mere gradients the size."""
        return self.map.abs() if self.method in SHOWN_BY_SIZE else self.map.relu()

    @property
    def silent(self) -> bool:
        """Whether there is nothing to show, no position with a positive value: nothing speaks for this class here."""
        return not bool(self.evidence.any())

    @property
    def caution(self) -> str:
        """What to keep in mind with this method, empty for most."""
        return CAUTIONS.get(self.method, "")

    @property
    def strongest(self) -> float:
        """The value that counts as full heat: the maximum; at the input the 99th percentile of what is positive.

        A few pixels of an input gradient exceed all others many times.
        """
        if self.silent or self.method not in INPUT_METHODS:
            return float(self.evidence.max())
        return float(self.evidence[self.evidence > 0].double().quantile(QUANTILE))

    @property
    def heat(self) -> Tensor:
        """The map for the eye, (h, w) in [0, 1]: `evidence`, of which `strongest` is 1."""
        return self.evidence if self.silent else (self.evidence / self.strongest).clamp(0, 1)

    def __repr__(self) -> str:
        size = "×".join(map(str, self.map.shape))
        return f"Heatmap({self.method} of {self.target.name!r} at {self.layer}, {size}{', silent' * self.silent})"

    def caption(self) -> str:
        """Return what a picture of this shows, in words."""
        subject = "whatever the class" if self.method in CLASS_FREE else named(self.target)
        return f"{subject} — {self.method} at {self.layer}"

    def enlarged(self, photo: Tensor) -> Tensor:
        """Return the heat for every pixel of the whole photo (1, c, H, W): (H, W) in [0, 1], 0 where it was not seen.

        Bilinear, with the centres of the map's cells spread evenly over the region.

        Raises:
            InvalidRequest: the photo is of another size than the one explained.
        """
        self.check_photo(photo)
        down, across = self.places()
        where = torch.stack([across.expand(len(down), -1), down[:, None].expand(-1, len(across))], -1)
        heat = F.grid_sample(
            self.heat[None, None].double(), where[None], "bilinear", padding_mode="border", align_corners=False
        )
        return (heat[0, 0] * self.seen()).to(self.map.dtype).clamp(0, 1)

    def places(self) -> tuple[Tensor, Tensor]:
        """Return where in the region the middles of the photo's rows (H,) and columns (W,) lie: its borders are ±1."""
        rows, columns = (torch.arange(side, dtype=torch.float64) + 0.5 for side in self.photo_size)
        region = self.region
        return 2 * (rows - region.top) / region.height - 1, 2 * (columns - region.left) / region.width - 1

    def seen(self) -> Tensor:
        """Return for every pixel of the photo (H, W) whether its middle lies in the region."""
        down, across = (place.abs() <= 1 for place in self.places())
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

        `plain`: the photo, nearly grey, under a perceptually uniform colour map that covers it the more
        the greater the heat; below the photo a legend with a colour bar in the map's own units and the caption, which
        `legend=False` leaves out; what the network did not see is faded. `jet`: R4.3: the photo plus 0.4 ×
        the heat in the JET map, both in 0..255, where a sum above 255 is cut off; no legend; what the network did not
        see stays as it is.
        A silent map shows the photo in grey, with a sentence on it.

        Raises:
            InvalidRequest: there is no such style, or the photo is of another size than the one explained.
        """
        if style not in STYLES:
            raise InvalidRequest(f"there is no style {style!r}; there are: {', '.join(STYLES)}")
        self.check_photo(photo)
        if self.silent:
            return written_on(desaturate(rgb(photo)), self.sentence())
        heat = self.enlarged(photo)
        if style == "jet":
            return grid.picture(jet(rgb(photo), heat, self.seen()))
        covered = grid.picture(fade_unseen(covering(rgb(photo), heat), self.seen()))
        return with_legend(covered, self.caption(), self.strongest) if legend else covered

    def sentence(self) -> str:
        """Return what there is to say of a silent map."""
        return f"nothing speaks for {self.target.name} at {self.layer}"

    def picture(self) -> display.Picture:
        """Return the small map itself in colour, each of its cells a square, at least 224 px on its long side."""
        side = max(1, -(-TILE // max(self.map.shape)))
        cells = self.heat.repeat_interleave(side, 0).repeat_interleave(side, 1)
        return display.colormap_image(cells, COLOURS)

    def save(self, path: str | Path, photo: Tensor, style: str = "plain") -> Path:
        """Write the overlay as a PNG that carries its spec, and return the path.

        Raises:
            OutputRefused: it cannot be written.
            InvalidRequest: as `overlay`.
        """
        return write_file(Path(path), encode.png(self.overlay(photo, style), self.metadata()))

    def metadata(self) -> dict[str, Any]:
        """Return what a file of this carries about itself."""
        return {
            **self.spec,
            "top": [asdict(guess) for guess in self.top],
            "map_size": list(self.map.shape),
            "strongest": self.strongest,
            "silent": self.silent,
            "caution": self.caution,
            "region": self.region._asdict(),
            "photo_size": list(self.photo_size),
        }

    def _repr_png_(self) -> bytes:
        return encode.png(self.picture(), self.metadata())


def is_pair(logits: Tensor, labels: Sequence[str]) -> bool:
    """Return whether one logit stands for two classes: it speaks for the second, and its opposite for the first."""
    return logits.shape[1] == 1 and len(labels) == 2


def chosen_scores(logits: Tensor, chosen: Sequence[int], labels: Sequence[str]) -> Tensor:
    """Return the logit (b,) of each image's chosen class, of logits (b, k)."""
    indices = torch.tensor(chosen, device=logits.device)
    if is_pair(logits, labels):
        return logits[:, 0] * (2 * indices - 1)
    return logits.gather(1, indices[:, None])[:, 0]


def probabilities(logits: Tensor, labels: Sequence[str]) -> Tensor:
    """Return the probabilities (b, k): softmax, or the sigmoid of a single logit; what are probabilities, as they are.

    A single logit with two class names gives both probabilities, (b, 2).
    """
    if logits.shape[1] == 1:
        second = logits.sigmoid()
        return torch.cat([1 - second, second], 1) if is_pair(logits, labels) else second
    if bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-3).all()):
        return logits  # the network ends in a softmax of its own that could not be taken off
    return logits.softmax(1)


def class_indices(targets: Any, logits: Tensor, labels: Sequence[str]) -> list[int]:
    """Return the class of each image: the most probable one where none is asked for."""
    if isinstance(targets, Tensor):
        targets = targets.tolist()
    asked = [targets] * len(logits) if targets is None or isinstance(targets, int | str) else list(targets)
    if len(asked) != len(logits):
        raise InvalidRequest(f"there are {len(asked)} targets for {len(logits)} images; give one an image, or one")
    count = 2 if is_pair(logits, labels) else logits.shape[1]
    likely = probabilities(logits.detach(), labels).argmax(1).tolist()
    return [top if one is None else class_index(one, count, labels) for one, top in zip(asked, likely, strict=True)]


def class_index(target: int | str, count: int, labels: Sequence[str]) -> int:
    """Return the index of a class among `count`, by index or by name.

    Case does not matter. A name counts that equals the one asked for, else the only one that contains it.

    Raises:
        ChannelNotFound: none does, or several do.
    """
    if isinstance(target, str):
        wanted = plain(target)
        names = [plain(name) for name in labels[:count]]
        found = [index for index, name in enumerate(names) if name == wanted]
        if not found and wanted.isascii() and wanted.isdigit():
            return class_index(int(wanted), count, labels)
        found = found or [index for index, name in enumerate(names) if wanted and wanted in name]
        if len(found) == 1:
            return found[0]
        raise ChannelNotFound(unclear(target, found, count, labels))
    if isinstance(target, bool) or not 0 <= target < count:
        raise ChannelNotFound(f"there is no class {target}: the network has {count}, 0 to {count - 1}")
    return int(target)


def plain(name: str) -> str:
    return name.replace("_", " ").strip().casefold()


def unclear(target: str, found: Sequence[int], count: int, labels: Sequence[str]) -> str:
    """Return what to say of a class name that several classes have, or none."""
    if not labels:
        return f"the network has no class names to find {target!r} among; give an index, 0 to {count - 1}"
    if not found:
        return f"no class is called {target!r}; the nearest are: {nearest(plain(target), labels)}"
    listed = ", ".join(f"{index} {labels[index]}" for index in found[:12])
    more = f" and {len(found) - 12} more" if len(found) > 12 else ""
    return f"{target!r} may be any of {len(found)} classes: {listed}{more}; give the whole name or the index"


def class_name(index: int, labels: Sequence[str], count: int) -> str:
    """Return a class's name; a network's only output without names is no class but what the network says yes to."""
    if index < len(labels) and len(labels) <= max(count, 2):
        return labels[index]
    return "the only output" if count == 1 else f"class {index}"


def named(guess: ClassScore) -> str:
    """Return a class and its probability in words."""
    return f"{guess.name} {guess.probability:.1%}"


def rgb(photo: Tensor) -> Tensor:
    """Return a photo (1, c, H, W) as (3, H, W) float64 in [0, 1]; of other than 3 channels, the mean in grey."""
    image = photo[0].detach().double().clamp(0, 1).cpu()
    return image if len(image) == 3 else image.mean(0, keepdim=True).expand(3, -1, -1)


def desaturate(image: Tensor) -> Tensor:
    """Return an image (3, h, w) without its colour."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=image.dtype).view(3, 1, 1)  # ITU-R BT.601
    return (image * weights).sum(0, keepdim=True).expand(3, -1, -1)


def painted(heat: Tensor, colours: str) -> Tensor:
    """Return a heat (h, w) in [0, 1] in a colour map: (3, h, w) in [0, 1]."""
    from matplotlib import colormaps

    return torch.from_numpy(colormaps[colours](heat.double().numpy())[..., :3]).permute(2, 0, 1)


def covering(image: Tensor, heat: Tensor) -> Tensor:
    """Return an image (3, h, w) under its heat (h, w): greyed, and the hotter the more covered."""
    share = STRONGEST * heat
    return (1 - share) * (image + GREYED * (desaturate(image) - image)) + share * painted(heat, COLOURS)


def jet(image: Tensor, heat: Tensor, seen: Tensor) -> Tensor:
    """Return an image (3, h, w) plus 0.4 × its heat (h, w) in the JET map (R4.3); unseen, it stays as it is."""
    return (image + JET_SHARE * painted(heat, "jet") * seen).clamp(0, 1)


def fade_unseen(image: Tensor, seen: Tensor) -> Tensor:
    """Return an image (3, h, w) that is paler where it was not seen (h, w)."""
    return torch.where(seen, image, image + UNSEEN * (1 - image))


def letter_size(width: int) -> int:
    """Return a height of letters in pixels that suits a picture's width."""
    return min(26, max(11, width // 34))


def wrapped(text: str, letters: ImageFont.FreeTypeFont, width: int) -> str:
    """Return a text with line breaks between words, or inside a word that is longer than a line."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if letters.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and letters.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return "\n".join(line for line in lines if line)


def written_on(image: Tensor, text: str) -> display.Picture:
    """Return an image (3, h, w) as a picture with a sentence on a dark band in its middle."""
    picture = grid.picture(0.6 * image + 0.2)
    draw = ImageDraw.Draw(picture, "RGBA")
    letters = captions.lettering(letter_size(picture.width))
    lines = wrapped(text, letters, picture.width - letters.size)
    middle = (picture.width / 2, picture.height / 2)
    _, top, _, bottom = draw.multiline_textbbox(middle, lines, letters, anchor="mm", align="center")
    margin = letters.size / 2
    draw.rectangle((0, top - margin, picture.width, bottom + margin), (0, 0, 0, 190))
    draw.multiline_text(middle, lines, "white", letters, anchor="mm", align="center")
    return picture


def with_legend(picture: display.Picture, caption: str, strongest: float) -> display.Picture:
    """Return a picture with a colour bar from 0 to `strongest` below it, and a caption below that."""
    width = max(picture.width, NARROWEST)
    letters = captions.lettering(letter_size(width))
    unit = int(letters.size)
    text = wrapped(caption, letters, width - 2 * unit)
    lines = text.count("\n") + 1
    sheet = Image.new("RGB", (width, picture.height + int(unit * (3.6 + 1.4 * lines))), "white")
    sheet.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(sheet)
    top, length = picture.height + unit // 2 + 1, width - 2 * unit
    sheet.paste(bar(length, unit), (unit, top))
    for share, anchor in ((0.0, "la"), (0.5, "ma"), (1.0, "ra")):
        place = unit + share * (length - 1)
        draw.line((place, top + unit, place, top + unit + unit // 4), "black")
        draw.text((place, top + unit + unit // 3), f"{share * strongest:.3g}", "black", letters, anchor=anchor)
    draw.multiline_text((unit, top + int(unit * 2.7)), text, "black", letters, spacing=unit * 0.2)
    return sheet


def bar(length: int, height: int) -> display.Picture:
    """Return the colours from cold to hot, as they lie over a white photo."""
    heat = torch.linspace(0, 1, length, dtype=torch.float64).expand(height, -1)
    return grid.picture(covering(torch.ones(3, height, length, dtype=torch.float64), heat))
