"""PyTorch models: torchvision, timm, the user's own callable or module, and weights files."""

from __future__ import annotations

import importlib
import pickle
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from phosphene.capture import borrowed
from phosphene.errors import ExtraMissing, ModelNotFound, ModelRefused, SizeRefused, WeightsRefused, nearest
from phosphene.loaders.builtin import BUILTIN, load_builtin
from phosphene.model import Model, Preprocessing, first_line

RANDOM = "random weights: the pictures show the architecture, not anything learned"
SIZES_TO_TRY = (224, 32, 28, 64, 96, 128, 256, 299, 384, 512)


@dataclass(frozen=True)
class Sources:
    """What the user said about a model beside its reference."""

    weights: str | None = None
    input_size: tuple[int, int] | None = None
    channels_in: int | None = None


def from_reference(reference: str, sources: Sources) -> Model:
    """Return the model that a reference names.

    Raises:
        ModelNotFound: it is none of the forms, or nothing goes by that name.
    """
    library, slash, name = reference.partition("/")
    if slash and library in LIBRARIES:
        model = LIBRARIES[library](name, sources)
    elif ":" in reference and not Path(reference).exists():
        model = from_callable(reference, sources)
    else:
        raise ModelNotFound(
            f"{reference!r} is no model reference; give builtin/NAME ({', '.join(BUILTIN)}), torchvision/NAME, "
            "timm/NAME or package.module:callable"
        )
    return with_weights(replace(model, name=reference, ref=reference), sources)


def with_weights(model: Model, sources: Sources) -> Model:
    """Return the model with the weights and figures that the user named."""
    if sources.weights is not None and sources.weights != "none":
        load_weights(model.module, Path(sources.weights))
        model = replace(model, notes=(f"weights from {sources.weights}",))
    channels = sources.channels_in or model.channels_in
    return replace(model, input_size=sources.input_size or model.input_size, channels_in=channels)


