"""A Keras network as a plain module: how to call it, its layers by address, how its tensors lie."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from phosphene.network.capture import InnerHookPoint, Layout


class KerasModule(nn.Module):
    """A Keras network as a plain module: takes images (b, c, h, w), has the layers as submodules, never trains.

    The Keras network stays what it is, and the user's; here is only how to call it.
    """

    def __init__(self, network: Any, layers: Mapping[str, Any], channels_last: bool) -> None:
        super().__init__()
        self.network = network
        self.by_address = dict(layers)
        self.layers = nn.ModuleList(layers.values())  # Keras keeps them where PyTorch does not look
        self.channels_last = channels_last
        self.keyed = getattr(network, "_inputs_struct", None)
        self.rank = len(input_shape(network) or (0,) * 4)
        self.eval_only = {"training": False} if takes_training(network) else {}

    def forward(self, image: Tensor) -> Any:
        """Return what the network makes of an image (b, c, h, w)."""
        given: Any = image[:, 0] if self.rank == 3 else image
        if self.channels_last and self.rank == 4:
            given = image.permute(0, 2, 3, 1).contiguous()
        if isinstance(self.keyed, dict):
            given = {next(iter(self.keyed)): given}
        elif isinstance(self.keyed, list | tuple):
            given = [given]
        with sys.modules["keras"].device(str(image.device)), self.losses_kept():
            return self.network(given, **self.eval_only)

    @contextmanager
    def losses_kept(self) -> Iterator[None]:
        """Leave the lists of losses as they are, to which a layer that regularises its output adds at every call."""
        kept = [(one, list(one._losses)) for one in (self.network, *self.layers) if hasattr(one, "_losses")]
        try:
            yield
        finally:
            for one, losses in kept:
                if len(one._losses) != len(losses):
                    one._losses[:] = losses
                    one._loss_ids.clear()
                    one._loss_ids.update(map(id, losses))

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield every variable of the network, the states of its random generators too, each once."""
        variables = {id(one.value): one for one in self.network.variables}
        for number, one in enumerate(variables.values()):
            yield f"{prefix}{one.path}@{number}", one.value

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the weights by the address of their layer and their own name, as `base/conv1/kernel`."""
        names: dict[str, Tensor] = {}
        seen: set[int] = set()
        # what a layer holds comes after it, and has the better claim to a weight
        for path, one in (*reversed(self.by_address.items()), ("", self.network)):
            for weight in one.weights:
                if id(weight) not in seen:
                    seen.add(id(weight))
                    name = f"{path}/{weight.name}".lstrip("/")
                    names[name if name not in names else f"{name}@{len(names)}"] = weight.value.detach()
        return names


def takes_training(network: Any) -> bool:
    """Return whether a network can be told that it is not trained: a subclass may lack the argument."""
    parameters = inspect.signature(network.call).parameters.values()
    return any(one.name == "training" or one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)


def input_shape(network: Any) -> tuple[int | None, ...] | None:
    """Return the shape of a network's one input with its batch, None where it does not know."""
    inputs = getattr(network, "inputs", None)
    return tuple(inputs[0].shape) if inputs else None


def addresses(network: Any) -> dict[str, Any]:
    """Return every layer by its address: the names of the layers that hold it, and its own, with `/` between."""
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def walk(holder: Any, prefix: str) -> None:
        for one in holder._flatten_layers(include_self=False, recursive=False):
            if id(one) in seen or one is getattr(holder, "activation", None) or type(one).__name__ == "InputLayer":
                continue
            seen.add(id(one))
            path = prefix + one.name
            while path in found:
                path += "_"
            found[path] = one
            walk(one, f"{path}/")

    walk(network, "")
    return found


