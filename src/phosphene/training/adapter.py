"""The interface of a Recorder to a network in training, and its implementation for PyTorch."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from phosphene.errors import InvalidRequest, LayerRefused, PhospheneError, first_line
from phosphene.network.capture import PLAIN, Layout, borrowed
from phosphene.network.layers import escape_digits
from phosphene.network.loading import load
from phosphene.network.model import Model

WeightSpecs = tuple[str, tuple[int, ...], str]  # name, shape, number format
BATCH_SIZE = 64  # samples that pass through the network at once if the data are not in batches


@dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """A network in training.

    Attributes:
        name: its name in messages and captions.
        weights: returns the trainable weights as they are now, by name, in the network's order.
        weight_specs: returns name, shape and number format of every weight, trainable now or not, in that order.
        kernels: functions that return the kernel (out, in, kh, kw) of a layer, by the path of each layer that has one.
        kinds: the class name of each of these layers.
        total_gradient: (data, loss, limit) -> the gradient of the mean loss over all samples with respect to every
            trainable weight, by name, with the network in inference mode and left unchanged; of at most `limit` batches
        model: returns the handle to render filters with; None if filters cannot be rendered.
        has_grad: whether a backward pass leaves the gradients in `.grad`.
        scale: returns what `.grad` has to be divided by; None if it never has to be.
    """

    name: str
    weights: Callable[[], dict[str, Tensor]]
    weight_specs: Callable[[], list[WeightSpecs]]
    kernels: Mapping[str, Callable[[], Tensor]]
    kinds: Mapping[str, str]
    total_gradient: Callable[..., dict[str, Tensor]]
    model: Callable[[], Model] | None = None
    has_grad: bool = True
    scale: Callable[[], float] | None = None


def torch_network(network: nn.Module | Model) -> TrainedNetwork:
    """Return a PyTorch network for a recorder, without what `torch.compile` or data parallelism wraps around it."""
    handle = network if isinstance(network, Model) else None
    root = unwrap(network.module if isinstance(network, Model) else network)
    weights = partial(trainable_weights, root)
    layout, modules = (handle.layout, handle.modules) if handle else (PLAIN, dict(root.named_modules()))
    layers = {path: module for path, module in modules.items() if path and layout.kernel(module) is not None}
    return TrainedNetwork(
        name=handle.name if handle else type(root).__name__,
        weights=weights,
        weight_specs=partial(weight_specs, root),
        kernels={escape_digits(path): partial(kernel, layout, root, path, layer) for path, layer in layers.items()},
        kinds={escape_digits(path): type(layer).__name__ for path, layer in layers.items()},
        total_gradient=partial(total_gradient, root, handle.forward if handle else root, weights),
        model=(lambda: handle) if handle else partial(load, root),
    )


def unwrap(module: nn.Module) -> nn.Module:
    """Return the user's own network inside what `torch.compile` or data parallelism made of it."""
    for name in ("_orig_mod", "module"):
        inner = getattr(module, name, None)
        wraps = name == "_orig_mod" or type(module).__name__.endswith("DataParallel")
        if wraps and isinstance(inner, nn.Module):
            return unwrap(inner)
    return module


def trainable_weights(root: nn.Module) -> dict[str, Tensor]:
    """Return the trainable weights, each once: a weight that is used twice has its first name."""
    return {name: weight for name, weight in root.named_parameters() if weight.requires_grad}


def weight_specs(root: nn.Module) -> list[WeightSpecs]:
    """Return name, shape and number format of every weight, each once."""
    weights = root.named_parameters()
    return [(name, tuple(weight.shape), str(weight.dtype).removeprefix("torch.")) for name, weight in weights]


def kernel(layout: Layout, root: nn.Module, path: str, layer: nn.Module) -> Tensor:
    """Return a layer's kernel (out, in, kh, kw) as it is now, also if another layer has replaced it at its path."""
    try:
        weight = layout.kernel(root.get_submodule(path))
    except AttributeError:  # a path that is not PyTorch's
        weight = layout.kernel(layer)
    if weight is None:
        raise LayerRefused(f"{path} has no kernel any more; make the Recorder when the network is complete")
    return weight.detach()


