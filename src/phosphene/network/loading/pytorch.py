"""PyTorch models: torchvision, timm, and the user's own callable or module."""

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from phosphene.errors import (
    InvalidRequest,
    ModelNotFound,
    ModelRefused,
    SizeRefused,
    first_line,
    nearest,
    require_extra,
)
from phosphene.images.photo import Fit
from phosphene.network.capture import InnerHookPoint, borrowed
from phosphene.network.loading.builtin import load_builtin
from phosphene.network.loading.weights import RANDOM, load_weights, randomise, seeded
from phosphene.network.model import Model
from phosphene.network.preprocessing import Preprocessing
from phosphene.network.survey import producing_call

UNNORMALISED = "no normalisation was given: the network gets values of 0..1"
OFFLINE = (
    "; trained weights are downloaded once and kept, which needs a network connection;"
    " --weights none or --weights PATH does without"
)
PROBABILITIES = {"softmax", "logsoftmax", "log_softmax", "sigmoid"}
SIZES_TO_TRY = (224, 32, 28, 64, 96, 128, 48, 100, 150, 160, 192, 256, 299, 384, 512)


@dataclass(frozen=True)
class LoadOptions:
    """The arguments of `load` that its adapters need, beside the model."""

    weights: str | None = None
    input_size: tuple[int, int] | None = None
    channels_in: int | None = None

    @property
    def trained(self) -> bool:
        """Whether the model gets the trained weights that its library has for it."""
        return self.weights is None

    @property
    def notes(self) -> tuple[str, ...]:
        """Where the weights are from, unless they are the model's own."""
        origin = RANDOM if self.weights == "none" else f"weights from {self.weights}"
        return () if self.trained else (origin,)


def from_builtin(name: str, options: LoadOptions) -> Model:
    """Return a built-in network; with weights `none` its architecture with random weights."""
    model = load_builtin(name)
    if options.weights == "none":
        randomise(model.module)
    return with_weights_file(model, options)


def with_weights_file(model: Model, options: LoadOptions) -> Model:
    """Return a network that was loaded by reference, with the weights of a file in it if one was named.

    Raises:
        InvalidRequest: the network has another number of input channels than asked for.
        WeightsRefused: the file does not fit, or cannot be read.
    """
    if options.channels_in not in (None, model.channels_in):
        raise InvalidRequest(
            f"{model.name} takes images of {model.channels_in} channels, not {options.channels_in}; "
            "timm/NAME is made for any number, and package.module:callable for that of your network"
        )
    if options.weights not in (None, "none"):
        load_weights(model.module, Path(str(options.weights)))
    return model


