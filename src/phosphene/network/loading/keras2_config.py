"""Configs of networks that Keras 2 wrote, upgraded to what Keras 3 reads."""

from collections.abc import Callable
from typing import Any

Config = dict[str, Any]

NETWORKS = ("Functional", "Model", "Sequential")
# arguments that Keras 2 wrote for layers that do not have them
DROPPED_ARGUMENTS = {
    "DepthwiseConv2D": ("groups", "kernel_initializer", "kernel_regularizer", "kernel_constraint"),
    "SeparableConv2D": ("groups", "kernel_initializer", "kernel_regularizer", "kernel_constraint"),
    "Conv2DTranspose": ("groups",),
}
# (scale, offset) of the operation between the input and a number
ARITHMETIC: dict[str, Callable[[float], tuple[float, float]]] = {
    "math.truediv": lambda number: (1 / number, 0.0),
    "math.multiply": lambda number: (number, 0.0),
    "math.subtract": lambda number: (1.0, -number),
    "math.add": lambda number: (1.0, number),
    "__operators__.add": lambda number: (1.0, number),
}


def upgrade_config(config: Any) -> Any:
    """Return a copy, as Keras 3 reads it, of the config of a network that Keras 2 wrote."""
    if isinstance(config, list):
        return [upgrade_config(value) for value in config]
    if not isinstance(config, dict):
        return config
    if set(config) == {"type", "value"} and config["type"] == "ndarray":  # a numpy scalar
        return config["value"]
    kind = config.get("class_name")
    if not isinstance(kind, str):
        return {key: upgrade_config(value) for key, value in config.items()}
    config = with_input_layer(config) if kind == "Sequential" else config
    config = as_rescaling(config) if kind == "TFOpLambda" else config
    layer = {key: upgrade_config(value) for key, value in config.items()}
    if isinstance(layer.get("config"), dict):
        upgrade_layer(layer)
    return layer


def upgrade_layer(layer: Config) -> None:
    """Upgrade the arguments of a layer or network in place; what it contains is upgraded already."""
    kind, inner = layer["class_name"], layer["config"]
    shape = inner.pop("batch_input_shape", None)
    if kind == "InputLayer" and shape is not None:
        inner["batch_shape"] = shape
    for name in DROPPED_ARGUMENTS.get(kind, ()):
        inner.pop(name, None)
    if isinstance(inner.get("axis"), list) and len(inner["axis"]) == 1:
        inner["axis"] = inner["axis"][0]
    if kind in NETWORKS and "input_layers" in inner:
        layer["class_name"] = "Functional"
        if "module" in layer:
            layer["module"] = "keras.src.models.functional"
        count_calls_from_zero(inner)
        for ends in ("input_layers", "output_layers"):  # a single tensor is not in a list
            inner[ends] = inner[ends][0] if len(inner[ends]) == 1 else inner[ends]


def with_input_layer(config: Config) -> Config:
    """Return the config of a sequential network with an input layer; Keras 2 wrote its shape in the first layer."""
    inner = config["config"]
    inner = dict(inner) if isinstance(inner, dict) else {"name": "sequential", "layers": inner}
    layers = list(inner["layers"])
    first = layers[0]["config"] if layers else {}
    if layers and layers[0]["class_name"] != "InputLayer" and "batch_input_shape" in first:
        arguments = {"batch_input_shape": first["batch_input_shape"], "name": f"{first['name']}_input"}
        layers.insert(0, {**layers[0], "class_name": "InputLayer", "config": arguments})
    return {**config, "config": {**inner, "layers": layers}}


def as_rescaling(config: Config) -> Config:
    """Return as a Rescaling layer an operation on the network's input, such as `preprocess_input(x)` leaves behind.

    Keras 2 wrote x / 127.5 - 1 as two operations of TensorFlow. Any other operation is returned unchanged.
    """
    nodes = config.get("inbound_nodes") or [[None] * 4]
    arguments = nodes[0][3] if len(nodes) == 1 and len(nodes[0]) == 4 else None
    number = arguments.get("y") if isinstance(arguments, dict) else None
    function = config["config"].get("function")
    if function not in ARITHMETIC or isinstance(number, bool) or not isinstance(number, int | float) or not number:
        return config
    scale, offset = ARITHMETIC[function](number)
    layer = {**config, "class_name": "Rescaling", "inbound_nodes": [[[*nodes[0][:3], {}]]]}
    layer["config"] = {"name": config["config"]["name"], "scale": scale, "offset": offset}
    if "module" in config:
        layer |= {"module": "keras.layers", "registered_name": None}
    return layer


def count_calls_from_zero(network: Config) -> None:
    """Number the calls of networks inside a network from 0, where Keras 2 began at 1, in place."""
    shifted = set()
    nested = {layer["name"]: layer for layer in network["layers"] if layer["class_name"] in NETWORKS}
    nodes = [node for layer in network["layers"] for node in layer["inbound_nodes"]]
    inputs = [tensor for node in nodes for tensor in tensor_references(node)]
    outputs = tensor_references(network["output_layers"])
    for name, layer in nested.items():
        calls = [call for source, call, *_ in (*inputs, *outputs) if source == name]
        if max(calls, default=0) >= len(layer["inbound_nodes"]):
            shifted.add(name)
    for tensor in inputs:
        tensor[1] -= tensor[0] in shifted
    for tensor in outputs:  # Keras 3 itself shifts the outputs of functional networks, but not of sequential ones
        tensor[1] -= tensor[0] in shifted and nested[tensor[0]]["class_name"] == "Sequential"


def tensor_references(node: Any) -> list[Any]:
    """Return the references [layer, call, index, …] to tensors in a node of an old config, however they are nested."""
    if isinstance(node, list) and len(node) in (3, 4) and isinstance(node[0], str) and isinstance(node[1], int):
        return [node]
    inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [reference for value in inner for reference in tensor_references(value)]
