"""Keras models: saved files, `keras.applications` and model objects, all on Keras' torch backend."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
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
from phosphene.network.loading.keras_archive import (
    CONFIG,
    Saved,
    check_datasets,
    entries,
    is_keras,
    read_saved,
    strangers,
)
from phosphene.network.loading.keras_module import (
    FIRST,
    LAST,
    KerasModule,
    addresses,
    first_channels,
    input_shape,
    is_channels_last,
    spliced,
    takes_bytes,
)
from phosphene.network.loading.pytorch import (
    OFFLINE,
    UNNORMALISED,
    Sources,
    current_folder_first,
    find_input_size,
    with_logits,
)
from phosphene.network.loading.weights import seeded
from phosphene.network.model import Model
from phosphene.network.preprocessing import Preprocessing

BYTES = "its first layer rescales pixels, so that it gets values of 0..255"
TRUST = "load it with --trust (in Python trust=True) if you trust where it is from, or give the model object"
PARTS = ("layers", "models", "initializers", "regularizers", "constraints", "dtype_policies")


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
    """Have a Keras that is imported inside run on torch."""
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
def making() -> Iterator[None]:
    """Make Keras networks inside: on the CPU, from seed 0, with nothing on stdout and no warnings of old arguments."""
    keras = import_keras()
    with seeded(), contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(), keras.device("cpu"):
        warnings.simplefilter("ignore")
        yield


def keras_model_handle(network: Any, sources: Sources) -> Model:
    """Return the handle of a Keras network, used where it is.

    Raises:
        ModelRefused: it has several inputs, takes no pictures, or has no weights yet.
        InvalidRequest: it has another number of input channels than asked for.
        SizeRefused: no input size was given, it does not say, and it runs at none of the usual ones.
    """
    keras, name = import_keras(), str(getattr(network, "name", type(network).__name__))
    if not network.built or (not getattr(network, "inputs", None) and not network.variables):
        raise ModelRefused(f"{name} has no values yet; run the network once, or load its weights, before")
    if len(getattr(network, "inputs", None) or [0]) > 1:
        raise ModelRefused(f"{name} has {len(network.inputs)} inputs; a network with one, a picture, can be shown")
    layers = addresses(network)
    last = is_channels_last(layers, keras.config.image_data_format())
    shape = input_shape(network) or (None,) * 4
    if len(shape) not in (3, 4):
        raise ModelRefused(f"{name} takes {shape[1:]} numbers and no picture of height, width and channels")
    height, width, own = (*shape[1:], 1) if len(shape) == 3 else shape[1:] if last else (*shape[2:], shape[1])
    channels = own or sources.channels_in or first_channels(layers)
    if sources.channels_in not in (None, channels):
        raise InvalidRequest(f"{name} takes images of {channels} channels, not {sources.channels_in}")
    module = KerasModule(network, layers, last)
    model = Model(
        module=module,
        name=name,
        input_size=(0, 0),
        channels_in=channels,
        preprocessing=Preprocessing((0.0,), (1 / 255,)) if takes_bytes(network) else Preprocessing(),
        fit=Fit(squash=True),
        layout=LAST if last else FIRST,
        notes=(BYTES if takes_bytes(network) else UNNORMALISED,),
        modules={"": module, **spliced(layers)},
    )
    known = (height, width) if height and width else None
    return with_logits(replace(model, input_size=sources.input_size or known or find_input_size(model)))


def from_keras(model: Any, sources: Sources, trust: bool = False) -> Model:
    """Return the handle of a Keras model: an object, which is used where it is, or the path of a saved one.

    Args:
        model: `keras.Model`, or the path of a `.keras`, `.h5` or `.hdf5` file; its first bytes tell which it is.
        sources: what the user said about it.
        trust: whether Lambda layers and custom objects in a file may run code; never otherwise.

    Raises:
        ModelNotFound, ModelRefused, WeightsRefused, ExtraMissing, InvalidRequest, SizeRefused.
    """
    if not isinstance(model, str | Path):
        if sources.weights is not None:
            raise ModelRefused("a model object already has its weights; load them into it before, or load by reference")
        import_keras()
        return keras_model_handle(model, sources)
    saved = read_saved(Path(model))
    keras = import_keras()
    config = upgrade_config(saved.config) if saved.is_old else saved.config
    needs = ", ".join(strangers(config, is_class(keras), is_function(keras))[:5])
    if needs and not trust:
        raise ModelRefused(f"{model} needs {needs}, and making that runs its author's code; {TRUST}")
    try:
        with making(), tempfile.TemporaryDirectory() as folder:
            path = as_keras_reads(saved, config, Path(folder))
            with keras.saving.custom_object_scope(custom_objects(config) if trust else {}):
                network = keras.saving.load_model(str(path), compile=False, safe_mode=not trust)
            if sources.weights == "none":
                network = keras.models.clone_model(network)
    except Exception as error:
        reason = f"it needs {needs}" if needs else f"{type(error).__name__}: {shortened(error)}"
        raise ModelRefused(
            f"Keras {keras.__version__} cannot load {model} ({reason}); load it yourself with "
            "keras.saving.load_model(…, custom_objects=…) and give the object"
        ) from error
    return named(loaded_into(network, sources), str(model), sources)


def shortened(error: Exception) -> str:
    """Return the first line of an error of Keras', which may quote a whole config in it."""
    line = first_line(error)
    return line if len(line) < 300 else f"{line[:297]}..."


