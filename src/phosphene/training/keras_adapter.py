"""The interface of a Recorder to a Keras network in training, on any backend of Keras."""

from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from phosphene.errors import ModelRefused
from phosphene.network.loading import load
from phosphene.network.loading.keras_module import kernel_of, layers_by_address
from phosphene.network.model import Model
from phosphene.training import keras_variables
from phosphene.training.adapter import TrainedNetwork
from phosphene.training.keras_gradients import GRADIENTS, total_gradient
from phosphene.training.keras_variables import as_torch, backend_of, restoring_global_seed, synchronise

KERNELS = ("kernel", "depthwise_kernel", "pointwise_kernel")  # the attributes of layers that `kernel_of` reads
KINDS = ("SeparableConv2D", "DepthwiseConv2D", "Conv2DTranspose")  # whose axes are in another order than Conv2D's


def keras_network(network: Any) -> TrainedNetwork:
    """Return a Keras network for a recorder, on whichever backend it runs: torch, TensorFlow or JAX.

    Weights are named by their Keras path, layers by the address that `load` gives them.
    """
    if not network.built or not network.variables:
        raise ModelRefused(f"{network.name} has no weights yet; build it, or run it once, before it is recorded")
    backend = backend_of()
    if backend not in GRADIENTS:
        raise ModelRefused(f"Keras runs on {backend}; a training is recorded on one of: {', '.join(GRADIENTS)}")
    on_torch = backend == "torch"
    layers = {path: layer for path, layer in layers_by_address(network).items() if has_kernel(layer)}
    return TrainedNetwork(
        name=str(network.name),
        weights=partial(keras_variables.trainable_weights, network),
        weight_specs=partial(keras_variables.weight_specs, network),
        kernels={path: partial(kernel, network, layer) for path, layer in layers.items()},
        kinds={path: type(layer).__name__ for path, layer in layers.items()},
        total_gradient=partial(total_gradient, network, GRADIENTS[backend](network)),
        model=partial(handle, network) if on_torch else None,
        has_grad=on_torch,
        scale=partial(loss_scale, network) if on_torch else None,
    )


def handle(network: Any) -> Model:
    """Return the handle that filters are rendered with; loading it leaves Keras' random generator unchanged."""
    with restoring_global_seed():
        return load(network)


def kernel(network: Any, layer: Any) -> Tensor:
    """Return a layer's kernel (out, in, kh, kw) as it is now."""
    synchronise(network)
    weight = kernel_of(layer if isinstance(layer, nn.Module) else torch_stand_in(layer))
    assert weight is not None
    return weight.detach()


def has_kernel(layer: Any) -> bool:
    """Return whether a layer has kernels (out, in, kh, kw)."""
    if isinstance(layer, nn.Module):
        return kernel_of(layer) is not None
    ranks = {len(getattr(getattr(layer, name, None), "shape", ())) for name in KERNELS}
    return 4 in ranks and kernel_of(torch_stand_in(layer)) is not None


def torch_stand_in(layer: Any) -> Any:
    """Return an object that `kernel_of` reads like a layer of another backend: of its kind, with its kernels."""
    ancestors = {ancestor.__name__ for ancestor in type(layer).__mro__}
    kind = next((name for name in KINDS if name in ancestors), "Conv2D")
    values = {name: getattr(getattr(layer, name, None), "value", None) for name in KERNELS}
    kernels = {name: SimpleNamespace(value=as_torch(value)) for name, value in values.items() if value is not None}
    return type(kind, (), kernels)()


def loss_scale(network: Any) -> float:
    """Return what Keras multiplies the loss with before the backward pass, by which `.grad` has to be divided."""
    optimizer = getattr(network, "optimizer", None)
    factor = getattr(optimizer, "loss_scale_factor", None) or 1.0
    start = getattr(optimizer, "initial_scale", 1.0)
    scale = getattr(optimizer, "dynamic_scale", None)
    return float(factor) * float(start if scale is None else as_torch(scale.value))
