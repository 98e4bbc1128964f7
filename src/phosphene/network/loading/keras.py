"""Keras models: saved files, `keras.applications` and model objects, all on Keras' torch backend."""

import contextlib
import inspect
import json
import os
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from phosphene.errors import (
    ExtraMissing,
    InvalidRequest,
    ModelNotFound,
    ModelRefused,
    WeightsRefused,
    first_line,
    nearest,
    require_extra,
)
from phosphene.images.photo import Fit
from phosphene.network.loading.builtin import imagenet_names
from phosphene.network.loading.keras2_config import upgrade_config
from phosphene.network.loading.keras_archive import CONFIG, SavedModel, check_datasets, read_saved
from phosphene.network.loading.keras_custom_objects import custom_objects, import_custom_objects, lookups
from phosphene.network.loading.keras_module import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    KerasModule,
    first_channels,
    hookable_modules,
    input_shape,
    is_channels_last,
    layers_by_address,
    takes_bytes,
)
from phosphene.network.loading.pytorch import OFFLINE, UNNORMALISED, LoadOptions, find_input_size, with_logits
from phosphene.network.loading.weights import seeded
from phosphene.network.model import Model
from phosphene.network.preprocessing import Preprocessing

RESCALES = "its first layer rescales pixels, so that it gets values of 0..255"
TRUST = "load it with --trust (in Python trust=True) if you trust where it is from, or give the model object"


def import_keras() -> Any:
    """Return Keras on its torch backend. Keras reads its backend once, from a variable that is left as it was.

    Raises:
        ExtraMissing: Keras 3 is not installed.
        ModelRefused: Keras was imported before, on another backend.
    """
    if sys.modules.get("keras") is None:
        with torch_backend():
            require_extra("keras", "keras")
    keras: Any = sys.modules["keras"]
    if not hasattr(keras, "config") or not hasattr(keras.config, "backend"):
        version = getattr(keras, "__version__", "?")
        raise ExtraMissing(f"Keras models need Keras 3, not {version}: pip install 'phosphene[keras]'")
    if keras.config.backend() != "torch":
        raise ModelRefused(
            f"Keras was imported before with the backend {keras.config.backend()}, and cannot change it; set the "
            "environment variable KERAS_BACKEND=torch before the first import of keras"
        )
    return keras


@contextmanager
def torch_backend() -> Iterator[None]:
    """Make Keras run on torch if it is imported inside."""
    before = os.environ.get("KERAS_BACKEND")
    os.environ["KERAS_BACKEND"] = "torch"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KERAS_BACKEND"]
        else:
            os.environ["KERAS_BACKEND"] = before


@contextmanager
def building() -> Iterator[None]:
    """Build Keras networks inside on the CPU, from seed 0, printing nothing to stdout, without deprecation warnings."""
    keras = import_keras()
    with seeded(), contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(), keras.device("cpu"):
        warnings.simplefilter("ignore")
        yield


def from_keras(network: Any, options: LoadOptions) -> Model:
    """Return the handle of a Keras model object, used where it is.

    Raises:
        ModelRefused: weights were named, or it has several inputs, takes no images, or has no weights yet.
        InvalidRequest: it has another number of input channels than asked for.
        SizeRefused: neither the user nor the network says the input size, and it runs at none of the usual ones.
    """
    if options.weights is not None:
        raise ModelRefused("a model object already has its weights; load them into it before, or load by reference")
    keras, name = import_keras(), str(getattr(network, "name", type(network).__name__))
    if not network.built or (not getattr(network, "inputs", None) and not network.variables):
        raise ModelRefused(f"{name} has no values yet; run the network once, or load its weights, before")
    if len(getattr(network, "inputs", None) or [0]) > 1:
        raise ModelRefused(f"{name} has {len(network.inputs)} inputs; Phosphene shows networks with one, a picture")
    layers = layers_by_address(network)
    last = is_channels_last(layers, keras.config.image_data_format())
    shape = input_shape(network) or (None,) * 4
    if len(shape) not in (3, 4):
        raise ModelRefused(f"{name} takes inputs of shape {shape[1:]}, not pictures of height, width and channels")
    height, width, depth = (*shape[1:], 1) if len(shape) == 3 else shape[1:] if last else (*shape[2:], shape[1])
    channels = depth or options.channels_in or first_channels(layers)
    if options.channels_in not in (None, channels):
        raise InvalidRequest(f"{name} takes images of {channels} channels, not {options.channels_in}")
    module = KerasModule(network, layers, last)
    model = Model(
        module=module,
        name=name,
        input_size=(0, 0),
        channels_in=channels,
        preprocessing=Preprocessing((0.0,), (1 / 255,)) if takes_bytes(network) else Preprocessing(),
        fit=Fit(squash=True),
        layout=CHANNELS_LAST if last else CHANNELS_FIRST,
        notes=(RESCALES if takes_bytes(network) else UNNORMALISED,),
        modules={"": module, **hookable_modules(layers)},
    )
    size = (height, width) if height and width else None
    return with_logits(replace(model, input_size=options.input_size or size or find_input_size(model)))


