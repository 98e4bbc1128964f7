"""What a recorder needs to know of a network under training, whichever framework it is of."""

from __future__ import annotations

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

WeightSpecs = tuple[str, tuple[int, ...], str]
TOGETHER = 64  # samples that go through the network at once, where the data is not in batches


@dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """A network under training.

    Attributes:
        name: how to speak of it.
        weights: returns the trainable weights as they are now, by name, in the network's order.
        described: returns name, shape and number format of every weight, trainable now or not, in that order.
        kernels: returns the kernel (out, in, kh, kw) of each layer that has one, by the layer's path.
        kinds: the class name of each of these layers.
        total_gradient: (data, loss, limit) -> the gradient of the mean loss over all samples with respect to every
            trainable weight, by name, the network in inference mode and left as it was; of at most `limit` batches.
        model: returns the handle to render filters with; None where there can be none.
        has_grad: whether a weight has its gradient in `.grad` after a backward pass.
        scale: returns what `.grad` has to be divided by; None where it is what it should be.
    """

    name: str
    weights: Callable[[], dict[str, Tensor]]
    described: Callable[[], list[WeightSpecs]]
    kernels: Mapping[str, Callable[[], Tensor]]
    kinds: Mapping[str, str]
    total_gradient: Callable[..., dict[str, Tensor]]
    model: Callable[[], Model] | None = None
    has_grad: bool = True
    scale: Callable[[], float] | None = None


def torch_network(network: nn.Module | Model) -> TrainedNetwork:
    """Return a PyTorch network as a subject; what compiles or distributes it is looked through."""
    handle = network if isinstance(network, Model) else None
    module = unwrap(network.module if isinstance(network, Model) else network)
    weights = partial(trainable, module)
    layout, modules = (handle.layout, handle.modules) if handle else (PLAIN, dict(module.named_modules()))
    found = {path: one for path, one in modules.items() if path and layout.kernel(one) is not None}
    return TrainedNetwork(
        name=handle.name if handle else type(module).__name__,
        weights=weights,
        described=partial(weight_specs, module),
        kernels={escape_digits(path): partial(kernel, layout, module, path, one) for path, one in found.items()},
        kinds={escape_digits(path): type(one).__name__ for path, one in found.items()},
        total_gradient=partial(total_gradient, module, handle.forward if handle else module, weights),
        model=(lambda: handle) if handle else partial(load, module),
    )


def unwrap(module: nn.Module) -> nn.Module:
    """Return the user's own network inside what `torch.compile` or data parallelism made of it."""
    for name in ("_orig_mod", "module"):
        inner = getattr(module, name, None)
        wraps = name == "_orig_mod" or type(module).__name__.endswith("DataParallel")
        if wraps and isinstance(inner, nn.Module):
            return unwrap(inner)
    return module


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights that are trained, each once: a weight that is used twice goes by its first name."""
    return {name: one for name, one in module.named_parameters() if one.requires_grad}


def weight_specs(module: nn.Module) -> list[WeightSpecs]:
    """Return name, shape and number format of every weight, each once."""
    return [(name, tuple(one.shape), str(one.dtype).removeprefix("torch.")) for name, one in module.named_parameters()]


def kernel(layout: Layout, root: nn.Module, path: str, module: nn.Module) -> Tensor:
    """Return a layer's kernel (out, in, kh, kw) as it is now, also where another layer has taken its place since."""
    try:
        found = layout.kernel(root.get_submodule(path))
    except AttributeError:  # a path that is not PyTorch's
        found = layout.kernel(module)
    if found is None:
        raise LayerRefused(f"{path} has no kernel any more; make the Recorder after the network is whole")
    return found.detach()


def total_gradient(
    module: nn.Module,
    forward: Callable[..., Any],
    weights: Callable[[], dict[str, Tensor]],
    data: Any,
    loss: Any,
    limit: int | None = None,
) -> dict[str, Tensor]:
    """Return the gradient of the mean loss over all samples with respect to every trainable weight (R2.2a).

    The network is in inference mode, so that the figure does not depend on how the data are cut into batches; it, its
    `.grad` and the random state are left as they were.

    Args:
        data: (inputs, targets), or an iterable of such batches that can be gone through once an epoch; a batch may be
            a mapping too, which the network gets as keyword arguments.
        loss: (outputs, targets) -> the mean loss over the batch; None for a network whose output has a `.loss`.
        limit: how many batches to take at most, to see whether it can be done.

    Raises:
        InvalidRequest: there are no samples, a batch is no pair, or the network or the loss does not take it.
    """
    wanted = weights()
    sums = {name: torch.zeros_like(one) for name, one in wanted.items()}
    samples = 0
    with borrowed(module):
        for one in wanted.values():
            one.requires_grad_(True)
        place = next(iter(wanted.values())).device if wanted else torch.device("cpu")
        for batch in islice(batches(data), limit):
            value, count = taken(forward, moved(batch, place), loss)
            if value.dim() or not value.requires_grad:
                raise InvalidRequest(
                    "loss=(outputs, targets) returns the batch's mean loss, one number that the weights decide; it "
                    f"returned a tensor {tuple(value.shape)}"
                )
            slopes = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
            for name, slope in zip(wanted, slopes, strict=True):
                if slope is not None:
                    sums[name] += slope * count
            samples += count
    if not samples:
        raise InvalidRequest("the data for gradients='epoch' held no sample; give data that can be gone through again")
    return {name: (one / samples).detach() for name, one in sums.items()}


def batches(data: Any) -> Iterator[Any]:
    """Yield the batches of data: those that it is made of, or pieces of one pair of tensors."""
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(one, Tensor) for one in data):
        yield from zip(*(one.split(TOGETHER) for one in data), strict=True)
        return
    if not isinstance(data, Iterable) or iter(data) is data:
        raise InvalidRequest(
            "data for gradients='epoch' is (inputs, targets), or batches that can be gone through once an epoch, such "
            f"as a DataLoader, not a {type(data).__name__}"
        )
    yield from data


def moved(batch: Any, place: torch.device) -> Any:
    """Return a batch with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(place)
    if isinstance(batch, Mapping):
        return {name: moved(one, place) for name, one in batch.items()}
    return [moved(one, place) for one in batch] if isinstance(batch, list | tuple) else batch


def taken(forward: Callable[..., Any], batch: Any, loss: Any) -> tuple[Tensor, int]:
    """Return the mean loss over a batch and its number of samples, or say what does not go together."""
    try:
        return batch_loss(forward, batch, loss)
    except (PhospheneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InvalidRequest(
            f"the network or the loss does not take a batch of the data for gradients='epoch' ({first_line(error)}); "
            "give batches (inputs, targets) as the training has them"
        ) from error


def batch_loss(forward: Callable[..., Any], batch: Any, loss: Any) -> tuple[Tensor, int]:
    """Return the mean loss over a batch, and its number of samples."""
    if isinstance(batch, Mapping):
        found = forward(**batch)
        return (found.loss if loss is None else loss(found, batch)), len(next(iter(batch.values())))
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise InvalidRequest(f"a batch for gradients='epoch' is (inputs, targets), not a {type(batch).__name__}")
    if loss is None:
        raise InvalidRequest("gradients='epoch' needs loss=(outputs, targets) -> the batch's mean loss")
    inputs, targets = batch
    return loss(forward(inputs), targets), len(targets)