def build_module(build: Callable[[], nn.Module], name: str, trained: bool) -> nn.Module:
    """Return the network that a library builds, in evaluation mode; what is random in it comes from seed 0.

    Raises:
        ModelNotFound: building fails; the message gives the reason, such as a download that was not possible.
    """
    try:
        with seeded(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about the initialisation of Inception and GoogLeNet
            return build().eval()
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ModelNotFound(f"{name} could not be made ({reason}){OFFLINE if trained else ''}") from error


def from_torchvision(name: str, options: LoadOptions) -> Model:
    """Return a network of torchvision with its default weights, preprocessing and class names."""
    from torchvision import models

    if name not in models.list_models():
        raise ModelNotFound(
            f"torchvision has no model {name!r}; the nearest are: {nearest(name, models.list_models())}"
        )
    if name.startswith("quantized_"):
        raise ModelRefused(f"no gradient flows through quantized networks; use torchvision/{name[10:]}")
    entry = models.get_model_weights(name).DEFAULT
    arguments: dict[str, Any] = {"weights": entry}
    if not options.trained:
        # the same parts as with the default weights, without the download that is the default for a backbone
        untrained = {"weights_backbone": None, "aux_loss": True}
        parameters = inspect.signature(models.get_model_builder(name)).parameters
        arguments = {"weights": None, **{key: value for key, value in untrained.items() if key in parameters}}
    module = build_module(lambda: models.get_model(name, **arguments), f"torchvision/{name}", options.trained)
    if hasattr(module, "transform_input"):  # Inception and GoogLeNet: part of the weights entry's preprocessing
        cast(Any, module).transform_input = True
    preset = entry.transforms()
    size = getattr(preset, "crop_size", [224])
    model = Model(
        module=module,
        name=f"torchvision/{name}",
        input_size=(size[0], size[-1]),
        channels_in=first_channels(module),
        preprocessing=Preprocessing(tuple(getattr(preset, "mean", (0.0,))), tuple(getattr(preset, "std", (1.0,)))),
        fit=Fit(
            getattr(preset, "resize_size", [None])[0],
            preset.interpolation.value if hasattr(preset, "interpolation") else "bilinear",
        ),
        labels=tuple(entry.meta.get("categories", ())),
    )
    return with_weights_file(model, options)


def from_timm(name: str, options: LoadOptions) -> Model:
    """Return a network of timm for any number of channels, with the preprocessing of its data config."""
    timm = require_extra("timm", "timm")
    names = timm.list_models()
    if name.split(".")[0] not in names:
        raise ModelNotFound(f"timm has no model {name!r}; the nearest are: {nearest(name, names)}")
    arguments: dict[str, Any] = {"pretrained": options.trained}
    if options.channels_in is not None:
        arguments["in_chans"] = options.channels_in
    module = build_module(lambda: timm.create_model(name, **arguments), f"timm/{name}", options.trained)
    config = timm.data.resolve_model_data_config(module)
    # the config says 3 channels even if the network was built for 7
    channels = options.channels_in or config["input_size"][0]
    mean, std = (tuple(config[key]) for key in ("mean", "std"))
    if channels != len(mean):  # there are no statistics for these channels, so that all get the average
        mean, std = ((sum(values) / len(values),) for values in (mean, std))
    subset = timm.data.infer_imagenet_subset(module)
    labels = timm.data.ImageNetInfo(subset).label_descriptions() if subset else ()
    model = Model(
        module=module,
        name=f"timm/{name}",
        input_size=tuple(config["input_size"][1:]),
        channels_in=channels,
        preprocessing=Preprocessing(mean, std),
        fit=timm_fit(config),
        labels=tuple(label.split(",")[0] for label in labels),
    )
    return with_weights_file(model, options)


def timm_fit(config: Mapping[str, Any]) -> Fit:
    """Return how timm's data config resizes photos: by the share of the picture that its crop keeps."""
    mode, interpolation = config.get("crop_mode", "center"), config["interpolation"]
    short = int(min(config["input_size"][1:]) / config["crop_pct"])
    return Fit(short, interpolation if interpolation in ("bilinear", "nearest") else "bicubic", mode == "squash")


@contextmanager
def current_folder_first() -> Iterator[None]:
    """Search the current folder for imports, as `python -m` does."""
    sys.path.insert(0, "")
    importlib.invalidate_caches()  # finds files written a moment ago
    try:
        yield
    finally:
        if "" in sys.path:
            sys.path.remove("")


def from_callable(reference: str, options: LoadOptions) -> Model:
    """Return the user's own network, built by calling `package.module:callable` without arguments.

    Raises:
        ModelNotFound: there is no such module, or nothing of that name in it.
        ModelRefused: importing or calling it fails, or it does not return a `torch.nn.Module`.
    """
    package, _, name = reference.partition(":")
    with current_folder_first(), seeded():
        try:
            build = importlib.import_module(package)
            for attribute in name.split("."):
                build = getattr(build, attribute)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise ModelNotFound(f"{reference!r} cannot be imported: {first_line(error)}") from error
        except (Exception, SystemExit) as error:  # a script may run, and exit, when it is imported
            raise ModelRefused(f"importing {package} failed: {type(error).__name__}: {first_line(error)}") from error
        if not callable(build) or isinstance(build, nn.Module):
            raise ModelRefused(
                f"{reference} is a {type(build).__name__}; name a function or class that makes the network"
            )
        try:
            module = build()
        except (Exception, SystemExit) as error:
            raise ModelRefused(f"calling {reference}() failed: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise ModelRefused(f"{reference}() returned {type(module).__name__}, not a torch.nn.Module")
    model = from_module(module.eval(), replace(options, weights=None))
    if options.weights == "none":
        randomise(model.module)
    return with_weights_file(replace(model, name=reference), options)


def from_module(module: nn.Module, options: LoadOptions) -> Model:
    """Return the handle of a module object, used where it is.

    Raises:
        ModelRefused: weights were named, which would change the user's module; or it is scripted, or has no values yet.
        SizeRefused: no input size was given, and it runs at none of the usual ones.
    """
    if options.weights is not None:
        raise ModelRefused("a module object already has its weights; load them into it before, or load by reference")
    # torch.compile wraps the module, and hooks need the module inside
    module = cast(nn.Module, getattr(module, "_orig_mod", module))
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelRefused("a scripted module cannot be read layer by layer; give the nn.Module it was made from")
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            raise ModelRefused(f"{name} has no values yet; run the network once, or load its weights, before")
    channels = options.channels_in or first_channels(module)
    model = Model(module=module, name=type(module).__name__, input_size=(0, 0), channels_in=channels)
    size = options.input_size or find_input_size(model)
    return with_logits(replace(model, input_size=size, notes=(UNNORMALISED,)))


def with_logits(model: Model) -> Model:
    """Return the handle with the address of the class scores before the softmax or sigmoid that the network ends in."""
    points = {path: point for path in model.modules if (point := logits_point(model.modules, path))}
    try:
        with borrowed(model.module), torch.no_grad():
            last = producing_call(model.forward, model.modules, model.grey(model.input_size)) if points else None
    except Exception:  # if the input size is wrong, the table of layers gives the better message
        last = None
    if last is None or last.path not in points:
        return model
    owner, point = model.modules[last.path], points[last.path]
    modules = {f"{last.path}#{point}": InnerHookPoint(owner, point), **model.modules}
    call = f"@{last.call}" if last.call else ""
    return replace(model, modules=modules, logits=f"{last.path}{call}#{point}")


def logits_point(modules: Mapping[str, nn.Module], path: str) -> str:
    """Return the hook point of what a module turns into probabilities at its end, "" if it does not."""
    kind, activation = type(modules[path]).__name__, getattr(modules[path], "activation", None)
    name = str(getattr(activation, "__name__", type(activation).__name__))
    if name.lower() in PROBABILITIES and f"{path}#{InnerHookPoint.ACTIVATION}" in modules:
        return InnerHookPoint.ACTIVATION
    return InnerHookPoint.INPUT if (name if kind == "Activation" else kind).lower() in PROBABILITIES else ""


def first_channels(module: nn.Module) -> int:
    """Return the input channels of the first two-dimensional convolution, 3 if there is none."""
    return next((layer.in_channels for layer in module.modules() if isinstance(layer, nn.Conv2d)), 3)


def find_input_size(model: Model) -> tuple[int, int]:
    """Return the first of the usual sizes that the whole network runs at.

    Raises:
        SizeRefused: it runs at none of them.
    """
    reason = ""
    for size in SIZES_TO_TRY:
        try:
            with borrowed(model.module), torch.no_grad():
                model.forward(model.grey((size, size)))
            return size, size
        except Exception as error:
            reason = reason or first_line(error)
    raise SizeRefused(
        f"{model.name} runs at none of {', '.join(map(str, SIZES_TO_TRY))} px with {model.channels_in} channels "
        f"({reason}); say what it takes (--input-size, --channels-in)"
    )
