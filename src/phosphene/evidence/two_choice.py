"""The two-choice task: does a picture tell which of two photos excites its filter more?

People who are shown a filter's picture choose between a photo that excites the filter strongly and one that hardly does
(Borowski et al., ICLR 2021, "Exemplary natural images explain CNN activations better than state-of-the-art feature
visualization"). Here another network chooses in their place, the photo whose features are more like the picture's
(Zimmermann et al., NeurIPS 2024, "Measuring per-unit interpretability at scale without humans"). The share of right
choices is 1 for a picture that tells everything, and .5 for one that tells nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

STRONGEST = 0.04  # the share of the photos that count as strong: half of them explain, half are asked for
WEAK_FROM = 0.3  # the share of the photos that are too strong to be weak
WEAK = 0.1  # the share of the photos that are taken as weak, evenly spread over the others


class Choices(NamedTuple):
    """Indices of photos: of those that explain a filter, strongest first, and of those that are chosen between."""

    explaining: Tensor
    strong: Tensor
    weak: Tensor


def choices(activations: Tensor) -> Choices:
    """Return the photos of the task for one filter, given how strongly each photo excites it, (n,).

    Of 1,000 photos: 20 of the 40 strongest explain, the other 20 and 100 of the ranks 300 to 1,000 are chosen between.
    """
    order, count = activations.argsort(descending=True, stable=True), len(activations)
    top = order[: max(2, round(STRONGEST * count))]
    weak = torch.linspace(round(WEAK_FROM * count), count - 1, max(1, round(WEAK * count))).round().long()
    return Choices(top[0::2], top[1::2], order[weak])


class Style(NamedTuple):
    """The mean and the standard deviation over space of every channel of some layers: (n, 2c) a layer."""

    layers: tuple[Tensor, ...]

    def standardised(self, photos: "Style") -> Tensor:
        """Return (n, k) rows whose inner products are cosines, summed over the layers.

        Every feature is first taken in standard deviations from its mean over `photos`.
        """
        rows = []
        for features, reference in zip(self.layers, photos.layers, strict=True):
            standard = (features - reference.mean(0)) / reference.std(0).clamp(min=1e-6)
            rows.append(standard / standard.norm(dim=1, keepdim=True).clamp(min=1e-9))
        return torch.cat(rows, 1)


def style(maps: Sequence[Tensor]) -> Style:
    """Return the style of images from their maps (n, c, h, w) at some layers."""
    return Style(tuple(torch.cat([act.mean((-2, -1)), act.std((-2, -1))], 1) for act in maps))


def share_right(explanation: Tensor, photos: Tensor, chosen: Choices) -> float:
    """Return the share of pairs of a strong and a weak photo of which the strong one is more like the explanation.

    Args:
        explanation: (e, k) standardised styles of one or more pictures; a photo is as similar as on average to them.
        photos: (n, k) those of the photos.
        chosen: the photos of the task.
    """
    similarity = photos @ explanation.mean(0)
    strong, weak = similarity[chosen.strong][:, None], similarity[chosen.weak][None]
    return float(((strong > weak).double() + (strong == weak).double() / 2).mean())
