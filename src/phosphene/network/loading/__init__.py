"""`load`: from a reference, or a module object, to a `Model`. One adapter a framework, each imported when asked for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from phosphene.errors import InvalidRequest, ModelNotFound, first_line
from phosphene.network.loading.keras import BYTES, from_application, from_keras, is_keras_model
from phosphene.network.loading.keras_archive import is_saved_model
from phosphene.network.loading.pytorch import UNNORMALISED, Sources, from_module, from_reference
from phosphene.network.model import Model
from phosphene.network.preprocessing import Preprocessing


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
    """Return the handle of a model.

    Args:
        model: `builtin/vgg19`, `builtin/efficientnet-lite0`, `torchvision/NAME`, `timm/NAME`, `keras/NAME`, the path of
            a saved Keras model, `package.module:callable` (called without arguments), or a `torch.nn.Module` or Keras
            model, which is used where it is and never changed.
        weights: `none` for random ones, or a `.safetensors`, `.pt` or `.pth` file, for Keras models an `.h5` file; by
            default the trained ones.
        mean, std: one number a channel, in units of an image in [0, 1]; by default the model's own, else 0 and 1.
        input_size: side or (h, w) in pixels of the network's input; by default the model's own, else found by trying.
        channels_in: channels of its images; by default those of its first convolution.
        labels: class names, or a text file with one a line.
        device: where to put a model that is loaded by reference.
        trust: let Lambda layers and custom objects in a saved Keras model run their author's code.

    The handle's `ref` is None where the reference alone would load something else than what was asked for.

    Raises:
        ModelNotFound, ModelRefused, WeightsRefused, ExtraMissing, InvalidRequest, SizeRefused.

    Example:
        >>> load("builtin/vgg19").input_size
        (224, 224)
    """
    if channels_in is not None and channels_in < 1:
        raise InvalidRequest(f"a network has at least 1 input channel, not {channels_in}")
    sources = Sources(None if weights is None else str(weights), size_pair(input_size), channels_in)
    if is_keras_model(model):
        handle = from_keras(model, sources)
    elif isinstance(model, nn.Module):
        handle = from_module(model, sources)
    elif isinstance(model, str | Path):
        place = torch_device(device)
        handle = adapter(str(model), trust)(str(model), sources)
        handle.module.to(place)
    else:
        raise ModelNotFound(f"a model is a reference such as 'builtin/vgg19' or a torch.nn.Module, not {type(model)}")
    changes: dict[str, Any] = {}
    if mean is not None or std is not None:
        changes["preprocessing"] = preprocessing(handle, mean, std)
        changes["notes"] = tuple(note for note in handle.notes if note not in (UNNORMALISED, BYTES))
    if labels is not None:
        changes["labels"] = read_labels(labels)
    told = told_beside(sources, mean, std, trust)
    if told and handle.ref is not None:
        changes |= {"ref": None, "options": told}
    handle = dataclasses.replace(handle, **changes)
    handle.check_finite()
    return handle


def adapter(reference: str, trust: bool) -> Callable[[str, Sources], Model]:
    """Return what loads a model by its reference: a saved Keras model, `keras/NAME`, or anything of PyTorch's."""
    if is_saved_model(reference):
        return partial(from_keras, trust=trust)
    return from_application if reference.startswith("keras/") else from_reference


def told_beside(
    sources: Sources, mean: Sequence[float] | None, std: Sequence[float] | None, trust: bool
) -> dict[str, Any]:
    """Return what a network follows from beside its reference, in JSON terms, without what was left open."""
    told = {
        "weights": sources.weights,
        "mean": None if mean is None else list(map(float, mean)),
        "std": None if std is None else list(map(float, std)),
        "input_size": None if sources.input_size is None else list(sources.input_size),
        "channels_in": sources.channels_in,
        "trust": trust or None,
    }
    return {name: one for name, one in told.items() if one is not None}


def size_pair(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Return a side or (h, w) as (h, w)."""
    pair = (size, size) if isinstance(size, int) else size
    if pair is not None and (len(pair) != 2 or min(pair) < 1):
        raise InvalidRequest(f"an input size is a side or (height, width) of at least 1 px, not {size}")
    return pair


def torch_device(name: str | torch.device) -> torch.device:
    """Return the device of a name; `auto` is the first GPU where there is one.

    Raises:
        InvalidRequest: there is no such device here.
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


def preprocessing(model: Model, mean: Sequence[float] | None, std: Sequence[float] | None) -> Preprocessing:
    """Return the model's own preprocessing with another mean or standard deviation."""
    own = model.preprocessing if isinstance(model.preprocessing, Preprocessing) else Preprocessing()
    chosen = [old if new is None else tuple(map(float, new)) for new, old in ((mean, own.mean), (std, own.std))]
    for name, values in zip(("mean", "std"), chosen, strict=True):
        if len(values) not in (1, model.channels_in):
            raise InvalidRequest(f"{name} needs 1 or {model.channels_in} numbers, one a channel, not {len(values)}")
        if not all(map(math.isfinite, values)):
            raise InvalidRequest(f"{name} is made of finite numbers, not {values}")
    if min(chosen[1]) <= 0:
        raise InvalidRequest(f"a standard deviation is above 0, not {min(chosen[1])}")
    return Preprocessing(chosen[0], chosen[1], own.bgr)


def read_labels(labels: Sequence[str] | str | Path) -> tuple[str, ...]:
    """Return class names from a sequence or a text file; blank lines at the file's end are none.

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
