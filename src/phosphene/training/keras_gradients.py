"""The gradient of a Keras network's total loss, differentiated by the backend that Keras runs on."""

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from phosphene.errors import InvalidRequest
from phosphene.network.loading.keras_module import takes_training
from phosphene.training.adapter import BATCH_SIZE
from phosphene.training.keras_variables import as_torch, backend_of, restoring_state, trainable_weights


class Batch(NamedTuple):
    """Inputs, targets and, if given, weights of samples; each an array, or a list or mapping of arrays."""

    inputs: Any
    targets: Any = None
    weights: Any = None

    def __len__(self) -> int:
        arrays = sys.modules["keras"].tree.flatten(self.inputs)
        return len(next(array for array in arrays if array is not None))


GradientFunction = Callable[[Batch, Any], Sequence[Tensor]]  # (batch, loss) -> gradient of each trainable weight


def total_gradient(
    network: Any, batch_gradients: GradientFunction, data: Any, loss: Any, limit: int | None = None
) -> dict[str, Tensor]:
    """Return the same as `adapter.total_gradient` for a Keras network, whose metrics are left unchanged, too (R2.2a).

    Args:
        data: what `fit` takes: (inputs, targets) or (inputs, targets, weights of samples), or an iterable of such
            batches that can be iterated once an epoch: a DataLoader, PyDataset, `tf.data.Dataset`.
        loss: (outputs, targets) -> the mean loss over the batch, which is then all of the loss; a `keras.losses.Loss`;
            or None for the loss that the network was compiled with, and all that its layers and regularisers add.

    Raises:
        InvalidRequest: there are no samples, a batch is not valid, or there is no loss.
    """
    if loss is None and not getattr(network, "compiled", False):
        raise InvalidRequest(
            f"{network.name} is not compiled with a loss: compile it, or give loss=(outputs, targets) -> the mean loss"
        )
    if loss is not None and not callable(loss):
        raise InvalidRequest(f"a loss is (outputs, targets) -> the batch's mean loss, not {loss!r}")
    sums: list[Tensor] = []
    samples = 0
    with restoring_state(network):
        names = list(trainable_weights(network))
        for batch in islice(batches(data), limit):
            weighted = [
                gradient.to(torch.promote_types(gradient.dtype, torch.float32)) * len(batch)
                for gradient in batch_gradients(in_backend(batch), loss)
            ]
            sums = [total + gradient for total, gradient in zip(sums, weighted, strict=True)] if sums else weighted
            samples += len(batch)
        dtypes = [weight.dtype for weight in trainable_weights(network).values()]
    if not samples:
        raise InvalidRequest("the data for gradients='epoch' held no sample; give data that can be iterated repeatedly")
    return {name: (total / samples).to(dtype).cpu() for name, total, dtype in zip(names, sums, dtypes, strict=True)}


def batches(data: Any) -> Iterator[Batch]:
    """Yield the batches that data consist of, or pieces of a pair of arrays."""
    if is_one_batch(data):
        whole = as_batch(data)
        tree = sys.modules["keras"].tree
        lengths = {len(array) for array in tree.flatten(tuple(whole)) if array is not None}
        if len(lengths) > 1:
            raise InvalidRequest(f"the data for gradients='epoch' differ in length: {sorted(lengths)} samples")
        for start in range(0, len(whole), BATCH_SIZE):
            rows = slice(start, start + BATCH_SIZE)
            cut = tree.map_structure(lambda array, rows=rows: None if array is None else array[rows], tuple(whole))
            yield Batch(*cut)
    elif is_endless(data):
        raise InvalidRequest("the data for gradients='epoch' have no end; give data that end after one epoch")
    elif hasattr(data, "num_batches") and hasattr(data, "__getitem__"):  # a PyDataset, whose iteration never ends
        yield from (as_batch(data[number]) for number in range(data.num_batches))
    elif not isinstance(data, Iterable) or iter(data) is data:
        raise InvalidRequest(
            "data for gradients='epoch' is (inputs, targets), or batches that can be iterated once an epoch, such as a "
            f"PyDataset, not a {type(data).__name__}"
        )
    else:
        yield from map(as_batch, data)


def is_endless(data: Any) -> bool:
    """Return whether data declare that they never end, as a `tf.data.Dataset` that repeats does."""
    count = getattr(data, "cardinality", None)
    return (callable(count) and int(count()) == -1) or getattr(data, "num_batches", 0) is None


def is_one_batch(data: Any) -> bool:
    """Return whether data is one batch: arrays, or lists or mappings of arrays, and no list of batches."""
    if not isinstance(data, tuple | list):
        return hasattr(data, "shape") or isinstance(data, Mapping)
    if not 1 <= len(data) <= 3 or isinstance(data[0], tuple):
        return False
    return isinstance(data, tuple) or hasattr(data[0], "shape")  # a list of lists is batches, as of a DataLoader