def from_saved(path: str, options: LoadOptions, trust: bool) -> Model:
    """Return the network in a `.keras`, `.h5` or `.hdf5` file, whose first bytes say which of them it is.

    Args:
        trust: whether Lambda layers and custom objects in the file may run code.

    Raises:
        ModelNotFound, ModelRefused, WeightsRefused, ExtraMissing, InvalidRequest, SizeRefused.
    """
    saved = read_saved(Path(path))
    keras = import_keras()
    config = upgrade_config(saved.config) if saved.is_old else saved.config
    needs = ", ".join(custom_objects(config, *lookups(keras))[:5])
    if needs and not trust:
        raise ModelRefused(f"{path} needs {needs}, and building that runs its author's code; {TRUST}")
    try:
        with building(), tempfile.TemporaryDirectory() as folder:
            readable = as_keras_reads(saved, config, Path(folder))
            with keras.saving.custom_object_scope(import_custom_objects(config) if trust else {}):
                network = keras.saving.load_model(str(readable), compile=False, safe_mode=not trust)
            if options.weights == "none":
                network = keras.models.clone_model(network)
    except Exception as error:
        reason = f"it needs {needs}" if needs else f"{type(error).__name__}: {short_reason(error)}"
        raise ModelRefused(
            f"Keras {keras.__version__} cannot load {path} ({reason}); load it yourself with "
            "keras.saving.load_model(…, custom_objects=…) and give the object"
        ) from error
    load_keras_weights(network, options)
    return from_keras(network, replace(options, weights=None))


def short_reason(error: Exception) -> str:
    """Return the first line of an error from Keras, cut to 300 characters: it may quote a whole config."""
    line = first_line(error)
    return line if len(line) < 300 else f"{line[:297]}..."


def as_keras_reads(saved: SavedModel, config: dict[str, Any], folder: Path) -> Path:
    """Return the path of a copy of the file, or a link to it, with the suffix and the config that Keras 3 reads."""
    path = folder / ("model.keras" if saved.zipped else "model.h5")
    if config == saved.config:
        try:
            path.symlink_to(saved.path.resolve())
        except OSError:  # Windows allows links to some users only
            shutil.copyfile(saved.path, path)
    elif saved.zipped:
        with zipfile.ZipFile(saved.path) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                if name == CONFIG:
                    new.writestr(name, json.dumps(config))
                elif not name.endswith("/"):
                    with old.open(name) as source, new.open(name, "w", force_zip64=True) as target:
                        shutil.copyfileobj(source, target)
    else:
        shutil.copyfile(saved.path, path)
        with require_extra("h5py", "keras").File(path, "r+") as file:
            file.attrs["model_config"] = json.dumps(config).encode()
    return path


def load_keras_weights(network: Any, options: LoadOptions) -> None:
    """Load the weights file, if one was named, into a network that phosphene built.

    Raises:
        WeightsRefused: the file is missing, damaged, of another network, or not written by Keras.
    """
    if options.weights in (None, "none"):
        return
    path = Path(str(options.weights))
    if not path.is_file():
        raise WeightsRefused(f"there is no weights file {path}")
    if path.suffix.lower() not in (".h5", ".hdf5"):
        raise WeightsRefused(f"{path} is no weights file of Keras; give an .h5 file that model.save_weights wrote")
    try:
        check_datasets(path, path)
        with building():
            network.load_weights(str(path))
    except Exception as error:
        raise WeightsRefused(f"{path} does not fit the network: {short_reason(error)}") from error


def from_application(name: str, options: LoadOptions) -> Model:
    """Return a network of `keras.applications` with its ImageNet weights, preprocessing and class names.

    Raises:
        ModelNotFound: no application has that name, or its weights cannot be downloaded.
    """
    keras = import_keras()
    names = {key.lower(): key for key, value in vars(keras.applications).items() if inspect.isfunction(value)}
    if name.lower() not in names:
        raise ModelNotFound(f"keras has no application {name!r}; the nearest are: {nearest(name, names.values())}")
    application = getattr(keras.applications, names[name.lower()])
    try:
        with building():
            network = application(weights="imagenet" if options.trained else None)
    except Exception as error:
        reason = f"{type(error).__name__}: {short_reason(error)}"
        raise ModelNotFound(f"keras/{name} could not be made ({reason}){OFFLINE if options.trained else ''}") from error
    load_keras_weights(network, options)
    model = from_keras(network, replace(options, weights=None))
    return replace(model, preprocessing=preprocessing_of(keras, application), labels=imagenet_names(), notes=())


def preprocessing_of(keras: Any, application: Any) -> Preprocessing:
    """Return what an application's own `preprocess_input` does to pixels, measured on black and on pure colours.

    All of them scale and shift each channel, and some turn RGB to BGR.
    """
    module = sys.modules[f"keras.src.applications.{application.__module__.split('.')[-1]}"]
    colours = torch.cat([torch.zeros(1, 3, dtype=torch.float64), 255 * torch.eye(3, dtype=torch.float64)])
    with keras.device("cpu"):
        outputs = module.preprocess_input(colours.view(4, 1, 1, 3), data_format="channels_last")
    black, *pure = torch.as_tensor(outputs).view(4, 3)
    gain = torch.stack([colour - black for colour in pure])  # (colour, channel)
    bgr = bool(gain[0, 2] != 0)
    gain, shift = (gain.flip(1), black.flip(0)) if bgr else (gain, black)
    std = 1 / gain.diagonal()
    return Preprocessing(tuple((-shift * std).tolist()), tuple(std.tolist()), bgr)


def is_keras_model(value: object) -> bool:
    """Return whether an object is a Keras network, of any version and backend; nothing is imported."""
    names = {f"{ancestor.__module__.split('.')[0]}.{ancestor.__name__}" for ancestor in type(value).__mro__}
    return bool(names & {"keras.Model", "tf_keras.Model"})
