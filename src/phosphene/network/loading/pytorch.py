"""PyTorch models: torchvision, timm, and the user's own callable or module."""

from __future__ import annotations

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
from phosphene.network.layers import producing_call
from phosphene.network.loading.builtin import BUILTIN, load_builtin
from phosphene.network.loading.weights import RANDOM, load_weights, randomise, seeded
from phosphene.network.model import Model
from phosphene.network.preprocessing import Preprocessing

UNNORMALISED = "no normalisation was given: the network gets values of 0..1"
OFFLINE = (
    "; trained weights are downloaded once and kept, which needs a network connection;"
    " --weights none or --weights PATH does without"
)
SQUASHING = {"softmax", "logsoftmax", "log_softmax", "sigmoid"}
SIZES_TO_TRY = (224, 32, 28, 64, 96, 128, 48, 100, 150, 160, 192, 256, 299, 384, 512)


@dataclass(frozen=True)
class Sources:
    """What the user said about a model beside its reference."""

    weights: str | None = None
    input_size: tuple[int, int] | None = None
    channels_in: int | None = None

    @property
    def trained(self) -> bool:
        """Whether the model comes with the trained weights that its library has for it."""
        return self.weights is None

    @property
    def notes(self) -> tuple[str, ...]:
        """What to say of where the weights are from, where they are not the model's own."""
        if self.weights is None:
            return ()
        return (RANDOM if self.weights == "none" else f"weights from {self.weights}",)


def from_reference(reference: str, sources: Sources) -> Model:
    """Return the model that a reference names.

    Raises:
        ModelNotFound: it is none of the forms, or nothing goes by that name.
        InvalidRequest: the network has another number of input channels than asked for.
    """
    library, slash, name = reference.partition("/")
    if slash and library in LIBRARIES:
        model = LIBRARIES[library](name, sources)
    elif ":" in reference and not Path(reference).exists():
        model = from_callable(reference, sources)
    else:
        raise ModelNotFound(
            f"{reference!r} is no model reference; give builtin/NAME ({', '.join(BUILTIN)}), torchvision/NAME, "
            "timm/NAME, keras/NAME, a .keras, .h5 or .hdf5 file, or package.module:callable"
        )
    if sources.channels_in not in (None, model.channels_in):
        raise InvalidRequest(
            f"{reference} takes images of {model.channels_in} channels, not {sources.channels_in}; "
            "timm/NAME is made for any number, and package.module:callable for that of your network"
        )
    if sources.weights not in (None, "none"):
        load_weights(model.module, Path(str(sources.weights)))
    size = sources.input_size or model.input_size
    return replace(model, name=reference, ref=reference, input_size=size, notes=(*sources.notes, *model.notes))


def from_builtin(name: str, sources: Sources) -> Model:
    """Return a built-in network; with `--weights none` its architecture with random weights."""
    model = load_builtin(name)
    if sources.weights == "none":
        randomise(model.module)
    return model