def spliced(layers: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Return the layers by address, and what those that apply an activation function give to it."""
    modules: dict[str, nn.Module] = {}
    for path, one in layers.items():
        modules[path] = one
        activation = getattr(one, "activation", None)
        own = "activation" in vars(one) or "activation" in one._modules
        if own and callable(activation) and one.weights and getattr(activation, "__name__", "") != "linear":
            modules[f"{path}#{InnerHookPoint.ACTIVATION}"] = InnerHookPoint(one, InnerHookPoint.ACTIVATION)
    return modules


def channels_to_front(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 3, 1, 2) if tensor.dim() == 4 else tensor


def channels_to_back(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor


def kernel_of(module: nn.Module) -> Tensor | None:
    """Return a Keras convolution's kernel (out, in, kh, kw), None for anything else.

    A depthwise one has one input channel an output; a separable one is the product of its two.
    """
    layer: Any = module.owner if isinstance(module, InnerHookPoint) else module
    kind = {one.__name__ for one in type(layer).__mro__}
    if "SeparableConv2D" in kind:
        depthwise, pointwise = layer.depthwise_kernel.value, layer.pointwise_kernel.value[0, 0]
        pointwise = pointwise.reshape(*depthwise.shape[2:], -1)
        return torch.einsum("hwim,imo->oihw", depthwise, pointwise)
    kernel = getattr(getattr(layer, "kernel", None), "value", None)
    if not isinstance(kernel, Tensor) or kernel.dim() != 4:
        return None
    if "DepthwiseConv2D" in kind:  # (kh, kw, in, multiplier), output channel = in * multiplier + which
        return kernel.permute(2, 3, 0, 1).flatten(0, 1).unsqueeze(1)
    return kernel.permute(2, 3, 0, 1) if "Conv2DTranspose" in kind else kernel.permute(3, 2, 0, 1)


LAST = Layout(channels_to_front, channels_to_back, kernel_of)
FIRST = Layout(kernel=kernel_of)


def is_channels_last(layers: Mapping[str, Any], default: str) -> bool:
    """Return whether the maps are (b, h, w, c), as the first layer that knows says."""
    formats = (getattr(one, "data_format", None) for one in layers.values())
    return str(next((one for one in formats if one), default)) == "channels_last"


def first_channels(layers: Mapping[str, Any]) -> int:
    """Return the input channels of the first two-dimensional convolution, 3 where there is none."""
    kernels: list[Any] = [getattr(getattr(one, "kernel", None), "shape", ()) for one in layers.values()]
    return next((int(one[2]) for one in kernels if len(one) == 4), 3)


def takes_bytes(network: Any) -> bool:
    """Return whether a network's first step brings pixels of 0..255 down, as far as can be told."""
    steps: Any = getattr(network, "operations", None) or getattr(network, "layers", ())
    for one in steps:
        kind = type(one).__name__
        if kind == "InputLayer" or kind.startswith("Random") or kind in ("GetItem", "CenterCrop", "Resizing"):
            continue
        if getattr(one, "layers", None) and kind in ("Functional", "Sequential"):
            if all(type(inner).__name__.startswith(("Random", "InputLayer")) for inner in one.layers):
                continue
            return takes_bytes(one)
        constant = constant_of(one)
        if kind == "Rescaling":
            return bool(np.max(np.abs(one.scale)) < 0.1)
        if kind == "Normalization":
            return bool(np.max(np.abs(np.asarray(one.mean.detach().cpu()))) > 2)
        if kind in ("Divide", "TrueDivide", "Subtract"):
            return constant > 2
        return kind == "Multiply" and 0 < constant < 0.1
    return False


def constant_of(operation: Any) -> float:
    """Return the largest number that an operation of a network's graph combines its input with, 0 where none."""
    nodes: Any = getattr(operation, "_inbound_nodes", ())
    given = [*nodes[0].arguments.args, *nodes[0].arguments.kwargs.values()] if nodes else []
    plain = [one.detach().cpu().numpy() if isinstance(one, Tensor) else one for one in given]
    numbers = [np.abs(one).max() for one in plain if isinstance(one, int | float | list | np.ndarray)]
    return float(max(numbers, default=0))
