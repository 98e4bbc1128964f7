"""The number format in which a network runs during gradient ascent.

The first steps decide what a picture becomes: if they run in float32, it looks the same in the end, while
rounding from the start leads to another (decision 7). So bfloat16 starts after the first fifth, and the scores of
finished pictures are always those of the network as it is.
"""

import math
from typing import Any

import torch
from torch import nn

from phosphene.errors import InvalidRequest
from phosphene.network.model import Model
from phosphene.rendering.recipes import Recipe

FLOAT32_DIVISOR = 5  # the first fifth of the steps is not in bfloat16
FORMATS = ("fp32", "bf16", "auto")


def chosen_precision(model: Model, precision: str) -> str:
    """Return `fp32` or `bf16`; for `auto`, the one that suits the network and its device.

    `auto` is bfloat16 where that is faster and leads to the same pictures: on a device that multiplies faster in it,
    for networks in float32 whose convolutions are dense. Grouped and depthwise convolutions are slower in it on CPUs,
    and their pictures differ (decision 13). The choice follows this rule, not timing, so that the same command makes
    the same pictures.

    Raises:
        InvalidRequest: `precision` is none of these.
    """
    if precision not in FORMATS:
        raise InvalidRequest(f"precision is fp32, bf16 or auto, not {precision!r}")
    if precision != "auto":
        return precision
    return "bf16" if is_dense(model) and multiplies_bfloat16(model.prototype_tensor.device) else "fp32"


def float32_steps(recipe: Recipe, precision: str) -> int | None:
    """Return how many steps come before bfloat16, or None if no step is in bfloat16."""
    return None if precision == "fp32" else math.ceil(len(recipe.sizes) * recipe.steps / FLOAT32_DIVISOR)


def is_dense(model: Model) -> bool:
    """Return whether a network is in float32 and has convolutions, none of them grouped."""
    groups = [module.groups for module in model.modules.values() if isinstance(module, nn.Conv2d)]
    return model.prototype_tensor.dtype == torch.float32 and set(groups) == {1}


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device makes more products a second in bfloat16 than in float32.

    Of processors these are the ones with AMX tiles, and AMD's with AVX-512 BF16. On Intel's, AVX-512 BF16 makes half as
    many as AVX-512 does in float32 (decision 13).
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    cpu_capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)
    capabilities = cpu_capabilities() if device.type == "cpu" else {}
    is_intel = str(capabilities.get("cpu_name", "")).startswith("Intel")
    return bool(capabilities.get("amx_bf16") or (capabilities.get("avx512_bf16") and not is_intel))
