"""Display rules and colour maps: from the values of a tensor to the levels of a screen."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Picture = Image.Image


def clip(images: Tensor) -> Tensor:
    """Return the images (n, c, h, w) clipped to [0, 1]."""
    return images.clamp(0, 1)


def stretch(images: Tensor) -> Tensor:
    """Return each image stretched from its own minimum..maximum to 0..1 (R1, step 4); a flat one becomes 0."""
    low, high = images.flatten(1).amin(1), images.flatten(1).amax(1)
    span = (high - low).clamp(min=torch.finfo(images.dtype).tiny)
    return (images - low.view(-1, 1, 1, 1)) / span.view(-1, 1, 1, 1)


def standardise(images: Tensor) -> Tensor:
    """Return each image minus its mean, over its standard deviation + 1e-5, × 0.1, + 0.5, clipped (R4.2, on 0..255)."""
    levels = images * 255
    mean = levels.flatten(1).mean(1).view(-1, 1, 1, 1)
    deviation = levels.flatten(1).std(1, correction=0).view(-1, 1, 1, 1)
    return ((levels - mean) / (deviation + 1e-5) * 0.1 + 0.5).clamp(0, 1)


def standardise_map(maps: Tensor) -> Tensor:
    """Return each map (n, h, w) minus its mean, over its deviation, × 64, + 128, in whole 0..255 (R4.1); flat: 128."""
    deviation = maps.std((1, 2), correction=0, keepdim=True)
    levels = (maps - maps.mean((1, 2), keepdim=True)) / torch.where(deviation > 0, deviation, 1) * 64 + 128
    return levels.nan_to_num(128).clamp(0, 255).floor()


DISPLAYS = {"clip": clip, "stretch": stretch, "standardise": standardise}


def to_bytes(images: Tensor) -> Tensor:
    """Return images in [0, 1] as uint8 0..255, rounded to the nearest."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def colormap_image(values: Tensor, colours: str = "viridis") -> Picture:
    """Return values (h, w) in [0, 1] as an RGB picture in a colour map of matplotlib's; values outside are clipped."""
    from matplotlib import colormaps  # takes a fifth of a second, which a render need not wait for

    rgba = colormaps[colours](values.double().clamp(0, 1).cpu().numpy(), bytes=True)
    return Image.fromarray(rgba[..., :3].copy())


def apply_colormap(levels: Tensor, colours: str = "viridis") -> Tensor:
    """Return levels 0..255 (…), uint8, as colours (…, 3), uint8, of a colour map of matplotlib's; `gray` is exact."""
    if colours == "gray":  # matplotlib's table rounds down: some levels of it are one too dark
        return levels.cpu()[..., None].repeat_interleave(3, -1)
    from matplotlib import colormaps  # as above

    table = colormaps[colours](np.linspace(0, 1, 256), bytes=True)[:, :3]
    return torch.from_numpy(np.take(table, levels.cpu().numpy(), axis=0))


def resize_maps(levels: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps (n, h, w) at a size: a side shrinks by averaging areas, and grows by repeating."""
    height, width = (min(pair) for pair in zip(levels.shape[1:], size, strict=True))
    small = levels if (height, width) == levels.shape[1:] else F.adaptive_avg_pool2d(levels, (height, width))
    return F.interpolate(small[None], size, mode="nearest-exact")[0]
