"""Parameterizations: the tensors that are optimised and the image they stand for.

Each is a function of the image's shape (n, c, h, w), a start, and options; it returns a `Parameterization`. `start` is
either an image (n, c, h, w) in [0, 1], or the `RandomDraws` for a random start. `like` has the device and dtype.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch
import torch.nn.functional as F
from safetensors.torch import load as load_safetensors
from torch import Tensor

from phosphene.errors import InvalidRequest
from phosphene.rendering.colour import correlate, decorrelate
from phosphene.rendering.transforms import RandomDraws

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DISC_EDGE = 0.075  # half sides over which the weight of a disc falls from .73 to .27, half of it on either side


def keep(progress: float | Tensor) -> None:
    """Keep the tensor as a step leaves it."""


@dataclass(frozen=True)
class Parameterization:
    """The optimised tensor, one row per image, and `image()`, the (n, c, h, w) image that it stands for.

    `project(progress)` follows each step: it brings the tensor to what is allowed at that share of the steps, 0 to 1.
    """

    tensor: Tensor
    image: Callable[[], Tensor]
    project: Callable[[float | Tensor], None] = keep


Shape = tuple[int, int, int, int]
Start = Tensor | RandomDraws


def offset_and_factor(unit: str, channels: int) -> tuple[Tensor, Tensor]:
    """Return (offset, factor), each (c, 1, 1) float64, with image = offset + factor · tensor, for a pixel unit.

    `byte`: 0..255, as in R1 and R4.2. `imagenet`: standard deviations from ImageNet's mean, as in R3; 0.5 ± 0.25 for
    networks of other than three channels. `one`: the image itself.

    Raises:
        InvalidRequest: `unit` is none of these.
    """
    if unit not in ("byte", "imagenet", "one"):
        raise InvalidRequest(f"the unit of pixels is byte, imagenet or one, not {unit!r}")
    if unit == "imagenet":
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.25,) * channels)
        offset, factor = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    else:
        scale = 1 / 255 if unit == "byte" else 1.0
        offset, factor = torch.zeros(channels, dtype=torch.float64), torch.full((channels,), scale, dtype=torch.float64)
    return offset.view(-1, 1, 1), factor.view(-1, 1, 1)


def pixels(
    shape: Shape,
    start: Start,
    like: Tensor,
    low: float = 128 / 255,
    high: float = 129 / 255,
    unit: str = "byte",
    whole: bool = False,
) -> Parameterization:
    """The pixels themselves, starting uniform in [low, high) of [0, 1], rounded down to whole bytes if `whole`.

    The optimised tensor, and so the step size, counts in `unit`. Values are not clipped to [0, 1].
    """
    offset, factor = (number.to(like) for number in offset_and_factor(unit, shape[1]))
    if isinstance(start, RandomDraws):
        image = start.uniform(low * 255, high * 255, shape[1:])
        image = (image.floor() if whole else image) / 255
    else:
        image = start
    tensor = ((image.to(like) - offset) / factor).requires_grad_()
    return Parameterization(tensor, lambda: offset + factor * tensor)


def frequencies(height: int, width: int) -> Tensor:
    """Return the frequency of each bin of a real Fourier transform, (h, w // 2 + 1), in cycles a pixel."""
    vertical = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    horizontal = torch.fft.rfftfreq(width, dtype=torch.float64)[None]
    squared: Tensor = vertical**2 + horizontal**2
    return squared.sqrt()


def to_logits(image: Tensor) -> Tensor:
    """Return the inverse of `sigmoid`, with black and white kept 0.2 % away from infinity."""
    return image.clamp(0.002, 0.998).logit()


def fourier(
    shape: Shape,
    start: Start,
    like: Tensor,
    deviation: float = 0.01,
    decay: float = 1.0,
    cutoff: float = math.inf,
    window: float = math.inf,
    contrast: float | None = None,
) -> Parameterization:
    """Fourier coefficients of uncorrelated colours, each scaled by 1 / frequency^decay, through a sigmoid.

    The scaling gives every frequency a learning rate in proportion to its strength in natural pictures (Olah et al.
    2017, "Preconditioning and parameterization"). A `cutoff` in cycles a pixel damps the finest detail, which
    resampling would lose: halved at that frequency, by 1 / (1 + (frequency / cutoff)^4). Random starts have
    coefficients of standard deviation `deviation`; images from them fade to their mean colour outside a `window`, see
    `disc`, and have within it a standard deviation that grows evenly over the steps to `contrast`.
    """
    _, channels, height, width = shape
    weight = frequency_weight(height, width, decay, cutoff).to(like)[..., None]  # for real and imaginary part
    from_noise = isinstance(start, RandomDraws)
    is_windowed = from_noise and window < math.inf
    inside = disc(height, width, window if is_windowed else math.inf).to(like)

    def image() -> Tensor:
        spectrum = torch.view_as_complex((weight * tensor).contiguous())
        # 4 brings the natural range of the sum to the sigmoid's
        colours = torch.fft.irfft2(spectrum, s=(height, width)) / 4
        if is_windowed:
            mean = spectrum.real[..., :1, :1] / (4 * height * width)
            colours = mean + inside * (colours - mean)
        return torch.sigmoid(correlate(colours))

    def project(progress: float | Tensor) -> None:
        if contrast is not None and from_noise:
            factor = progress * contrast / spread(image(), inside).clamp(min=1e-6)
            mean = tensor[..., :1, :1, :].clone()
            tensor.mul_(factor.view(-1, 1, 1, 1, 1))
            tensor[..., :1, :1, :] = mean

    if isinstance(start, RandomDraws):
        tensor = deviation * start.normal((channels, height, width // 2 + 1, 2)).to(like)
    else:
        tensor = torch.view_as_real(torch.fft.rfft2(4 * decorrelate(to_logits(start.to(like))))) / weight
    tensor = tensor.requires_grad_()
    return Parameterization(tensor, image, project)


def image_sum(values: Tensor) -> Tensor:
    """Return the sum over each image (n, c, h, w), (n, 1, 1, 1), one axis after the other.

    A sum over all axes at once is split over threads if the batch is one image, and then it rounds differently.
    """
    return values.sum(-1, keepdim=True).sum(-2, keepdim=True).sum(-3, keepdim=True)


def frequency_weight(height: int, width: int, decay: float, cutoff: float) -> Tensor:
    """Return by what each coefficient of a Fourier picture is multiplied, (h, w // 2 + 1)."""
    frequency = frequencies(height, width)
    scale = frequency.clamp(min=1 / max(height, width)) ** -decay / (1 + (frequency / cutoff) ** 4)
    return scale * math.sqrt(height * width)


def disc(height: int, width: int, radius: float) -> Tensor:
    """Return (h, w) weights: 1 inside an ellipse of `radius` half sides, 0 outside, with a soft edge between."""
    rows, columns = ((torch.arange(side, dtype=torch.float64) + 0.5) * 2 / side - 1 for side in (height, width))
    return torch.sigmoid((radius - torch.hypot(rows[:, None], columns)) / DISC_EDGE)


def spread(image: Tensor, weight: Tensor) -> Tensor:
    """Return (n,) the standard deviation of all values of images (n, c, h, w), pixels weighted by (h, w)."""
    share = weight / (weight.sum() * image.shape[1])
    mean = image_sum(share * image)
    return image_sum(share * (image - mean).square()).flatten().sqrt()


@cache
def natural_spectrum() -> Tensor:
    """Return the mean magnitude spectrum of natural photos, (3, 128, 65); see `bench/natural_statistics.py`."""
    data = files("phosphene").joinpath("data/spectrum.safetensors").read_bytes()
    magnitude: Tensor = load_safetensors(data)["magnitude"]
    return magnitude.double()


def natural_magnitude(channels: int, height: int, width: int) -> Tensor:
    """Return the natural spectrum for an image of that size, (c, h, w // 2 + 1), for `norm="ortho"`.

    It is interpolated bilinearly at the frequencies of that size. For other than three channels, every channel gets
    the spectrum of light.
    """
    spectrum = natural_spectrum().clone()
    # the file has no mean; frequencies below its lowest get the strength of that one, not less
    spectrum[:, 0, 0] = (spectrum[:, 0, 1] + spectrum[:, 1, 0]) / 2
    spectrum = spectrum if channels == 3 else spectrum[:1].expand(channels, -1, -1)
    rows, columns = spectrum.shape[1:]
    centred = torch.fft.fftshift(spectrum, dim=1)[None]
    # -1 to 1 over the rows -rows/2 ... rows/2 - 1 and the columns 0 ... columns - 1, in cycles per `rows` pixels
    vertical = (torch.fft.fftfreq(height, dtype=torch.float64) * rows + rows / 2) * 2 / (rows - 1) - 1
    horizontal = torch.fft.rfftfreq(width, dtype=torch.float64) * rows * 2 / (columns - 1) - 1
    grid = torch.stack(torch.meshgrid(vertical, horizontal, indexing="ij")[::-1], -1)[None]
    magnitude = F.grid_sample(centred, grid, padding_mode="border", align_corners=True)[0]
    magnitude = merge_mirrored_columns(magnitude, width, lambda column, mirrored: (column + mirrored) / 2)
    magnitude[:, 0, 0] = 0.0  # the spectrum does not set the mean
    return magnitude


def merge_mirrored_columns(spectrum: Tensor, width: int, merge: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return (..., h, w // 2 + 1) with the columns that mirror themselves merged with their mirror image.

    In a real picture's spectrum, the columns of horizontal frequency 0 and, for an even width, w / 2 hold every number
    twice: row -k is the conjugate of row k. The inverse transform silently drops anything else.
    """
    self_mirrored = [0, width // 2] if width % 2 == 0 else [0]
    columns = list(spectrum.unbind(-1))
    originals = torch.stack([columns[index] for index in self_mirrored], -1)
    mirrored = originals.flip(-2).roll(1, -2)
    for index, merged in zip(self_mirrored, merge(originals, mirrored).unbind(-1), strict=True):
        columns[index] = merged
    return torch.stack(columns, -1)


def maco(shape: Shape, start: Start, like: Tensor) -> Parameterization:
    """Free phases under the fixed magnitude spectrum of natural photos (Fel et al., "MACO", NeurIPS 2023, eq. 3)."""
    _, channels, height, width = shape
    magnitude = natural_magnitude(channels, height, width).to(like)

    def image() -> Tensor:
        phase = merge_mirrored_columns(tensor, width, lambda column, mirrored: (column - mirrored) / 2)
        spectrum = torch.polar(magnitude.expand_as(phase), phase)
        return torch.sigmoid(correlate(torch.fft.irfft2(spectrum, s=(height, width), norm="ortho")))

    if isinstance(start, RandomDraws):
        tensor = start.uniform(-math.pi, math.pi, (channels, height, width // 2 + 1)).to(like)
    else:
        tensor = torch.fft.rfft2(decorrelate(to_logits(start.to(like))), norm="ortho").angle()
    tensor = tensor.requires_grad_()
    return Parameterization(tensor, image)


PARAMETERIZATIONS: dict[str, Callable[..., Parameterization]] = {"pixels": pixels, "fourier": fourier, "maco": maco}