def as_batch(data: Any) -> Batch:
    """Return (inputs, targets) or (inputs, targets, weights) as a batch; inputs alone have no targets."""
    if isinstance(data, tuple | list):
        if not 1 <= len(data) <= 3:
            raise InvalidRequest(f"a batch for gradients='epoch' is (inputs, targets), not {len(data)} values")
        return Batch(*data)
    return Batch(data)


def in_backend(batch: Batch) -> Batch:
    """Return a batch as tensors of the backend, with their dtypes."""
    keras = sys.modules["keras"]

    def convert(array: Any) -> Any:
        if array is None:
            return None
        if not isinstance(array, Tensor):
            return keras.ops.convert_to_tensor(np.asarray(array))
        return keras.ops.convert_to_tensor(array.detach() if backend_of() == "torch" else array.detach().cpu().numpy())

    return Batch(*(keras.tree.map_structure(convert, part) for part in batch))


def mean_loss(network: Any, batch: Batch, loss: Any) -> Any:
    """Return the loss over a batch as the backend's scalar, with the network in inference mode."""
    outputs = network(batch.inputs, **({"training": False} if takes_training(network) else {}))
    if loss is not None:
        return user_loss(loss, outputs, batch.targets)
    return network._compute_loss(batch.inputs, batch.targets, outputs, batch.weights, training=False)


def user_loss(loss: Any, outputs: Any, targets: Any) -> Any:
    """Return the value of a loss that the user gave; the losses of Keras take the targets first."""
    of_keras = isinstance(loss, sys.modules["keras"].losses.Loss)
    value = loss(targets, outputs) if of_keras else loss(outputs, targets)
    if getattr(value, "shape", None) is None or len(value.shape):
        raise InvalidRequest(
            "loss=(outputs, targets) returns one number, the batch's mean loss, as the backend's tensor; it returned "
            f"a {type(value).__name__} of shape {tuple(getattr(value, 'shape', ()))}"
        )
    return value


def torch_gradients(network: Any) -> GradientFunction:
    """Return the function that differentiates on torch, without touching `.grad`."""

    def batch_gradients(batch: Batch, loss: Any) -> list[Tensor]:
        weights = [weight.value for weight in network.trainable_weights]
        try:
            for weight in weights:
                weight.requires_grad_(True)
            gradients = torch.autograd.grad(mean_loss(network, batch, loss), weights, allow_unused=True)
        finally:
            for weight in weights:  # frozen, as `borrowed` has them
                weight.requires_grad_(False)
        pairs = zip(weights, gradients, strict=True)
        return [torch.zeros_like(weight) if gradient is None else gradient for weight, gradient in pairs]

    return batch_gradients


def tensorflow_gradients(network: Any) -> GradientFunction:
    """Return the function that differentiates on TensorFlow, with a tape of its own."""
    tensorflow: Any = importlib.import_module("tensorflow")

    def batch_gradients(batch: Batch, loss: Any) -> list[Tensor]:
        weights = [weight.value for weight in network.trainable_weights]
        with tensorflow.GradientTape() as tape:
            tape.watch(weights)  # TensorFlow does not watch variables that were frozen when they were made
            value = mean_loss(network, batch, loss)
        gradients = tape.gradient(value, weights, unconnected_gradients=tensorflow.UnconnectedGradients.ZERO)
        return [as_torch(tensorflow.convert_to_tensor(gradient)) for gradient in gradients]

    return batch_gradients


def jax_gradients(network: Any) -> GradientFunction:
    """Return the function that differentiates on JAX; compiled once for each loss and shape of batch if allowed."""
    jax: Any = importlib.import_module("jax")

    def differentiated(loss: Any) -> Callable[..., Any]:
        def total(trainable: Any, fixed: Any, metrics: Any, inputs: Any, targets: Any, weights: Any) -> Any:
            if loss is None:
                return network.compute_loss_and_updates(
                    trainable, fixed, metrics, inputs, targets, weights, training=False
                )[0]
            options = {"training": False} if takes_training(network) else {}
            outputs, _ = network.stateless_call(trainable, fixed, inputs, **options)
            return user_loss(loss, outputs, targets)

        gradient: Callable[..., Any] = jax.grad(total)
        return jax.jit(gradient) if network.jit_compile and not network.run_eagerly else gradient

    functions: dict[int, Callable[..., Any]] = {}  # by the identity of the loss, which each function keeps alive

    def batch_gradients(batch: Batch, loss: Any) -> list[Tensor]:
        if id(loss) not in functions:
            functions[id(loss)] = differentiated(loss)
        groups = network.trainable_variables, network.non_trainable_variables, network.metrics_variables
        gradients = functions[id(loss)](*([variable.value for variable in group] for group in groups), *batch)
        by_variable = {id(variable): gradient for variable, gradient in zip(groups[0], gradients, strict=True)}
        return [as_torch(by_variable[id(weight)]) for weight in network.trainable_weights]

    return batch_gradients


GRADIENTS = {"torch": torch_gradients, "tensorflow": tensorflow_gradients, "jax": jax_gradients}
