"""A Keras network under training as a subject for a recorder, on the backend that its Keras runs on."""

from __future__ import annotations

import importlib
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from phosphene.errors import InvalidRequest, ModelRefused
from phosphene.network.capture import borrowed
from phosphene.network.loading import load
from phosphene.network.loading.keras_module import KerasModule, addresses, kernel_of, takes_training
from phosphene.network.model import Model
from phosphene.training.adapter import TOGETHER, TrainedNetwork, WeightSpecs

SOUGHT = ("kernel", "depthwise_kernel", "pointwise_kernel")  # where layers hold what `kernel_of` reads
KINDS = ("SeparableConv2D", "DepthwiseConv2D", "Conv2DTranspose")  # whose kernels lie otherwise than Conv2D's


def keras_network(network: Any) -> TrainedNetwork:
    """Return a Keras network as a subject, on whichever backend it runs: torch, TensorFlow or JAX.

    Its weights go by their Keras path, its layers by the address that `load` gives them.

    Raises:
        ModelRefused: it has no weights yet, or runs on another backend.
    """
    if not network.built or not network.variables:
        raise ModelRefused(f"{network.name} has no weights yet; build it, or run it once, before it is recorded")
    backend = backend_of()
    if backend not in GRADIENTS:
        raise ModelRefused(f"Keras runs on {backend}, and is recorded on one of: {', '.join(GRADIENTS)}")
    on_torch = backend == "torch"
    layers = {path: one for path, one in addresses(network).items() if readable(one)}
    return TrainedNetwork(
        name=str(network.name),
        weights=partial(trainable, network),
        described=partial(described, network),
        kernels={path: partial(kernel, network, one) for path, one in layers.items()},
        kinds={path: type(one).__name__ for path, one in layers.items()},
        total_gradient=partial(total_gradient, network, GRADIENTS[backend](network)),
        model=partial(handle, network) if on_torch else None,
        has_grad=on_torch,
        scale=partial(loss_scale, network) if on_torch else None,
    )


def handle(network: Any) -> Model:
    """Return the handle that filters are rendered with; finding out about the network draws nothing from Keras."""
    with seeds_kept():
        return load(network)


def backend_of() -> str:
    """Return what the Keras that is imported runs on."""
    return str(sys.modules["keras"].config.backend())


def trainable(network: Any) -> dict[str, Tensor]:
    """Return the weights that are trained, by path; on torch the very parameters, elsewhere copies on the CPU."""
    synchronise(network)
    names = {id(one): name for name, one in named(network).items()}
    return {names[id(one)]: as_torch(one.value) for one in network.trainable_weights}


def named(network: Any) -> dict[str, Any]:
    """Return all weights by path, trained or not, so that freezing a layer renames no other's."""
    names: dict[str, Any] = {}
    count: Counter[str] = Counter()
    for one in network.weights:
        count[one.path] += 1
        names[one.path if count[one.path] == 1 else f"{one.path}@{count[one.path]}"] = one
    return names


def described(network: Any) -> list[WeightSpecs]:
    """Return name, shape and number format of every weight."""
    return [(name, tuple(one.shape), str(one.dtype)) for name, one in named(network).items()]


def synchronise(network: Any) -> None:
    """Have the variables of a network hold what the training has made of them; JAX keeps that elsewhere meanwhile."""
    if hasattr(network, "jax_state_sync"):
        network.jax_state_sync()


def as_torch(value: Any) -> Tensor:
    """Return a backend's tensor as one of torch's, a copy on the CPU; one of torch's as it is."""
    if isinstance(value, Tensor):
        return value
    array = np.array(value)
    if array.dtype.name == "bfloat16":  # which NumPy itself does not know
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(array)


def kernel(network: Any, layer: Any) -> Tensor:
    """Return a layer's kernel (out, in, kh, kw) as it is now."""
    synchronise(network)
    found = kernel_of(layer if isinstance(layer, nn.Module) else in_torch(layer))
    assert found is not None
    return found.detach()