def total_gradient(
    root: nn.Module,
    forward: Callable[..., Any],
    weights: Callable[[], dict[str, Tensor]],
    data: Any,
    loss: Any,
    limit: int | None = None,
) -> dict[str, Tensor]:
    """Return the gradient of the mean loss over all samples with respect to every trainable weight (R2.2a).

    The network is in inference mode, so that the result does not depend on how the data are divided into batches. The
    network, its `.grad` and the random state are left unchanged.

    Args:
        data: (inputs, targets), or an iterable of such batches that can be iterated once an epoch; a batch may also be
            a mapping, which the network gets as keyword arguments.
        loss: (outputs, targets) -> the mean loss over the batch; None for a network whose output has a `.loss`.
        limit: how many batches to take at most, to try whether it works.

    Raises:
        InvalidRequest: there are no samples, a batch is no pair, or the network or the loss does not take it.
    """
    trainable = weights()
    sums = {name: torch.zeros_like(weight) for name, weight in trainable.items()}
    samples = 0
    with borrowed(root):
        for weight in trainable.values():
            weight.requires_grad_(True)
        device = next(iter(trainable.values())).device if trainable else torch.device("cpu")
        for batch in islice(batches(data), limit):
            value, count = checked_batch_loss(forward, to_device(batch, device), loss)
            if value.dim() or not value.requires_grad:
                raise InvalidRequest(
                    "loss=(outputs, targets) returns the batch's mean loss, one number that depends on the weights; it "
                    f"returned a tensor {tuple(value.shape)}"
                )
            gradients = torch.autograd.grad(value, list(trainable.values()), allow_unused=True)
            for name, gradient in zip(trainable, gradients, strict=True):
                if gradient is not None:
                    sums[name] += gradient * count
            samples += count
    if not samples:
        raise InvalidRequest("the data for gradients='epoch' held no sample; give data that can be iterated repeatedly")
    return {name: (total / samples).detach() for name, total in sums.items()}


def batches(data: Any) -> Iterator[Any]:
    """Yield the batches that data consist of, or pieces of a pair of tensors."""
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(tensor, Tensor) for tensor in data):
        yield from zip(*(tensor.split(BATCH_SIZE) for tensor in data), strict=True)
        return
    if not isinstance(data, Iterable) or iter(data) is data:
        raise InvalidRequest(
            "data for gradients='epoch' is (inputs, targets), or batches that can be iterated once an epoch, such as a "
            f"DataLoader, not a {type(data).__name__}"
        )
    yield from data


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: to_device(part, device) for name, part in batch.items()}
    return [to_device(part, device) for part in batch] if isinstance(batch, list | tuple) else batch


def checked_batch_loss(forward: Callable[..., Any], batch: Any, loss: Any) -> tuple[Tensor, int]:
    """Return the mean loss over a batch and its number of samples, or refuse data that do not fit the network."""
    try:
        return batch_loss(forward, batch, loss)
    except (PhospheneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InvalidRequest(
            f"the network or the loss does not take a batch of the data for gradients='epoch' ({first_line(error)}); "
            "give batches (inputs, targets) as in the training"
        ) from error


def batch_loss(forward: Callable[..., Any], batch: Any, loss: Any) -> tuple[Tensor, int]:
    """Return the mean loss over a batch, and its number of samples."""
    if isinstance(batch, Mapping):
        outputs = forward(**batch)
        return (outputs.loss if loss is None else loss(outputs, batch)), len(next(iter(batch.values())))
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise InvalidRequest(f"a batch for gradients='epoch' is (inputs, targets), not a {type(batch).__name__}")
    if loss is None:
        raise InvalidRequest("gradients='epoch' needs loss=(outputs, targets) -> the batch's mean loss")
    inputs, targets = batch
    return loss(forward(inputs), targets), len(targets)
