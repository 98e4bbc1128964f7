"""`load`: the `Model` handle of a reference or a model object. There is one adapter for each framework."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from phosphene.errors import InvalidRequest, ModelNotFound, first_line
from phosphene.network.loading import keras, pytorch
from phosphene.network.loading.builtin import BUILTIN
from phosphene.network.loading.keras_archive import is_saved_model
from phosphene.network.loading.pytorch import LoadOptions
from phosphene.network.model import Model
from phosphene.network.preprocessing import Preprocessing

# the adapters of references SCHEME/NAME
BY_SCHEME: dict[str, Callable[[str, LoadOptions], Model]] = {
    "builtin": pytorch.from_builtin,
    "torchvision": pytorch.from_torchvision,
    "timm": pytorch.from_timm,
    "keras": keras.from_application,
}


def load(
    model: str | Path | nn.Module,
    *,
    weights: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: int | tuple[int, int] | None = None,
    channels_in: int | None = None,
    labels: Sequence[str] | str | Path | None = None,
    device: str | torch.device = "cpu",
    trust: bool = False,
) -> Model:
    """Return the handle of a model; its `ref` is None if the reference alone would load a different network.

    Args:
        model: `builtin/vgg19`, `builtin/efficientnet-lite0`, `torchvision/NAME`, `timm/NAME`, `keras/NAME`, the path of
            a saved Keras model, `package.module:callable` (called without arguments), or a `torch.nn.Module` or Keras
            model, which is used in place and never changed.
        weights: by default the trained ones; `none` for random ones, or a file: `.safetensors`, `.pt`, `.pth`; `.h5`
            for Keras models.
        mean, std: one number per channel, for images in [0, 1]; by default the model's own, else 0 and 1.
        input_size: side or (h, w) of the network's input in pixels; by default the model's own, else found by trying.
        channels_in: channels of its images; by default those of its first convolution.
        labels: class names, or a text file with one per line.
        device: where to put a model that is loaded by reference.
        trust: let Lambda layers and custom objects in a saved Keras model run their author's code.

    Raises:
        ModelNotFound, ModelRefused, WeightsRefused, ExtraMissing, InvalidRequest, SizeRefused.

    Example:
        >>> load("builtin/vgg19").input_size
        (224, 224)
    """
    options = load_options(weights, input_size, channels_in)
    handle = with_normalisation(handle_of(model, options, device, trust), mean, std)
    handle = replace(handle, labels=handle.labels if labels is None else read_labels(labels))
    settings = settings_beside_reference(options, mean, std, trust)
    if settings and handle.ref is not None:
        handle = replace(handle, ref=None, options=settings)
    handle.check_finite()
    return handle


def load_options(
    weights: str | Path | None, input_size: int | tuple[int, int] | None, channels_in: int | None
) -> LoadOptions:
    """Return the arguments of `load` that the adapters need.

    Raises:
        InvalidRequest: a size or number of channels is below 1, or a size is not a side or (h, w).
    """
    if channels_in is not None and channels_in < 1:
        raise InvalidRequest(f"a network has at least 1 input channel, not {channels_in}")
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise InvalidRequest(f"an input size is a side or (height, width) of at least 1 px, not {input_size}")
    return LoadOptions(None if weights is None else str(weights), size, channels_in)


def handle_of(model: Any, options: LoadOptions, device: str | torch.device, trust: bool) -> Model:
    """Return the handle of a model object where it is, or of a model loaded by reference on the device.

    Raises:
        ModelNotFound: it is neither.
        InvalidRequest: there is no such device.
    """
    if keras.is_keras_model(model):
        return keras.from_keras(model, options)
    if isinstance(model, nn.Module):
        return pytorch.from_module(model, options)
    if not isinstance(model, str | Path):
        raise ModelNotFound(f"a model is a reference such as 'builtin/vgg19' or a torch.nn.Module, not {type(model)}")
    target = torch_device(device)
    handle = from_reference(str(model), options, trust)
    handle.module.to(target)
    return handle


def from_reference(reference: str, options: LoadOptions, trust: bool) -> Model:
    """Return the model that a reference names.

    Raises:
        ModelNotFound: it has none of the forms of a reference, or no model has that name.
    """
    scheme, slash, name = reference.partition("/")
    if is_saved_model(reference):
        model = keras.from_saved(reference, options, trust)
    elif slash and scheme in BY_SCHEME:
        model = BY_SCHEME[scheme](name, options)
    elif ":" in reference and not Path(reference).exists():
        model = pytorch.from_callable(reference, options)
    else:
        raise ModelNotFound(
            f"{reference!r} is no model reference; give builtin/NAME ({', '.join(BUILTIN)}), torchvision/NAME, "
            "timm/NAME, keras/NAME, a .keras, .h5 or .hdf5 file, or package.module:callable"
        )
    size = options.input_size or model.input_size
    return replace(model, name=reference, ref=reference, input_size=size, notes=(*options.notes, *model.notes))


def settings_beside_reference(
    options: LoadOptions, mean: Sequence[float] | None, std: Sequence[float] | None, trust: bool
) -> dict[str, Any]:
    """Return in JSON terms the arguments of `load` that were given and that change the network, by their names."""
    settings = {
        "weights": options.weights,
        "mean": None if mean is None else list(map(float, mean)),
        "std": None if std is None else list(map(float, std)),
        "input_size": None if options.input_size is None else list(options.input_size),
        "channels_in": options.channels_in,
        "trust": trust or None,
    }
    return {name: value for name, value in settings.items() if value is not None}


def torch_device(name: str | torch.device) -> torch.device:
    """Return the device of a name; `auto` is the first GPU if there is one, else the CPU.

    Raises:
        InvalidRequest: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidRequest(
            f"the device {name!r} cannot be used: {first_line(error)}; choose auto, cpu, cuda, cuda:N or mps"
        ) from error
    return device


def with_normalisation(model: Model, mean: Sequence[float] | None, std: Sequence[float] | None) -> Model:
    """Return the handle with the given mean or standard deviation, without the notes on its own normalisation.

    Raises:
        InvalidRequest: their number does not fit the channels, a value is not finite, or a deviation not above 0.
    """
    if mean is None and std is None:
        return model
    present = model.preprocessing if isinstance(model.preprocessing, Preprocessing) else Preprocessing()
    mean = present.mean if mean is None else tuple(map(float, mean))
    std = present.std if std is None else tuple(map(float, std))
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, model.channels_in):
            raise InvalidRequest(f"{name} needs 1 or {model.channels_in} numbers, one per channel, not {len(values)}")
        if not all(map(math.isfinite, values)):
            raise InvalidRequest(f"{name} consists of finite numbers, not {values}")
    if min(std) <= 0:
        raise InvalidRequest(f"a standard deviation is above 0, not {min(std)}")
    notes = tuple(note for note in model.notes if note not in (pytorch.UNNORMALISED, keras.RESCALES))
    return replace(model, preprocessing=Preprocessing(mean, std, present.bgr), notes=notes)


def read_labels(labels: Sequence[str] | str | Path) -> tuple[str, ...]:
    """Return class names from a sequence or a text file, without the blank lines at the file's end.

    Raises:
        InvalidRequest: the file cannot be read as text.
    """
    if not isinstance(labels, str | Path):
        return tuple(labels)
    try:
        text = Path(labels).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"the labels file {labels} cannot be read: {error}") from error
    return tuple(line.strip() for line in text.rstrip().split("\n"))