def custom_objects(config: dict[str, Any]) -> dict[str, Any]:
    """Return the custom classes and functions of a trusted file, from the modules that it names for them.

    What is not to be found is left to Keras, which knows what was registered with it.
    """
    found: dict[str, Any] = {}
    with current_folder_first():
        for one in entries(config):
            name = one.get("config") if one["class_name"] == "function" else one["class_name"]
            if is_keras(one.get("module")) or not isinstance(name, str):
                continue
            with contextlib.suppress(ImportError, AttributeError):
                made = getattr(importlib.import_module(one["module"]), name)
                found |= {name: made, str(one.get("registered_name")): made}
    return found


def is_class(keras: Any) -> Callable[[str, str], bool]:
    """Return what tells the classes that Keras builds networks from, by name and module."""
    known = {name for part in PARTS for name, one in vars(getattr(keras, part)).items() if isinstance(one, type)}
    known |= {"Functional", "Model", "Sequential"}

    def tell(name: str, module: str) -> bool:
        operation = getattr(sys.modules.get(module), name, None) if module.startswith("keras.src.ops.") else None
        return name in known or (isinstance(operation, type) and issubclass(operation, keras.Operation))

    return tell


def is_function(keras: Any) -> Callable[[str], bool]:
    """Return what tells the functions that Keras has as activation functions."""
    known = {name for name, one in vars(keras.activations).items() if inspect.isfunction(one)}
    return (known - {"get", "serialize", "deserialize"}).__contains__


def as_keras_reads(saved: Saved, config: dict[str, Any], folder: Path) -> Path:
    """Return the path, in a temporary folder, of the file as Keras 3 reads it: rightly named, with this config."""
    path = folder / ("model.keras" if saved.zipped else "model.h5")
    if config == saved.config:
        try:
            path.symlink_to(saved.path.resolve())
        except OSError:  # Windows lets not everyone
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


def loaded_into(network: Any, sources: Sources) -> Any:
    """Return a network that phosphene made, with the weights of a file in it where one was named.

    Raises:
        WeightsRefused: the file is missing, damaged, of another network, or none of Keras'.
    """
    if sources.weights in (None, "none"):
        return network
    path = Path(str(sources.weights))
    if not path.is_file():
        raise WeightsRefused(f"there is no weights file {path}")
    if path.suffix.lower() not in (".h5", ".hdf5"):
        raise WeightsRefused(f"{path} is no weights file of Keras; give an .h5 file that model.save_weights wrote")
    try:
        check_datasets(path, path)
        with making():
            network.load_weights(str(path))
    except Exception as error:
        raise WeightsRefused(f"{path} does not fit the network: {shortened(error)}") from error
    return network


def named(network: Any, reference: str, sources: Sources) -> Model:
    """Return the handle of a network that was loaded by reference."""
    model = keras_model_handle(network, replace(sources, weights=None))
    return replace(model, name=reference, ref=reference, notes=(*sources.notes, *model.notes))


def from_application(reference: str, sources: Sources) -> Model:
    """Return a network of `keras.applications`, `keras/NAME`: with its ImageNet weights, preprocessing, class names.

    Raises:
        ModelNotFound: there is none of that name, or its weights cannot be downloaded.
    """
    keras, name = import_keras(), reference.removeprefix("keras/")
    makers = {one.lower(): one for one, maker in vars(keras.applications).items() if inspect.isfunction(maker)}
    if name.lower() not in makers:
        raise ModelNotFound(f"keras has no application {name!r}; the nearest are: {nearest(name, makers.values())}")
    maker = getattr(keras.applications, makers[name.lower()])
    try:
        with making():
            network = maker(weights="imagenet" if sources.trained else None)
    except Exception as error:
        reason = f"{type(error).__name__}: {shortened(error)}"
        raise ModelNotFound(f"keras/{name} could not be made ({reason}){OFFLINE if sources.trained else ''}") from error
    model = named(loaded_into(network, sources), f"keras/{name}", sources)
    return replace(
        model,
        preprocessing=preprocessing_of(keras, maker),
        labels=imagenet_names(),
        notes=sources.notes,
    )


def preprocessing_of(keras: Any, maker: Any) -> Preprocessing:
    """Return what an application's own `preprocess_input` does to pixels, measured on black and on pure colours.

    All of them scale and shift each channel, and some turn RGB to BGR.
    """
    prepare = sys.modules[f"keras.src.applications.{maker.__module__.split('.')[-1]}"].preprocess_input
    colours = torch.cat([torch.zeros(1, 3, dtype=torch.float64), 255 * torch.eye(3, dtype=torch.float64)])
    with keras.device("cpu"):
        black, *pure = torch.as_tensor(prepare(colours.view(4, 1, 1, 3), data_format="channels_last")).view(4, 3)
    gain = torch.stack([one - black for one in pure])  # (colour, channel)
    bgr = bool(gain[0, 2] != 0)
    gain, shift = (gain.flip(1), black.flip(0)) if bgr else (gain, black)
    std = 1 / gain.diagonal()
    return Preprocessing(tuple((-shift * std).tolist()), tuple(std.tolist()), bgr)


def is_keras_model(value: object) -> bool:
    """Return whether an object is a network of Keras', of any version and backend; nothing is imported."""
    names = {f"{one.__module__.split('.')[0]}.{one.__name__}" for one in type(value).__mro__}
    return bool(names & {"keras.Model", "tf_keras.Model"})
