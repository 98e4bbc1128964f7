"""Raw heat maps of a batch, at the network's own input size."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from phosphene.inspection.attribution_methods import Cam
from phosphene.inspection.explain import Address, Target, explaining
from phosphene.network.model import Model


def heatmaps(
    model: Model,
    images: Tensor,
    targets: Sequence[Target] | Tensor | Target = None,
    layer: Address | None = None,
    method: str | Cam = "gradcam",
) -> tuple[Tensor, Tensor]:
    """Return raw maps (b, h, w) and logits (b, k) of images (b, c, h, w); see `explain`."""
    with explaining(model, layer, method) as explainer:
        return explainer.maps(images, targets)
