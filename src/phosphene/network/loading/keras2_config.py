"""Configs of networks that Keras 2 wrote, brought to what Keras 3 reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Config = dict[str, Any]

NETWORKS = ("Functional", "Model", "Sequential")
# arguments that Keras 2 wrote down for layers that do not have them
DROPPED_ARGUMENTS = {
    "DepthwiseConv2D": ("groups", "kernel_initializer", "kernel_regularizer", "kernel_constraint"),
    "SeparableConv2D": ("groups", "kernel_initializer", "kernel_regularizer", "kernel_constraint"),
    "Conv2DTranspose": ("groups",),
}
# what an operation with y does to x, as x · scale + offset
STEPS: dict[str, Callable[[float], tuple[float, float]]] = {
    "math.truediv": lambda y: (1 / y, 0.0),
    "math.multiply": lambda y: (y, 0.0),
    "math.subtract": lambda y: (1.0, -y),
    "math.add": lambda y: (1.0, y),
    "__operators__.add": lambda y: (1.0, y),
}


def upgrade_config(config: Any) -> Any:
    """Return the config of a network that Keras 2 wrote as Keras 3 reads it; what is given stays as it is."""
    if isinstance(config, list):
        return [upgrade_config(one) for one in config]
    if not isinstance(config, dict):
        return config
    if set(config) == {"type", "value"} and config["type"] == "ndarray":  # a number that was one of numpy's
        return config["value"]
    kind = config.get("class_name")
    if not isinstance(kind, str):
        return {key: upgrade_config(value) for key, value in config.items()}
    config = with_input(config) if kind == "Sequential" else as_rescaling(config) if kind == "TFOpLambda" else config
    new = {key: upgrade_config(value) for key, value in config.items()}
    return upgrade_layer(new) if isinstance(new.get("config"), dict) else new


def upgrade_layer(new: Config) -> Config:
    """Return the config of one layer or network, of which the parts are mended, with its own arguments mended."""
    kind, inner = new["class_name"], new["config"]
    shape = inner.pop("batch_input_shape", None)
    if kind == "InputLayer" and shape is not None:
        inner["batch_shape"] = shape
    for name in DROPPED_ARGUMENTS.get(kind, ()):
        inner.pop(name, None)
    if isinstance(inner.get("axis"), list) and len(inner["axis"]) == 1:
        inner["axis"] = inner["axis"][0]
    if kind in NETWORKS and "input_layers" in inner:
        new["class_name"] = "Functional"
        if "module" in new:
            new["module"] = "keras.src.models.functional"
        count_calls_from_zero(inner)
        for ends in ("input_layers", "output_layers"):  # one tensor, not a list of one
            inner[ends] = inner[ends][0] if len(inner[ends]) == 1 else inner[ends]
    return new


def with_input(config: Config) -> Config:
    """Return the config of a sequential network with an input layer, which Keras 2 left to the first layer."""
    inner = config["config"]
    inner = dict(inner) if isinstance(inner, dict) else {"name": "sequential", "layers": inner}
    layers = list(inner["layers"])
    first = layers[0]["config"] if layers else {}
    if layers and layers[0]["class_name"] != "InputLayer" and "batch_input_shape" in first:
        about = {"batch_input_shape": first["batch_input_shape"], "name": f"{first['name']}_input"}
        layers.insert(0, {**layers[0], "class_name": "InputLayer", "config": about})
    return {**config, "config": {**inner, "layers": layers}}


def as_rescaling(config: Config) -> Config:
    """Return arithmetic on a network's input, as `preprocess_input(x)` left it in the graph, as a Rescaling layer.

    Keras 2 wrote x / 127.5 - 1 down as two operations of TensorFlow. What is not arithmetic with one number stays.
    """
    nodes = config.get("inbound_nodes") or [[None] * 4]
    arguments = nodes[0][3] if len(nodes) == 1 and len(nodes[0]) == 4 else None
    number = arguments.get("y") if isinstance(arguments, dict) else None
    function = config["config"].get("function")
    if function not in STEPS or isinstance(number, bool) or not isinstance(number, int | float) or not number:
        return config
    scale, offset = STEPS[function](number)
    new = {**config, "class_name": "Rescaling", "inbound_nodes": [[[*nodes[0][:3], {}]]]}
    new["config"] = {"name": config["config"]["name"], "scale": scale, "offset": offset}
    if "module" in config:
        new |= {"module": "keras.layers", "registered_name": None}
    return new


def count_calls_from_zero(network: Config) -> None:
    """Have the first call of a network inside a network be its call 0, where Keras 2 began at 1, in place."""
    shifted = set()
    calls = {one["name"]: one for one in network["layers"] if one["class_name"] in NETWORKS}
    inputs = [one for layer in network["layers"] for node in layer["inbound_nodes"] for one in tensors(node)]
    outputs = tensors(network["output_layers"])
    for name, layer in calls.items():
        if max((one[1] for one in (*inputs, *outputs) if one[0] == name), default=0) >= len(layer["inbound_nodes"]):
            shifted.add(name)
    for one in inputs:
        one[1] -= one[0] in shifted
    for one in outputs:  # for other networks Keras 3 does so itself, here only
        one[1] -= one[0] in shifted and calls[one[0]]["class_name"] == "Sequential"


def tensors(node: Any) -> list[Any]:
    """Return the tensors [layer, call, which, …] that a node of an old config names, in whatever nesting."""
    if isinstance(node, dict):
        return [found for one in node.values() for found in tensors(one)]
    if not isinstance(node, list):
        return []
    if len(node) in (3, 4) and isinstance(node[0], str) and isinstance(node[1], int):
        return [node]
    return [found for one in node for found in tensors(one)]
