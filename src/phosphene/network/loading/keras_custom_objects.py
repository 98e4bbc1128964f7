"""Custom objects in the config of a saved Keras network: what it needs beyond Keras itself, and where to import it."""

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from phosphene.network.loading.pytorch import current_folder_first

IsClass = Callable[[str, str], bool]
IsFunction = Callable[[str], bool]

NAMESPACES = ("layers", "models", "initializers", "regularizers", "constraints", "dtype_policies")
# classes that run code from the file when they are built
RUNS_CODE = {"Lambda", "__lambda__", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer"}
# how Keras writes plain Python values
VALUES = {"__keras_tensor__", "__tensor__", "__numpy__", "__bytes__", "__ellipsis__", "__slice__", "__tuple__"}
VALUES |= {"__typespec__", "TensorShape"}
NOT_READ = ("compile_config", "build_config", "training_config")  # they describe a training, which is not resumed


def config_entries(config: Any) -> Iterator[dict[str, Any]]:
    """Yield every dict in JSON values that describes an object to build, outermost first."""
    pending = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if isinstance(value.get("class_name"), str):
                yield value
            pending += [inner for key, inner in reversed(value.items()) if key not in NOT_READ]
        elif isinstance(value, list):
            pending += reversed(value)


def custom_objects(config: dict[str, Any], is_class: IsClass, is_function: IsFunction) -> list[str]:
    """Return in words what a config needs beyond Keras' own parts: custom objects, and what runs code from the file.

    Args:
        config: the network as JSON values; nothing in it is built.
        is_class: whether Keras builds networks from a class of that name and module.
        is_function: whether Keras has an activation function of that name.
    """
    descriptions = (custom_object(entry, is_class, is_function) for entry in config_entries(config))
    return list(dict.fromkeys(description for description in descriptions if description))


def custom_object(entry: dict[str, Any], is_class: IsClass, is_function: IsFunction) -> str:
    """Return what an entry of a config needs beyond Keras' own parts, "" if nothing."""
    kind, inner, module = entry["class_name"], entry.get("config"), entry.get("module")
    name = inner.get("name") if isinstance(inner, dict) else None
    quoted = f" {name!r}" if isinstance(name, str) else ""
    if kind in RUNS_CODE:
        return f"the {kind} layer{quoted}" if kind != "__lambda__" else "a lambda function"
    if kind in VALUES:
        return ""
    if kind == "function":
        built_in = isinstance(inner, str) and is_function(inner) and is_keras(module)
        return "" if built_in else f"the custom function {inner!r}"
    package = str(entry.get("registered_name") or "").rpartition(">")[0]
    if not is_class(kind, str(module)) or not is_keras(module) or package not in ("", "Keras", "keras"):
        return f"the custom class {kind}{quoted}"
    for key, value in inner.items() if isinstance(inner, dict) else ():
        if key.endswith("activation") and isinstance(value, str) and not is_function(value):
            return f"the custom function {value!r}"
    return ""


def is_keras(module: Any) -> bool:
    """Return whether the module in an entry is Keras' own, or missing as in old files."""
    return module is None or str(module).split(".")[0] in ("keras", "tf_keras", "builtins")


def lookups(keras: Any) -> tuple[IsClass, IsFunction]:
    """Return the `is_class` and `is_function` of `custom_objects` for an imported Keras."""
    members = [member for space in NAMESPACES for member in vars(getattr(keras, space)).items()]
    classes = {"Functional", "Model", "Sequential"} | {name for name, value in members if isinstance(value, type)}
    functions = {name for name, value in vars(keras.activations).items() if inspect.isfunction(value)}

    def is_class(name: str, module: str) -> bool:
        operation = getattr(sys.modules.get(module), name, None) if module.startswith("keras.src.ops.") else None
        return name in classes or (isinstance(operation, type) and issubclass(operation, keras.Operation))

    return is_class, (functions - {"get", "serialize", "deserialize"}).__contains__


def import_custom_objects(config: dict[str, Any]) -> dict[str, Any]:
    """Return the custom classes and functions of a trusted file by name, from the modules that the file names.

    Those that cannot be imported are left to Keras, which may have them registered.
    """
    imported: dict[str, Any] = {}
    with current_folder_first():
        for entry in config_entries(config):
            name = entry.get("config") if entry["class_name"] == "function" else entry["class_name"]
            if is_keras(entry.get("module")) or not isinstance(name, str):
                continue
            with contextlib.suppress(ImportError, AttributeError):
                value = getattr(importlib.import_module(entry["module"]), name)
                imported |= {name: value, str(entry.get("registered_name")): value}
    return imported
