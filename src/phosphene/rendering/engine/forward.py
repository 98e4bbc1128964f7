"""Less work, same answer: what of a forward pass an objective does not need.

Four shortcuts, each of them exact, each left out where it does not apply:

- `linear`: the mean of a convolution's channel, or its value at a position, is linear in what the convolution is given.
  So the convolution itself need not run: the gradient of that number with respect to its input is found once, and the
  number is the sum of input × gradient.
- `folded`: batch normalisations are folded into the convolutions before them, and weights lie in memory as the
  convolutions of a CPU want them (`folding.py`).
- `subpixel`: on a CPU, a convolution of few channels, such as a network's first, finds the gradient with respect to the
  picture several pixels at a time (`subpixel.py`).
- `cropped`: a neuron sees no more than its receptive field, so that only this part of the picture has to go through the
  network. A crop is tried on noise first, and left out where it gives another value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn

from phosphene.network.batchnorm_folding import has_hooks, is_patched
from phosphene.network.layers import Layer
from phosphene.network.memory import channels_last_on_cpu
from phosphene.network.model import Model
from phosphene.rendering.engine.bf16_weights import Bf16Weights
from phosphene.rendering.engine.linear_readout import LinearReadout
from phosphene.rendering.engine.receptive_crop import receptive_crop_of
from phosphene.rendering.engine.subpixel_backward import few_channel_convolutions, subpixel
from phosphene.rendering.gradient_ascent import ReadActivations
from phosphene.rendering.objectives import Acts, Address, Objective

SHORTCUTS = ("linear", "folded", "subpixel", "cropped")


class FastForward(NamedTuple):
    """What reads no more of a network than an objective needs; `taken` says which shortcuts it has found to apply."""

    read: ReadActivations
    taken: Callable[[], tuple[str, ...]]


@contextmanager
def fast_forward_pass(
    model: Model, objective: Objective, shortcuts: Sequence[str] = SHORTCUTS
) -> Iterator[FastForward]:
    """Borrow a network and yield what reads as much of it as an objective needs; see `Model.reading`."""
    found = {one: model.find(one) for one in objective.reads}
    # a layer that has not the channels says so itself, when it is scored
    layers = {one: layer for one, layer in found.items() if max(objective.reads[one].channels) < (layer.channels or 0)}
    plain = [one for one, layer in layers.items() if "linear" in shortcuts and is_plain(model, layer)]
    folding = model.folding(objective.layers) if "folded" in shortcuts else None
    left_out = {module_of(model, layers[one]) for one in plain}
    first = (
        few_channel_convolutions(one for one in model.modules.values() if one not in left_out)
        if "subpixel" in shortcuts
        else []
    )
    low = Bf16Weights(model.modules.values())
    with model.reading(objective.layers, inputs=plain) as borrowed:

        def read(image: Tensor) -> dict[Address, Tensor]:
            with folding.folded() if folding else nullcontext(), subpixel(first), low.weights():
                return borrowed(channels_last_on_cpu(image))

        functionals = {one: LinearReadout(module_of(model, layers[one]), one, objective.reads[one]) for one in plain}
        cropping = receptive_crop_of(objective, layers, functionals, read) if "cropped" in shortcuts else None

        def run(image: Tensor, items: Tensor) -> Acts:
            if cropping and (crop := cropping.of(image)):
                act = read(image[..., crop.rows, crop.columns])[cropping.layer]
                return {cropping.layer: cropping.numbers(act, items, crop.position)}
            acts = read(image)
            return {one: functionals[one](act, items) if one in functionals else act for one, act in acts.items()}

        def taken() -> tuple[str, ...]:
            crops = cropping is not None and any(cropping.crops.values())
            applies = {
                "linear": bool(functionals),
                "folded": bool(folding and folding.pairs),
                "subpixel": bool(first),
                "cropped": crops,
            }
            return tuple(name for name, one in applies.items() if one)

        yield FastForward(run, taken)


def module_of(model: Model, layer: Layer) -> Any:
    """Return the module of a layer."""
    return model.modules[layer.place.path]


def is_plain(model: Model, layer: Layer) -> bool:
    """Return whether a layer is a convolution of PyTorch's own, which nobody has changed or watches."""
    module = module_of(model, layer)
    return type(module) is nn.Conv2d and not is_patched(module) and not has_hooks(module)