def readable(layer: Any) -> bool:
    """Return whether a layer has kernels (out, in, kh, kw)."""
    if isinstance(layer, nn.Module):
        return kernel_of(layer) is not None
    sizes = {len(getattr(getattr(layer, name, None), "shape", ())) for name in SOUGHT}
    return 4 in sizes and kernel_of(in_torch(layer)) is not None


def in_torch(layer: Any) -> Any:
    """Return a stand-in for a layer of another backend that `kernel_of` can read: of its kind, with its kernels."""
    ancestors = {one.__name__ for one in type(layer).__mro__}
    kind = next((one for one in KINDS if one in ancestors), "Conv2D")
    found = {name: getattr(getattr(layer, name, None), "value", None) for name in SOUGHT}
    held = {name: SimpleNamespace(value=as_torch(one)) for name, one in found.items() if one is not None}
    return type(kind, (), held)()


def loss_scale(network: Any) -> float:
    """Return what Keras multiplies the loss with before the backward pass, and so what `.grad` has to be divided by."""
    optimizer = getattr(network, "optimizer", None)
    factor = getattr(optimizer, "loss_scale_factor", None) or 1.0
    start = getattr(optimizer, "initial_scale", 1.0)
    scale = getattr(optimizer, "dynamic_scale", None)
    return float(factor) * float(start if scale is None else as_torch(scale.value))


class Batch(NamedTuple):
    """Inputs, targets and, where there are any, weights of samples; each an array, or a list or mapping of such."""

    inputs: Any
    targets: Any = None
    weights: Any = None

    def __len__(self) -> int:
        return len(next(one for one in sys.modules["keras"].tree.flatten(self.inputs) if one is not None))


GradientFunction = Callable[[Batch, Any], Sequence[Tensor]]  # (batch, loss) -> gradient of each trainable weight


