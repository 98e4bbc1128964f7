"""Objectives that compare a picture with the photo that it starts from.

At a layer they read x, its output for the picture, and y, its output for the photo under the same transforms.
"""

import torch
from torch import Tensor

from phosphene.rendering.objectives import Acts, Address, InPhoto, Objective, check_map

TINY = 1e-12  # keeps a layer that returns 0 throughout from a division by 0
EVENLY = 0.25  # the share of an accent's weights that is spread evenly over the map


def accent(layer: Address, channel: int) -> Objective:
    """What excites a channel in the photo: how much more it answers, above all where the photo excites it.

    The score is the mean over (h, w) of x - y of that channel, weighted by the part of y above y's mean, in standard
    deviations of the layer's y over all channels. It is 0 for the photo itself. A quarter of the weight is spread
    evenly, and all of it at the border, where a map answers to the network's padding. Hamblin et al. ("Feature
    Accentuation", 2024) take the plain mean of x, or x at one position; the weights keep the picture from growing
    things where the photo has nothing of them.
    """

    def score(acts: Acts, image: Tensor, items: Tensor) -> Tensor:
        check_map(acts[layer], layer, channel)
        picture, photos = acts[layer][:, channel], acts[InPhoto(layer)]
        photo = photos[:, channel]
        above = without_border((photo - photo.mean((-2, -1), keepdim=True)).clamp(min=0)) + TINY
        weights = (1 - EVENLY) * above / above.mean((-2, -1), keepdim=True) + EVENLY
        gain = ((picture - photo) * weights).mean((-2, -1))
        return gain / (photos.flatten(1).std(1, correction=0) + TINY)

    spec = {"objective": "accent", "layer": layer, "channels": [channel]}
    return Objective((layer,), 1, score, spec, (f"filter_{channel}",), compared=(layer,))


def without_border(maps: Tensor) -> Tensor:
    """Return maps (b, h, w) that are 0 in the outer twelfth of each side, rounded to whole positions."""
    inside = torch.zeros_like(maps[:1])
    top, left = (round(side / 12) for side in maps.shape[-2:])
    inside[:, top : maps.shape[1] - top, left : maps.shape[2] - left] = 1
    return maps * inside


def caricature(layer: Address, power: float = 1.0) -> Objective:
    """More of all that a layer sees in the photo: (u · v / |v|²) · cos(u, v)^power, 1 for the photo itself.

    u and v are x and y less each channel's mean in the photo: what a channel returns everywhere would drown what it
    sees. The dot product asks for more, the cosine for more of the same (Olah et al. 2017; Lucid's `dot_compare`). A
    cosine below 0.1 counts as 0.1.
    """

    def score(acts: Acts, image: Tensor, items: Tensor) -> Tensor:
        photo = acts[InPhoto(layer)]
        mean = photo.mean((-2, -1), keepdim=True) if photo.dim() == 4 else 0
        picture, photo = ((act - mean).flatten(1) for act in (acts[layer], photo))
        product, square = (picture * photo).mean(1), photo.square().mean(1) + TINY
        cosine = product / (picture.square().mean(1) * square + TINY).sqrt()
        return product / square * cosine.clamp(min=0.1) ** power

    spec = {"objective": "caricature", "layer": layer, "power": power}
    return Objective((layer,), 1, score, spec, ("caricature",), compared=(layer,))


def perceptual_distance(layer: Address) -> Objective:
    """How far a layer's output has left that for the photo: |x - y|² / |y|², 0 for the photo itself.

    Subtract some of it at an early layer to keep a picture close to its photo (Hamblin et al. 2024, section 3.3).
    """

    def score(acts: Acts, image: Tensor, items: Tensor) -> Tensor:
        picture, photo = acts[layer].flatten(1), acts[InPhoto(layer)].flatten(1)
        return (picture - photo).square().mean(1) / (photo.square().mean(1) + TINY)

    spec = {"objective": "perceptual_distance", "layer": layer}
    return Objective((layer,), 1, score, spec, ("perceptual_distance",), compared=(layer,))
