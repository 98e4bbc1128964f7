"""What excites a filter in a visitor's photo, drawn into it: two pictures, between which a slider blends."""

import math
import re
from typing import Any

from torch import Tensor

from phosphene.images import grid
from phosphene.network.model import Model
from phosphene.rendering.accentuation import accentuate
from phosphene.web.live.photo import webp_bytes
from phosphene.web.live.render_request import data_uri, finite_or_none

AMOUNTS = [eighth / 8 for eighth in range(9)]  # at which the response is measured
SIDE, MAX_PIXELS = 224, 224 * 340  # short side and size of the pictures: other visitors wait meanwhile
NUMBER = re.compile("[0-9]{1,7}")


def accentuation(model: Model, photo: Tensor, layer: str, channel: str | None) -> dict[str, Any]:
    """Return a photo, the same with what excites a filter drawn into it, and the responses between, in JSON terms.

    `channel` is the filter's number as it was typed, None for all that the layer sees. Blending the two pictures by
    opacity gives the picture of an amount, and `responses` has the filter's mean at each of the `amounts`.
    """
    short, long = sorted(photo.shape[-2:])
    size = min(short, SIDE, max(1, math.isqrt(MAX_PIXELS * short // long)))
    number: Any = int(channel) if channel and NUMBER.fullmatch(channel) else channel  # anything else is refused there
    drawn = accentuate(model, photo, layer, number, AMOUNTS, size=size, progress=False)
    pictures = (grid.picture(drawn.displayed()[index]) for index in (0, -1))
    before, after = (data_uri("image/webp", webp_bytes(picture)) for picture in pictures)
    responses = [finite_or_none(float(score)) for score in drawn.scores]
    return {"before": before, "after": after, "amounts": AMOUNTS, "responses": responses}