def total_gradient(
    network: Any, slopes: GradientFunction, data: Any, loss: Any, limit: int | None = None
) -> dict[str, Tensor]:
    """Return the gradient of the mean loss over all samples with respect to every trainable weight (R2.2a).

    The network is in inference mode, so that the figure does not depend on how the data are cut into batches; it, its
    `.grad`, its metrics and the random state are left as they were.

    Args:
        data: what the network is given in `fit`: (inputs, targets) or (inputs, targets, weights of samples), or an
            iterable of such batches that can be gone through once an epoch: a DataLoader, PyDataset, `tf.data.Dataset`.
        loss: (outputs, targets) -> the mean loss over the batch, which is then all of the loss; a `keras.losses.Loss`;
            or None for the loss that the network was compiled with, and all that its layers and regularisers add.
        limit: how many batches to take at most, to see whether it can be done.

    Raises:
        InvalidRequest: there are no samples, a batch is none, or there is no loss.
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
        names = list(trainable(network))
        for batch in islice(batches(data), limit):
            found = [
                one.to(torch.promote_types(one.dtype, torch.float32)) * len(batch)
                for one in slopes(in_backend(batch), loss)
            ]
            sums = [total + one for total, one in zip(sums, found, strict=True)] if sums else found
            samples += len(batch)
        kinds = [one.dtype for one in trainable(network).values()]
    if not samples:
        raise InvalidRequest("the data for gradients='epoch' held no sample; give data that can be gone through again")
    return {name: (one / samples).to(kind).cpu() for name, one, kind in zip(names, sums, kinds, strict=True)}


def given_loss(loss: Any, outputs: Any, targets: Any) -> Any:
    """Return what a loss that the user gave is on a batch; Keras' own take the targets first.

    Raises:
        InvalidRequest: it is not one number.
    """
    own = isinstance(loss, sys.modules["keras"].losses.Loss)
    value = loss(targets, outputs) if own else loss(outputs, targets)
    if getattr(value, "shape", None) is None or len(value.shape):
        raise InvalidRequest(
            "loss=(outputs, targets) returns one number, the batch's mean loss, as the backend's tensor; it returned "
            f"a {type(value).__name__} of shape {tuple(getattr(value, 'shape', ()))}"
        )
    return value


def in_backend(batch: Batch) -> Batch:
    """Return a batch as tensors of the backend, of the kinds of numbers that it has."""
    keras = sys.modules["keras"]

    def convert(one: Any) -> Any:
        if isinstance(one, Tensor):
            one = one.detach() if backend_of() == "torch" else one.detach().cpu().numpy()
        elif one is not None:
            one = np.asarray(one)
        return one if one is None else keras.ops.convert_to_tensor(one)

    return Batch(*(keras.tree.map_structure(convert, one) for one in batch))


def batches(data: Any) -> Iterator[Batch]:
    """Yield the batches of data: those that it is made of, or pieces of one pair of arrays.

    Raises:
        InvalidRequest: it can be gone through only once, or holds something else.
    """
    if is_whole(data):
        whole = as_batch(data)
        tree = sys.modules["keras"].tree
        lengths = {len(one) for one in tree.flatten(tuple(whole)) if one is not None}
        if len(lengths) > 1:
            raise InvalidRequest(f"the data for gradients='epoch' differ in length: {sorted(lengths)} samples")
        for start in range(0, len(whole), TOGETHER):
            here = slice(start, start + TOGETHER)
            yield Batch(*tree.map_structure(lambda one, here=here: None if one is None else one[here], tuple(whole)))
    elif is_endless(data):
        raise InvalidRequest("the data for gradients='epoch' have no end; give a set of which one pass is an epoch")
    elif hasattr(data, "num_batches") and hasattr(data, "__getitem__"):  # a PyDataset, which knows no end by itself
        yield from (as_batch(data[number]) for number in range(data.num_batches))
    elif not isinstance(data, Iterable) or iter(data) is data:
        raise InvalidRequest(
            "data for gradients='epoch' is (inputs, targets), or batches that can be gone through once an epoch, such "
            f"as a PyDataset, not a {type(data).__name__}"
        )
    else:
        yield from map(as_batch, data)


def is_endless(data: Any) -> bool:
    """Return whether data say of themselves that they never end, as a `tf.data.Dataset` that repeats does."""
    count = getattr(data, "cardinality", None)
    return (callable(count) and int(count()) == -1) or getattr(data, "num_batches", 0) is None


def is_whole(data: Any) -> bool:
    """Return whether data is one batch: arrays, or lists or mappings of arrays, and no list of batches."""
    if not isinstance(data, tuple | list):
        return hasattr(data, "shape") or isinstance(data, Mapping)
    if not 1 <= len(data) <= 3 or isinstance(data[0], tuple):
        return False
    return isinstance(data, tuple) or hasattr(data[0], "shape")  # a list of lists is batches, as of a DataLoader


def as_batch(given: Any) -> Batch:
    """Return (inputs, targets) or (inputs, targets, weights) as a batch; inputs alone have no targets."""
    if isinstance(given, tuple | list):
        if not 1 <= len(given) <= 3:
            raise InvalidRequest(f"a batch for gradients='epoch' is (inputs, targets), not {len(given)} things")
        return Batch(*given)
    return Batch(given)


def mean_loss(network: Any, batch: Batch, loss: Any) -> Any:
    """Return the loss over a batch as the backend's scalar, the network in inference mode."""
    outputs = network(batch.inputs, **({"training": False} if takes_training(network) else {}))
    if loss is not None:
        return given_loss(loss, outputs, batch.targets)
    return network._compute_loss(batch.inputs, batch.targets, outputs, batch.weights, training=False)


def torch_gradients(network: Any) -> GradientFunction:
    """Return what differentiates on torch; `.grad` is not touched."""

    def slopes(batch: Batch, loss: Any) -> list[Tensor]:
        wanted = [one.value for one in network.trainable_weights]
        try:
            for one in wanted:
                one.requires_grad_(True)
            found = torch.autograd.grad(mean_loss(network, batch, loss), wanted, allow_unused=True)
        finally:
            for one in wanted:  # frozen as it is while borrowed
                one.requires_grad_(False)
        return [torch.zeros_like(one) if slope is None else slope for one, slope in zip(wanted, found, strict=True)]

    return slopes


