"""Less work, same answer: the parts of a forward pass that an objective needs.

Four shortcuts, each of them exact, each left out where it does not apply:

- `linear`: the mean of a convolution's channel, or its value at a position, is linear in the convolution's input. So
  the convolution need not run: the gradient of that number with respect to the input is computed once, and the number
  is the sum of input × gradient (`linear_readout.py`).
- `folded`: batch normalisations are folded into the convolutions before them, and weights lie in memory in the layout
  that the convolutions of a CPU prefer (`network/batchnorm_folding.py`).
- `subpixel`: on a CPU, a convolution of few channels, such as a network's first, computes the gradient with respect to
  the picture several pixels at a time (`subpixel_backward.py`).
- `cropped`: a neuron sees only its receptive field, so only this part of the picture goes through the network. A crop
  is tried on noise first, and left out if it gives another value (`receptive_crop.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypeGuard

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
from phosphene.rendering.objectives import Acts, Address, MapOf, Objective

SHORTCUTS = ("linear", "folded", "subpixel", "cropped")


class FastForward(NamedTuple):
    """`read` runs only the parts of a network that an objective needs, by the shortcuts in `applied_shortcuts()`."""

    read: ReadActivations
    applied_shortcuts: Callable[[], tuple[str, ...]]


@contextmanager
def fast_forward_pass(
    model: Model, objective: Objective, shortcuts: Sequence[str] = SHORTCUTS, maps: bool = False
) -> Iterator[FastForward]:
    """Borrow a network and yield a forward pass that computes what an objective needs; see `Model.reading`.

    If `maps`, it also returns the tensor that was read for each address, under `MapOf(address)`.
    """
    layers = scalar_layers(model, objective)
    modules = {
        address: model.modules[layer.tensor_address.path] for address, layer in layers.items() if "linear" in shortcuts
    }
    convolutions = {address: module for address, module in modules.items() if is_plain_convolution(module)}
    folding = model.folding(objective.layers) if "folded" in shortcuts else None
    run_modules = [module for module in model.modules.values() if module not in convolutions.values()]
    few_channels = few_channel_convolutions(run_modules) if "subpixel" in shortcuts else []
    bf16_weights = Bf16Weights(model.modules.values())
    with model.reading(objective.layers, inputs=list(convolutions)) as read_layers:

        def read(image: Tensor) -> dict[Any, Tensor]:
            with folding.folded() if folding else nullcontext(), subpixel(few_channels), bf16_weights.swapped_in():
                acts = read_layers(channels_last_on_cpu(image))
            return {**acts, **{MapOf(address): act for address, act in acts.items()}} if maps else {**acts}

        readouts = {
            address: LinearReadout(convolution, address, objective.scalar_reads[address])
            for address, convolution in convolutions.items()
        }
        receptive_crop = receptive_crop_of(objective, layers, readouts, read) if "cropped" in shortcuts else None

        def read_scalars(image: Tensor, items: Tensor) -> Acts:
            if receptive_crop and (crop := receptive_crop.crop_for(image)):
                acts = read(image[..., crop.rows, crop.columns])
                layer = receptive_crop.layer
                return {**acts, layer: receptive_crop.neuron_values(acts[layer], items, crop.position)}
            acts = read(image)
            return {
                address: readouts[address](act, items) if address in readouts else act for address, act in acts.items()
            }

        def applied_shortcuts() -> tuple[str, ...]:
            cropped = receptive_crop and any(receptive_crop.crops.values())
            applied = (readouts, folding and folding.pairs, few_channels, cropped)
            return tuple(name for name, applies in zip(SHORTCUTS, applied, strict=True) if applies)

        yield FastForward(read_scalars, applied_shortcuts)


def scalar_layers(model: Model, objective: Objective) -> dict[Address, Layer]:
    """Return the layers of an objective's scalar reads, except layers that lack a channel: scoring refuses these."""
    layers = {address: model.find(address) for address in objective.scalar_reads}
    highest = {address: max(read.channels) for address, read in objective.scalar_reads.items()}
    return {address: layer for address, layer in layers.items() if highest[address] < (layer.channels or 0)}


def is_plain_convolution(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether a module is PyTorch's own convolution, unpatched and without hooks."""
    return type(module) is nn.Conv2d and not is_patched(module) and not has_hooks(module)
