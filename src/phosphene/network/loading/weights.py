"""Weights: read from a file without running anything in it, or drawn at random from a fixed seed."""

import pickle
import pickletools
import random
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from phosphene.errors import WeightsRefused, first_line

RANDOM = "random weights: the pictures show the architecture, not anything learned"
SUFFIXES = (".safetensors", ".pt", ".pth")
WRAPPERS = ("module.", "_orig_mod.")  # the prefixes that DataParallel and torch.compile add to every name
CALLING_OPCODES = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "REDUCE", "NEWOBJ", "NEWOBJ_EX"}


@contextmanager
def seeded() -> Iterator[None]:
    """Draw from seed 0 inside, and restore the global generators of torch, numpy and Python at the end."""
    gpus = range(torch.cuda.device_count()) if cast(Any, torch.cuda).is_initialized() else ()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=list(gpus)):
        # torch.manual_seed would also seed GPUs that are not in use yet
        torch.default_generator.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def randomise(module: nn.Module) -> None:
    """Initialise every layer's weights again, from seed 0, by the layer's own rule."""
    with seeded():
        for layer in module.modules():
            if hasattr(layer, "reset_parameters"):
                cast(Any, layer).reset_parameters()


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a weights file into a module that phosphene built. Its names may all begin with `module.` or `_orig_mod.`.

    Raises:
        WeightsRefused: the file is missing, damaged, of another network, or a pickle that wants to run code.
    """
    state, expected = read_weights(path), module.state_dict()
    for prefix in WRAPPERS:
        if all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in expected):
            consume_prefix_in_state_dict_if_present(state, prefix)
    for name in expected:
        if name.endswith("num_batches_tracked"):  # a count without effect, which files from before PyTorch 0.4.1 lack
            state.setdefault(name, expected[name])
    if differing := differences(expected, state):
        raise WeightsRefused(f"{path} holds the weights of another network: {'; '.join(differing)}")
    if not hasattr(state, "_metadata"):  # layers read the version of their format from it
        cast(Any, state)._metadata = cast(Any, expected)._metadata
    try:
        module.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise WeightsRefused(f"{path} does not fit the network: {first_line(error)}") from error


def differences(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Return in words how a state dict differs from the one that is expected, with the first names of each kind."""
    changed = [
        f"{name} is {shape_and_dtype(state[name])} where {shape_and_dtype(tensor)} is needed"
        for name, tensor in expected.items()
        if name in state and shape_and_dtype(state[name]) != shape_and_dtype(tensor)
    ]
    groups = (
        ("missing", [name for name in expected if name not in state]),
        ("unknown", [name for name in state if name not in expected]),
        ("of another shape", changed),
    )
    return [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in groups if names]


def shape_and_dtype(tensor: Tensor) -> str:
    """Return a tensor's shape in words, with its dtype unless that is floating: floating dtypes fit each other."""
    shape = str(tuple(tensor.shape))
    return shape if tensor.is_floating_point() else f"{str(tensor.dtype).removeprefix('torch.')} {shape}"


def read_weights(path: Path) -> OrderedDict[str, Tensor]:
    """Return the state dict in a `.safetensors`, `.pt` or `.pth` file, without running anything in it.

    A `.pt` file may hold the state dict inside another dict, as `{"state_dict": …}`, if it holds only one.
    """
    from safetensors.torch import load_file

    if not path.is_file():
        raise WeightsRefused(f"there is no weights file {path}")
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise WeightsRefused(f"{path} is no weights file; give a .safetensors, .pt or .pth file")
    if path.stat().st_size == 0:
        raise WeightsRefused(f"{path} is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged files cause warnings about their format
            content = load_file(path) if kind == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise unreadable_file(path, error) from error
    return only_state_dict(path, content)


def unreadable_file(path: Path, error: Exception) -> WeightsRefused:
    """Return the refusal of a file that raised an error when it was read."""
    if isinstance(error, pickle.UnpicklingError) and ("GLOBAL" in str(error) or wants_code(path)):
        return WeightsRefused(
            f"{path} is a pickle that wants to run code, which is refused; "
            "save its state dict: torch.save(module.state_dict(), 'weights.pt')"
        )
    # torch's own message advises reading the file without the safeguard
    reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({type(error).__name__}: {first_line(error)})"
    return WeightsRefused(f"{path} is damaged, cut short or of another format{reason}; save or download it again")


def wants_code(path: Path) -> bool:
    """Return whether a file is a bare pickle that calls something; nothing in it is executed."""
    try:
        return any(operation.name in CALLING_OPCODES for operation, _, _ in pickletools.genops(path.read_bytes()))
    except Exception:
        return False


def is_state_dict(value: object) -> bool:
    """Return whether a value is a state dict: names to tensors."""
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def only_state_dict(path: Path, content: Any) -> OrderedDict[str, Tensor]:
    """Return the only state dict that a file's content is or holds, with the versions of its layers' formats."""
    entries = content.items() if isinstance(content, Mapping) else ()
    inner = {key: value for key, value in entries if is_state_dict(value) and value}
    if is_state_dict(content):
        source = content
    elif len(inner) == 1:
        source = next(iter(inner.values()))
    elif inner:
        raise WeightsRefused(f"{path} holds several state dicts ({', '.join(map(str, inner))}); save the one you mean")
    else:
        raise WeightsRefused(f"{path} holds no state dict; save one with torch.save(module.state_dict(), path)")
    state: OrderedDict[str, Tensor] = OrderedDict(source)
    if hasattr(source, "_metadata"):
        cast(Any, state)._metadata = source._metadata
    return state