def tensorflow_gradients(network: Any) -> GradientFunction:
    """Return what differentiates on TensorFlow, with a tape of its own."""
    tensorflow: Any = importlib.import_module("tensorflow")

    def slopes(batch: Batch, loss: Any) -> list[Tensor]:
        wanted = [one.value for one in network.trainable_weights]
        with tensorflow.GradientTape() as tape:
            tape.watch(wanted)  # a variable that was frozen when it was made is not by itself
            value = mean_loss(network, batch, loss)
        found = tape.gradient(value, wanted, unconnected_gradients=tensorflow.UnconnectedGradients.ZERO)
        return [as_torch(tensorflow.convert_to_tensor(one)) for one in found]

    return slopes


def jax_gradients(network: Any) -> GradientFunction:
    """Return what differentiates on JAX: compiled once for each loss and shape of batch, where the network may be."""
    jax: Any = importlib.import_module("jax")

    def pure(loss: Any) -> Callable[..., Any]:
        def total(trainable: Any, fixed: Any, metrics: Any, inputs: Any, targets: Any, weights: Any) -> Any:
            if loss is None:
                return network.compute_loss_and_updates(
                    trainable, fixed, metrics, inputs, targets, weights, training=False
                )[0]
            flag = {"training": False} if takes_training(network) else {}
            outputs, _ = network.stateless_call(trainable, fixed, inputs, **flag)
            return given_loss(loss, outputs, targets)

        slope: Callable[..., Any] = jax.grad(total)
        if network.jit_compile and not network.run_eagerly:
            slope = jax.jit(slope)
        return slope

    made: dict[int, Callable[..., Any]] = {}  # by the loss that each holds

    def slopes(batch: Batch, loss: Any) -> list[Tensor]:
        if id(loss) not in made:
            made[id(loss)] = pure(loss)
        variables = network.trainable_variables, network.non_trainable_variables, network.metrics_variables
        found = made[id(loss)](*([one.value for one in some] for some in variables), *batch)
        by_variable = {id(one): slope for one, slope in zip(variables[0], found, strict=True)}
        return [as_torch(by_variable[id(one)]) for one in network.trainable_weights]

    return slopes


GRADIENTS = {"torch": torch_gradients, "tensorflow": tensorflow_gradients, "jax": jax_gradients}


@contextmanager
def restoring_state(network: Any) -> Iterator[None]:
    """Give a network back as it was: losses that layers added, metrics, states of random generators, and flags."""
    synchronise(network)
    layers = network._flatten_layers()
    losses = [(one, list(one._losses), set(one._loss_ids), list(one._losses_override)) for one in layers]
    metrics = list(network.metrics)
    values = [(one, number_of(one)) for one in (*network.non_trainable_variables, *network.metrics_variables)]
    draws = random.getstate(), np.random.get_state()
    frozen = borrowed(KerasModule(network, addresses(network), True)) if backend_of() == "torch" else nullcontext()
    try:
        with seeds_kept(), frozen:
            yield
    finally:
        for one, own, numbers, instead in losses:
            one._losses[:] = own
            one._loss_ids.clear()
            one._loss_ids.update(numbers)
            one._losses_override[:] = instead
        for metric in network.metrics:
            if not any(metric is one for one in metrics):  # which the loss makes when it is first computed
                metric.reset_state()
        for variable, before in values:
            if not np.array_equal(number_of(variable), before):
                variable.assign(before)
        random.setstate(draws[0])
        np.random.set_state(draws[1])


@contextmanager
def seeds_kept() -> Iterator[None]:
    """Leave the generator as it is from which Keras draws where it is given no seed."""
    kept: Any = importlib.import_module("keras.src.backend.common.global_state")
    name = "global_seed_generator"
    before = kept.get_global_attribute(name)
    value = None if before is None else number_of(before.state)
    try:
        yield
    finally:
        if value is not None:
            before.state.assign(value)
        elif kept.get_global_attribute(name) is not None:  # made meanwhile
            kept.set_global_attribute(name, None)


def number_of(variable: Any) -> Any:
    """Return a copy of a variable's value as NumPy's."""
    return np.array(sys.modules["keras"].ops.convert_to_numpy(variable))
