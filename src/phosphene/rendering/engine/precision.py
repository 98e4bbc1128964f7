"""The number format in which a network is run while pictures climb.

What a picture becomes is decided in its first steps: with those in float32 it ends as the same picture to the eye,
where rounding from the start on leads to another (decision 7). So bfloat16 sets in after the first fifth, and scores
that are kept are always those of the network as it is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from phosphene.errors import InvalidRequest
from phosphene.network.model import Model
from phosphene.rendering.recipes import Recipe

FLOAT32_SHARE = 5  # the first one in so many steps of a climb is not in bfloat16
FORMATS = ("fp32", "bf16", "auto")


def chosen_precision(model: Model, precision: str) -> str:
    """Return `fp32` or `bf16`, for `auto` the one that suits the network and where it computes.

    `auto` is bfloat16 where that is faster and was found to lead to the same pictures: on a processor that multiplies
    in it, for networks in float32 whose convolutions are dense. Grouped and depthwise ones are slower in it on CPUs,
    and their pictures differ. It goes by rule, not by timing, so that the same command makes the same pictures.

    Raises:
        InvalidRequest: there is no such format.
    """
    if precision not in FORMATS:
        raise InvalidRequest(f"precision is fp32, bf16 or auto, not {precision!r}")
    if precision != "auto":
        return precision
    return "bf16" if is_dense(model) and multiplies_bfloat16(model.like.device) else "fp32"


def float32_steps(recipe: Recipe, precision: str) -> int | None:
    """Return how many steps come before bfloat16 sets in, None where it never does."""
    return None if precision == "fp32" else math.ceil(len(recipe.sizes) * recipe.steps / FLOAT32_SHARE)


def is_dense(model: Model) -> bool:
    """Return whether a network is in float32 and has convolutions, none of them grouped."""
    groups = [one.groups for one in model.modules.values() if isinstance(one, nn.Conv2d)]
    return model.like.dtype == torch.float32 and set(groups) == {1}


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions that multiply in bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    of_cpu: Any = getattr(torch.cpu, "get_capabilities", dict)
    known = of_cpu() if device.type == "cpu" else {}
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