def built(build: Callable[[], Any], what: str) -> Any:
    """Return what `build()` makes, without touching the global random state; random weights come from seed 0.

    Raises:
        ModelNotFound: it fails; the message carries the reason, such as a download that was not possible.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build()
    except Exception as error:
        raise ModelNotFound(
            f"{what} could not be made: {type(error).__name__}: {first_line(error)}; "
            "--weights none or --weights PATH does without a download"
        ) from error


def from_builtin(name: str, sources: Sources) -> Model:
    """Return a built-in network; with `--weights none` its architecture with random weights."""
    model = load_builtin(name)
    if sources.weights == "none":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for module in model.module.modules():
                if hasattr(module, "reset_parameters"):
                    cast(Any, module).reset_parameters()
        model = replace(model, notes=(RANDOM,))
    return model


def from_torchvision(name: str, sources: Sources) -> Model:
    """Return a network of torchvision with its default weights, preprocessing and class names."""
    from torchvision import models

    if name not in models.list_models():
        raise ModelNotFound(
            f"torchvision has no model {name!r}; the nearest are: {nearest(name, models.list_models())}"
        )
    entry = models.get_model_weights(name).DEFAULT
    trained = sources.weights is None
    module = built(lambda: models.get_model(name, weights=entry if trained else None), f"torchvision/{name}")
    preset = entry.transforms()
    size = getattr(preset, "crop_size", [224])
    return Model(
        module=module.eval(),
        name=f"torchvision/{name}",
        input_size=(size[0], size[-1]),
        channels_in=first_channels(module),
        preprocessing=Preprocessing(tuple(getattr(preset, "mean", (0.0,))), tuple(getattr(preset, "std", (1.0,)))),
        labels=tuple(entry.meta.get("categories", ())),
        notes=() if trained else (RANDOM,),
    )


def from_timm(name: str, sources: Sources) -> Model:
    """Return a network of timm, preprocessing from its data config."""
    try:
        import timm
    except ImportError as error:
        raise ExtraMissing("timm is not installed; install it with: pip install 'phosphene[timm]'") from error
    known = timm.list_models()
    if name.split(".")[0] not in known:
        raise ModelNotFound(f"timm has no model {name!r}; the nearest are: {nearest(name, known)}")
    trained = sources.weights is None
    options: dict[str, Any] = {} if sources.channels_in is None else {"in_chans": sources.channels_in}
    module = built(lambda: timm.create_model(name, pretrained=trained, **options), f"timm/{name}")
    config = timm.data.resolve_model_data_config(module)  # type: ignore[attr-defined, no-untyped-call]
    channels = config["input_size"][0]
    # a network made for another number of channels keeps the figures of three
    mean, std = (tuple(config[key]) if channels == 3 else tuple(config[key])[:1] for key in ("mean", "std"))
    return Model(
        module=module.eval(),
        name=f"timm/{name}",
        input_size=tuple(config["input_size"][1:]),
        channels_in=channels,
        preprocessing=Preprocessing(mean, std),
        notes=() if trained else (RANDOM,),
    )


def from_callable(reference: str, sources: Sources) -> Model:
    """Return the user's own network, made by calling `package.module:callable` without arguments.

    As with `python -m`, the current folder is searched for the package.
    """
    package, _, name = reference.partition(":")
    sys.path.insert(0, "")
    try:
        make = importlib.import_module(package)
        for piece in name.split("."):
            make = getattr(make, piece)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelNotFound(f"{reference!r} cannot be imported: {first_line(error)}") from error
    finally:
        sys.path.remove("")
    module = built(cast(Callable[[], Any], make), reference)
    if not isinstance(module, nn.Module):
        raise ModelRefused(f"{reference}() returned {type(module).__name__}, not a torch.nn.Module")
    if sources.weights not in (None, "none"):
        load_weights(module, Path(str(sources.weights)))
    return replace(from_module(module, replace(sources, weights=None)), ref=reference)


def from_module(module: nn.Module, sources: Sources) -> Model:
    """Return the handle of a module object, used where it is.

    Raises:
        ModelRefused: weights were named, which would change the user's module; or it is a scripted module.
    """
    if sources.weights is not None:
        raise ModelRefused("a module object already has its weights; load them into it before, or load by reference")
    # torch.compile wraps the module, and hooks need the plain one
    module = cast(nn.Module, getattr(module, "_orig_mod", module))
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelRefused("a scripted module cannot be read layer by layer; give the nn.Module it was made from")
    channels = sources.channels_in or first_channels(module)
    model = Model(module=module, name=type(module).__name__, input_size=(0, 0), channels_in=channels)
    size = sources.input_size or find_input_size(model)
    return replace(model, input_size=size, notes=("no normalisation was given: the network gets values of 0..1",))


def first_channels(module: nn.Module) -> int:
    """Return the input channels of the first two-dimensional convolution, 3 where there is none."""
    for one in module.modules():
        if isinstance(one, nn.Conv2d):
            return one.in_channels
    return 3


def find_input_size(model: Model) -> tuple[int, int]:
    """Return the first of the usual sizes that the whole network runs at.

    Raises:
        SizeRefused: it takes none of them.
    """
    reason = ""
    for size in SIZES_TO_TRY:
        try:
            with borrowed(model.module), torch.no_grad():
                model.forward(torch.full((1, model.channels_in, size, size), 0.5).to(model.like))
            return size, size
        except Exception as error:
            reason = reason or first_line(error)
    raise SizeRefused(
        f"{model.name} runs at none of {', '.join(map(str, SIZES_TO_TRY))} px with {model.channels_in} channels "
        f"({reason}); say what it takes (--input-size, --channels-in)"
    )


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a weights file into a module that phosphene made.

    Raises:
        WeightsRefused: the file is missing, damaged, of another network, or a pickle that wants to run code.
    """
    state = read_weights(path)
    own = module.state_dict()
    differing = [f"{name} is missing" for name in own if name not in state]
    differing += [f"{name} is unknown" for name in state if name not in own]
    for name in own.keys() & state.keys():
        if own[name].shape != state[name].shape:
            differing.append(f"{name} is {tuple(state[name].shape)} where {tuple(own[name].shape)} is needed")
    if differing:
        raise WeightsRefused(
            f"{path} holds the weights of another network, {len(differing)} entries differ: {'; '.join(differing[:4])}"
        )
    module.load_state_dict(state)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a `.safetensors`, `.pt` or `.pth` file, without running anything in it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise WeightsRefused(f"there is no weights file {path}")
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise WeightsRefused(f"{path} is no weights file; give a .safetensors, .pt or .pth file")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) and "GLOBAL" in str(error):
            raise WeightsRefused(
                f"{path} is a pickle that wants to run code, which is refused; "
                "save its state dict: torch.save(module.state_dict(), 'weights.pt')"
            ) from error
        raise WeightsRefused(f"{path} is damaged or cut short: it is no complete weights file") from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise WeightsRefused(f"{path} is damaged or cut short: {first_line(error)}") from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(one, Tensor) for one in state.values()):
        raise WeightsRefused(f"{path} holds no state dict; save one with torch.save(module.state_dict(), path)")
    return dict(state)


LIBRARIES: dict[str, Callable[[str, Sources], Model]] = {
    "builtin": from_builtin,
    "torchvision": from_torchvision,
    "timm": from_timm,
}