def built(build: Callable[[], nn.Module], name: str, trained: bool) -> nn.Module:
    """Return the network that a library makes, in evaluation mode; what is random in it comes from seed 0.

    Raises:
        ModelNotFound: it fails; the message carries the reason, such as a download that was not possible.
    """
    try:
        with seeded(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about the initialisation of Inception and GoogLeNet
            return build().eval()
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ModelNotFound(f"{name} could not be made ({reason}){OFFLINE if trained else ''}") from error


def from_torchvision(name: str, sources: Sources) -> Model:
    """Return a network of torchvision with its default weights, preprocessing and class names."""
    from torchvision import models

    if name not in models.list_models():
        raise ModelNotFound(
            f"torchvision has no model {name!r}; the nearest are: {nearest(name, models.list_models())}"
        )
    if name.startswith("quantized_"):
        raise ModelRefused(f"no gradient flows through quantized networks; use torchvision/{name[10:]}")
    entry = models.get_model_weights(name).DEFAULT
    options: dict[str, Any] = {"weights": entry}
    if not sources.trained:
        # the parts that the default weights bring with them, without the download that is the default for a backbone
        wanted = {"weights_backbone": None, "aux_loss": True}
        takes = inspect.signature(models.get_model_builder(name)).parameters
        options = {"weights": None, **{key: value for key, value in wanted.items() if key in takes}}
    module = built(lambda: models.get_model(name, **options), f"torchvision/{name}", sources.trained)
    if hasattr(module, "transform_input"):  # Inception and GoogLeNet: part of the weights entry's preprocessing
        cast(Any, module).transform_input = True
    preset = entry.transforms()
    size = getattr(preset, "crop_size", [224])
    return Model(
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


def from_timm(name: str, sources: Sources) -> Model:
    """Return a network of timm for any number of channels, preprocessing from its data config."""
    timm = require_extra("timm", "timm")
    known = timm.list_models()
    if name.split(".")[0] not in known:
        raise ModelNotFound(f"timm has no model {name!r}; the nearest are: {nearest(name, known)}")
    options = {} if sources.channels_in is None else {"in_chans": sources.channels_in}
    module = built(
        lambda: timm.create_model(name, pretrained=sources.trained, **options), f"timm/{name}", sources.trained
    )
    config = timm.data.resolve_model_data_config(module)
    # the config goes on speaking of 3 channels where it was asked for 7
    channels = sources.channels_in or config["input_size"][0]
    mean, std = (tuple(config[key]) for key in ("mean", "std"))
    if channels != len(mean):  # there is no figure for each of these channels, so they share the mean one
        mean, std = ((sum(figures) / len(figures),) for figures in (mean, std))
    subset = timm.data.infer_imagenet_subset(module)
    names = timm.data.ImageNetInfo(subset).label_descriptions() if subset else ()
    return Model(
        module=module,
        name=f"timm/{name}",
        input_size=tuple(config["input_size"][1:]),
        channels_in=channels,
        preprocessing=Preprocessing(mean, std),
        fit=timm_fit(config),
        labels=tuple(one.split(",")[0] for one in names),
    )


def timm_fit(config: Mapping[str, Any]) -> Fit:
    """Return how timm's data config has photos resized: by its share of the picture that the crop keeps."""
    mode, interpolation = config.get("crop_mode", "center"), config["interpolation"]
    short = int(min(config["input_size"][1:]) / config["crop_pct"])
    return Fit(short, interpolation if interpolation in ("bilinear", "nearest") else "bicubic", mode == "squash")


@contextmanager
def current_folder_first() -> Iterator[None]:
    """Search the current folder for imports, as `python -m` does."""
    sys.path.insert(0, "")
    importlib.invalidate_caches()  # a file written a moment ago counts
    try:
        yield
    finally:
        if "" in sys.path:
            sys.path.remove("")


def from_callable(reference: str, sources: Sources) -> Model:
    """Return the user's own network, made by calling `package.module:callable` without arguments.

    Raises:
        ModelNotFound: there is no such module, or nothing of that name in it.
        ModelRefused: importing or calling it fails, or does not give a `torch.nn.Module`.
    """
    package, _, name = reference.partition(":")
    with current_folder_first(), seeded():
        try:
            make = importlib.import_module(package)
            for piece in name.split("."):
                make = getattr(make, piece)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise ModelNotFound(f"{reference!r} cannot be imported: {first_line(error)}") from error
        except (Exception, SystemExit) as error:  # a script that runs, and ends, when it is imported
            raise ModelRefused(f"importing {package} failed: {type(error).__name__}: {first_line(error)}") from error
        if not callable(make) or isinstance(make, nn.Module):
            raise ModelRefused(
                f"{reference} is a {type(make).__name__}; name a function or class that makes the network"
            )
        try:
            module = make()
        except (Exception, SystemExit) as error:
            raise ModelRefused(f"calling {reference}() failed: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise ModelRefused(f"{reference}() returned {type(module).__name__}, not a torch.nn.Module")
    model = from_module(module.eval(), replace(sources, weights=None))
    if sources.weights == "none":
        randomise(model.module)
    return model


def from_module(module: nn.Module, sources: Sources) -> Model:
    """Return the handle of a module object, used where it is.

    Raises:
        ModelRefused: weights were named, which would change the user's module; or it is scripted, or has no values yet.
        SizeRefused: no input size was given and it runs at none of the usual ones.
    """
    if sources.weights is not None:
        raise ModelRefused("a module object already has its weights; load them into it before, or load by reference")
    # torch.compile wraps the module, and hooks need the plain one
    module = cast(nn.Module, getattr(module, "_orig_mod", module))
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelRefused("a scripted module cannot be read layer by layer; give the nn.Module it was made from")
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            raise ModelRefused(f"{name} has no values yet; run the network once, or load its weights, before")
    channels = sources.channels_in or first_channels(module)
    model = Model(module=module, name=type(module).__name__, input_size=(0, 0), channels_in=channels)
    size = sources.input_size or find_input_size(model)
    return with_logits(replace(model, input_size=size, notes=(UNNORMALISED,)))


def with_logits(model: Model) -> Model:
    """Return the handle with the address of what comes before the softmax or sigmoid that the network ends in."""
    squashing = {path: where for path, one in model.modules.items() if (where := squashes(model.modules, path))}
    try:
        with borrowed(model.module), torch.no_grad():
            last = producing_call(model.forward, model.modules, model.grey(model.input_size)) if squashing else None
    except Exception:  # where the input size was given wrongly, the table of layers says so better
        last = None
    if last is None or last.path not in squashing:
        return model
    owner, where = model.modules[last.path], squashing[last.path]
    modules = {f"{last.path}#{where}": InnerHookPoint(owner, where), **model.modules}
    call = f"@{last.call}" if last.call else ""
    return replace(model, modules=modules, logits=f"{last.path}{call}#{where}")


def squashes(modules: Mapping[str, nn.Module], path: str) -> str:
    """Return where to find what a module turns into probabilities at its end, "" for a module that does not."""
    kind, activation = type(modules[path]).__name__, getattr(modules[path], "activation", None)
    name = str(getattr(activation, "__name__", type(activation).__name__))
    if name.lower() in SQUASHING and f"{path}#{InnerHookPoint.ACTIVATION}" in modules:
        return InnerHookPoint.ACTIVATION
    return InnerHookPoint.INPUT if (name if kind == "Activation" else kind).lower() in SQUASHING else ""


def first_channels(module: nn.Module) -> int:
    """Return the input channels of the first two-dimensional convolution, 3 where there is none."""
    return next((one.in_channels for one in module.modules() if isinstance(one, nn.Conv2d)), 3)


def find_input_size(model: Model) -> tuple[int, int]:
    """Return the first of the usual sizes that the whole network runs at.

    Raises:
        SizeRefused: it takes none of them.
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


LIBRARIES: dict[str, Callable[[str, Sources], Model]] = {
    "builtin": from_builtin,
    "torchvision": from_torchvision,
    "timm": from_timm,
}
