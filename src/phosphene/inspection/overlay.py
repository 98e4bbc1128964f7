"""Drawing a heat map on a photo: the colours, the legend, and the sentence on an empty map."""

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from phosphene.images import captions, display, grid

STYLES = ("plain", "jet")
COLOURS = "inferno"  # perceptually uniform; its dark end vanishes into the photo
COVERAGE = 0.8  # how much of the photo the heat covers where it is greatest
JET_SHARE = 0.4  # R4.3
DESATURATION = 0.8  # how far the photo loses its own colours, which could be taken for heat
FADING = 0.5  # how far the part of a photo that the network does not see is faded to white
NARROWEST = 200  # least width of a legend, in pixels


def rgb(photo: Tensor) -> Tensor:
    """Return a photo (1, c, H, W) as (3, H, W) float64 in [0, 1]; of other than 3 channels, the mean in grey."""
    image = photo[0].detach().double().clamp(0, 1).cpu()
    return image if len(image) == 3 else image.mean(0, keepdim=True).expand(3, -1, -1)


def desaturate(image: Tensor) -> Tensor:
    """Return an image (3, h, w) without its colour."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=image.dtype).view(3, 1, 1)  # ITU-R BT.601
    return (image * weights).sum(0, keepdim=True).expand(3, -1, -1)


def colourise(heat: Tensor, colours: str) -> Tensor:
    """Return a heat (h, w) in [0, 1] in a colour map: (3, h, w) in [0, 1]."""
    from matplotlib import colormaps

    return torch.from_numpy(colormaps[colours](heat.double().numpy())[..., :3]).permute(2, 0, 1)


def cover(image: Tensor, heat: Tensor) -> Tensor:
    """Return an image (3, h, w), nearly grey, under its heat (h, w), which covers it more where it is greater."""
    share = COVERAGE * heat
    return (1 - share) * (image + DESATURATION * (desaturate(image) - image)) + share * colourise(heat, COLOURS)


def add_jet(image: Tensor, heat: Tensor, visible: Tensor) -> Tensor:
    """Return an image (3, h, w) plus 0.4 × its heat (h, w) in the JET map (R4.3), unchanged where not visible."""
    return (image + JET_SHARE * colourise(heat, "jet") * visible).clamp(0, 1)


def fade_unseen(image: Tensor, visible: Tensor) -> Tensor:
    """Return an image (3, h, w), paler where it is not visible (h, w) to the network."""
    return torch.where(visible, image, image + FADING * (1 - image))


def font_size(width: int) -> int:
    """Return the font size in pixels that suits a picture's width."""
    return min(26, max(11, width // 34))


def wrap_words(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return a text with line breaks between words, or inside a word that is longer than a line."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return "\n".join(line for line in lines if line)


def with_message(image: Tensor, text: str) -> display.Picture:
    """Return an image (3, h, w) as a picture with a sentence on a dark band across its middle."""
    picture = grid.picture(0.6 * image + 0.2)
    draw = ImageDraw.Draw(picture, "RGBA")
    font = captions.label_font(font_size(picture.width))
    lines = wrap_words(text, font, picture.width - font.size)
    middle = (picture.width / 2, picture.height / 2)
    _, top, _, bottom = draw.multiline_textbbox(middle, lines, font, anchor="mm", align="center")
    margin = font.size / 2
    draw.rectangle((0, top - margin, picture.width, bottom + margin), (0, 0, 0, 190))
    draw.multiline_text(middle, lines, "white", font, anchor="mm", align="center")
    return picture


def with_legend(picture: display.Picture, caption: str, full_heat: float) -> display.Picture:
    """Return a picture with a colour bar from 0 to `full_heat` below it, and a caption below that."""
    width = max(picture.width, NARROWEST)
    font = captions.label_font(font_size(width))
    unit = int(font.size)
    text = wrap_words(caption, font, width - 2 * unit)
    lines = text.count("\n") + 1
    sheet = Image.new("RGB", (width, picture.height + int(unit * (3.6 + 1.4 * lines))), "white")
    sheet.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(sheet)
    top, length = picture.height + unit // 2 + 1, width - 2 * unit
    sheet.paste(heat_bar(length, unit), (unit, top))
    for share, anchor in ((0.0, "la"), (0.5, "ma"), (1.0, "ra")):
        tick = unit + share * (length - 1)
        draw.line((tick, top + unit, tick, top + unit + unit // 4), "black")
        draw.text((tick, top + unit + unit // 3), f"{share * full_heat:.3g}", "black", font, anchor=anchor)
    draw.multiline_text((unit, top + int(unit * 2.7)), text, "black", font, spacing=unit * 0.2)
    return sheet


def heat_bar(length: int, height: int) -> display.Picture:
    """Return a bar of the colours from cold to hot, as they look on a white photo."""
    heat = torch.linspace(0, 1, length, dtype=torch.float64).expand(height, -1)
    return grid.picture(cover(torch.ones(3, height, length, dtype=torch.float64), heat))
