"""A Keras network as a plain module: how to call it, its layers by address, and the layout of its tensors."""

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

    The Keras network itself stays the user's and is not changed.
    """

    def __init__(self, network: Any, layers: Mapping[str, Any], channels_last: bool) -> None:
        super().__init__()
        self.network = network
        self.by_address = dict(layers)
        self.layers = nn.ModuleList(layers.values())  # Keras keeps them where PyTorch does not look
        self.channels_last = channels_last
        self.input_structure = getattr(network, "_inputs_struct", None)
        self.rank = len(input_shape(network) or (0,) * 4)
        self.eval_only = {"training": False} if takes_training(network) else {}

    def forward(self, image: Tensor) -> Any:
        """Return the network's output for images (b, c, h, w)."""
        inputs: Any = image[:, 0] if self.rank == 3 else image
        if self.channels_last and self.rank == 4:
            inputs = image.permute(0, 2, 3, 1).contiguous()
        if isinstance(self.input_structure, dict):
            inputs = {next(iter(self.input_structure)): inputs}
        elif isinstance(self.input_structure, list | tuple):
            inputs = [inputs]
        with sys.modules["keras"].device(str(image.device)), self.restored_losses():
            return self.network(inputs, **self.eval_only)

    @contextmanager
    def restored_losses(self) -> Iterator[None]:
        """Restore the lists of losses at the end: a layer that regularises its output adds a loss at every call."""
        saved = [(layer, list(layer._losses)) for layer in (self.network, *self.layers) if hasattr(layer, "_losses")]
        try:
            yield
        finally:
            for layer, losses in saved:
                if len(layer._losses) != len(losses):
                    layer._losses[:] = losses
                    layer._loss_ids.clear()
                    layer._loss_ids.update(map(id, losses))

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield every variable of the network once, including the states of its random generators."""
        variables = {id(variable.value): variable for variable in self.network.variables}
        for index, variable in enumerate(variables.values()):
            yield f"{prefix}{variable.path}@{index}", variable.value

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the weights by the address of their layer and their name, as `base/conv1/kernel`."""
        state: dict[str, Tensor] = {}
        seen: set[int] = set()
        # in reverse, inner layers come before the layer that holds them, so that a weight is named after its own layer
        for path, layer in (*reversed(self.by_address.items()), ("", self.network)):
            for weight in layer.weights:
                if id(weight) not in seen:
                    seen.add(id(weight))
                    name = f"{path}/{weight.name}".lstrip("/")
                    state[name if name not in state else f"{name}@{len(state)}"] = weight.value.detach()
        return state


