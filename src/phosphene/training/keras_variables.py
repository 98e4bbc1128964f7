"""The variables of a Keras network in training, on any backend: its weights as torch tensors, its state restored."""

import importlib
import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phosphene.network.capture import borrowed
from phosphene.network.loading.keras_module import KerasModule, layers_by_address
from phosphene.training.adapter import WeightSpecs


def backend_of() -> str:
    """Return the backend of the Keras that is imported."""
    return str(sys.modules["keras"].config.backend())


def trainable_weights(network: Any) -> dict[str, Tensor]:
    """Return the trainable weights by path; on torch the parameters themselves, on other backends copies on the CPU."""
    synchronise(network)
    names = {id(weight): name for name, weight in named_weights(network).items()}
    return {names[id(weight)]: as_torch(weight.value) for weight in network.trainable_weights}


def named_weights(network: Any) -> dict[str, Any]:
    """Return all weights by path, trained or not, so that freezing a layer does not rename those of another."""
    weights: dict[str, Any] = {}
    count: Counter[str] = Counter()
    for weight in network.weights:
        count[weight.path] += 1
        weights[weight.path if count[weight.path] == 1 else f"{weight.path}@{count[weight.path]}"] = weight
    return weights


def weight_specs(network: Any) -> list[WeightSpecs]:
    """Return name, shape and number format of every weight."""
    return [(name, tuple(weight.shape), str(weight.dtype)) for name, weight in named_weights(network).items()]


def synchronise(network: Any) -> None:
    """Update the variables of a network to the state of the training, which JAX keeps elsewhere during `fit`."""
    if hasattr(network, "jax_state_sync"):
        network.jax_state_sync()


def as_torch(value: Any) -> Tensor:
    """Return a tensor of a backend as a torch tensor: a copy on the CPU, or itself if it is a torch tensor."""
    if isinstance(value, Tensor):
        return value
    array = np.array(value)
    if array.dtype.name == "bfloat16":  # which NumPy itself does not know
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(array)


def as_numpy(variable: Any) -> Any:
    """Return a copy of a variable's value as a NumPy array."""
    return np.array(sys.modules["keras"].ops.convert_to_numpy(variable))


@contextmanager
def restoring_state(network: Any) -> Iterator[None]:
    """Restore a network afterwards: the losses that layers added, metrics, flags, and random generators."""
    synchronise(network)
    layers = network._flatten_layers()
    losses = [(layer, list(layer._losses), set(layer._loss_ids), list(layer._losses_override)) for layer in layers]
    metrics = list(network.metrics)
    variables = (*network.non_trainable_variables, *network.metrics_variables)
    values = [(variable, as_numpy(variable)) for variable in variables]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    frozen = (
        borrowed(KerasModule(network, layers_by_address(network), True)) if backend_of() == "torch" else nullcontext()
    )
    try:
        with restoring_global_seed(), frozen:
            yield
    finally:
        for layer, layer_losses, loss_ids, overrides in losses:
            layer._losses[:] = layer_losses
            layer._loss_ids.clear()
            layer._loss_ids.update(loss_ids)
            layer._losses_override[:] = overrides
        for metric in network.metrics:
            if not any(metric is old_metric for old_metric in metrics):  # the loss makes some when first computed
                metric.reset_state()
        for variable, value in values:
            if not np.array_equal(as_numpy(variable), value):
                variable.assign(value)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def restoring_global_seed() -> Iterator[None]:
    """Restore the generator that Keras draws from where no seed is given."""
    global_state: Any = importlib.import_module("keras.src.backend.common.global_state")
    name = "global_seed_generator"
    generator = global_state.get_global_attribute(name)
    value = None if generator is None else as_numpy(generator.state)
    try:
        yield
    finally:
        if value is not None:
            generator.state.assign(value)
        elif global_state.get_global_attribute(name) is not None:  # made in the meantime
            global_state.set_global_attribute(name, None)