def takes_training(network: Any) -> bool:
    """Return whether a network takes the argument `training`, which a subclass may lack."""
    parameters = inspect.signature(network.call).parameters.values()
    return any(parameter.name == "training" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def input_shape(network: Any) -> tuple[int | None, ...] | None:
    """Return the shape of a network's only input with its batch axis, None if the network does not say."""
    inputs = getattr(network, "inputs", None)
    return tuple(inputs[0].shape) if inputs else None


def layers_by_address(network: Any) -> dict[str, Any]:
    """Return every layer by its address: the names of the layers that hold it, then its name, joined by `/`."""
    layers: dict[str, Any] = {}
    seen: set[int] = set()

    def walk(holder: Any, prefix: str) -> None:
        for layer in holder._flatten_layers(include_self=False, recursive=False):
            is_input = type(layer).__name__ == "InputLayer"
            if is_input or id(layer) in seen or layer is getattr(holder, "activation", None):
                continue
            seen.add(id(layer))
            path = prefix + layer.name
            while path in layers:
                path += "_"
            layers[path] = layer
            walk(layer, f"{path}/")

    walk(network, "")
    return layers


def hookable_modules(layers: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Return the layers by address, and a hook point before the activation function of each layer that has one."""
    modules: dict[str, nn.Module] = {}
    for path, layer in layers.items():
        modules[path] = layer
        activation = getattr(layer, "activation", None)
        replaceable = "activation" in vars(layer) or "activation" in layer._modules
        if replaceable and callable(activation) and layer.weights and getattr(activation, "__name__", "") != "linear":
            modules[f"{path}#{InnerHookPoint.ACTIVATION}"] = InnerHookPoint(layer, InnerHookPoint.ACTIVATION)
    return modules


def channels_to_front(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 3, 1, 2) if tensor.dim() == 4 else tensor


def channels_to_back(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor


def kernel_of(module: nn.Module) -> Tensor | None:
    """Return a Keras convolution's kernel (out, in, kh, kw), None for anything else.

    A depthwise kernel has one input channel per output; a separable kernel is the product of its two.
    """
    layer: Any = module.owner if isinstance(module, InnerHookPoint) else module
    kinds = {ancestor.__name__ for ancestor in type(layer).__mro__}
    if "SeparableConv2D" in kinds:
        depthwise, pointwise = layer.depthwise_kernel.value, layer.pointwise_kernel.value[0, 0]
        pointwise = pointwise.reshape(*depthwise.shape[2:], -1)
        return torch.einsum("hwim,imo->oihw", depthwise, pointwise)
    kernel = getattr(getattr(layer, "kernel", None), "value", None)
    if not isinstance(kernel, Tensor) or kernel.dim() != 4:
        return None
    if "DepthwiseConv2D" in kinds:  # (kh, kw, in, multiplier), output channel = in * multiplier + copy
        return kernel.permute(2, 3, 0, 1).flatten(0, 1).unsqueeze(1)
    return kernel.permute(2, 3, 0, 1) if "Conv2DTranspose" in kinds else kernel.permute(3, 2, 0, 1)


CHANNELS_LAST = Layout(channels_to_front, channels_to_back, kernel_of)
CHANNELS_FIRST = Layout(kernel=kernel_of)


def is_channels_last(layers: Mapping[str, Any], default: str) -> bool:
    """Return whether the maps are (b, h, w, c), by the first layer that has a data format."""
    formats = (getattr(layer, "data_format", None) for layer in layers.values())
    return str(next((data_format for data_format in formats if data_format), default)) == "channels_last"


def first_channels(layers: Mapping[str, Any]) -> int:
    """Return the input channels of the first two-dimensional convolution, 3 if there is none."""
    shapes: list[Any] = [getattr(getattr(layer, "kernel", None), "shape", ()) for layer in layers.values()]
    return next((int(shape[2]) for shape in shapes if len(shape) == 4), 3)


def takes_bytes(network: Any) -> bool:
    """Return whether the first step of a network scales pixels of 0..255 down, as far as its layers show."""
    operations: Any = getattr(network, "operations", None) or getattr(network, "layers", ())
    for operation in operations:
        kind = type(operation).__name__
        if kind == "InputLayer" or kind.startswith("Random") or kind in ("GetItem", "CenterCrop", "Resizing"):
            continue
        if getattr(operation, "layers", None) and kind in ("Functional", "Sequential"):
            if all(type(layer).__name__.startswith(("Random", "InputLayer")) for layer in operation.layers):
                continue
            return takes_bytes(operation)
        constant = largest_constant(operation)
        if kind == "Rescaling":
            return bool(np.max(np.abs(operation.scale)) < 0.1)
        if kind == "Normalization":
            return bool(np.max(np.abs(np.asarray(operation.mean.detach().cpu()))) > 2)
        if kind in ("Divide", "TrueDivide", "Subtract"):
            return constant > 2
        return kind == "Multiply" and 0 < constant < 0.1
    return False


def largest_constant(operation: Any) -> float:
    """Return the largest absolute number that an operation combines its input with, 0 if there is none."""
    nodes: Any = getattr(operation, "_inbound_nodes", ())
    arguments = [*nodes[0].arguments.args, *nodes[0].arguments.kwargs.values()] if nodes else []
    values = [value.detach().cpu().numpy() if isinstance(value, Tensor) else value for value in arguments]
    maxima = [np.abs(value).max() for value in values if isinstance(value, int | float | list | np.ndarray)]
    return float(max(maxima, default=0))
