"""The layer at which a heat map is taken by default."""

from collections.abc import Mapping, Sequence

import torch

from phosphene.errors import LayerRefused
from phosphene.network.capture import TensorAddress
from phosphene.network.feature_maps import as_map_or_none, map_is_certain
from phosphene.network.layers import Layer
from phosphene.network.model import Model

Size = tuple[int, int]


def default_layer(model: Model) -> Layer:
    """Return the layer where a heat map is taken by default.

    That is the last convolution or normalisation with a map larger than 1×1, or the last block with the same map size
    that follows or ends with it: the last convolution of VGG16 (14×14, as in R4.3) rather than the 7×7 that is pooled
    from it; `layer4` of a ResNet. A bare activation function does not count: the map before it also holds what speaks
    against the class, which makes it sharper (`bench/mosaics.py`). In networks with tokens, the class scores must
    depend on the layer's positions: in a ViT only the class token counts after the last attention, so it is the first
    normalisation of the last block.

    Raises:
        LayerRefused: no layer has a map.
    """
    layers = layers_before_scores(model)
    sizes = {layer.path: layer.size for layer in layers if has_certain_map(model, layer)}
    tail = layers[last_anchor(model, layers, sizes) or 0 :]
    if any(may_have_hidden_map(model, layer) for layer in tail):
        sizes = contributing_map_sizes(model, tail)
    anchor = last_anchor(model, tail, sizes)
    if anchor is None:
        raise LayerRefused(f"{model.name} has no convolution or normalisation with a map that counts; name a layer")
    size = sizes[tail[anchor].path]
    same_size = [layer for layer in tail[anchor:] if sizes.get(layer.path) == size]
    weighted = [
        layer for layer in same_size if any(True for _ in model.modules[layer.tensor_address.path].parameters())
    ]
    return [layer for layer in weighted if 2 not in weight_dimensions(model, layer)][-1]


def last_anchor(model: Model, layers: Sequence[Layer], sizes: Mapping[str, Size | None]) -> int | None:
    """Return the index of the last convolution or normalisation that has a map size, None if there is none."""
    for number in reversed(range(len(layers))):
        dimensions = weight_dimensions(model, layers[number]) if layers[number].path in sizes else set()
        if dimensions and 2 not in dimensions:  # no plain matrix, as in Linear
            return number
    return None


def layers_before_scores(model: Model) -> list[Layer]:
    """Return the layers in the order of the forward pass, up to the class scores."""
    layers = list(model.layers())
    if model.logits == "":
        return layers
    scores = model.find(model.logits)
    place = (
        scores.tensor_address
        if scores in layers
        else TensorAddress(scores.tensor_address.path.partition("#")[0], scores.tensor_address.call)
    )
    return layers[: next(number for number, layer in enumerate(layers) if layer.tensor_address == place)]


def has_certain_map(model: Model, layer: Layer) -> bool:
    return map_is_certain(layer, model.input_size) and layer.size is not None and max(layer.size) > 1


def may_have_hidden_map(model: Model, layer: Layer) -> bool:
    """Return whether a layer may return tokens, or a map in another order than its table row says."""
    is_vector = layer.size is None and layer.channels is not None
    return not is_vector and not map_is_certain(layer, model.input_size)


def weight_dimensions(model: Model, layer: Layer) -> set[int]:
    """Return how many dimensions a layer's weights have; for a block, which holds further layers, the empty set."""
    module = model.modules[layer.tensor_address.path]
    inner = {id(submodule) for submodule in module.modules()} - {id(module)}
    holds_layers = any(id(addressed) in inner for addressed in model.modules.values())
    return set() if holds_layers else {weight.dim() for weight in module.parameters()}


def contributing_map_sizes(model: Model, layers: Sequence[Layer]) -> dict[str, Size | None]:
    """Return the map sizes of the layers whose positions matter to the class scores, tried on an image of noise.

    If none seems to matter (the classifier's weights may be 0), return the sizes of all layers that have a map.
    """
    noise = torch.rand((1, model.channels_in, *model.input_size), generator=torch.Generator().manual_seed(0))
    image, paths = noise.to(model.prototype_tensor), [layer.path for layer in layers]
    with model.reading([*paths, model.logits], paths[:1]) as read:
        values = read(image)
        score = values[model.logits].float().amax()
        acts = {path: values[path] for path in paths if values[path].requires_grad}
        grads = torch.autograd.grad(score, list(acts.values()), allow_unused=True) if acts else ()
    sizes, contributing = dict[str, Size | None](), set[str]()
    by_path = {layer.path: layer for layer in layers}
    for (path, act), grad in zip(acts.items(), grads, strict=True):
        act_map, grad_map = (as_map_or_none(tensor, by_path[path], image) for tensor in (act, grad))
        if act_map is not None:
            sizes[path] = (act_map.shape[2], act_map.shape[3])
        if grad_map is not None and bool(grad_map.any()):
            contributing.add(path)
    return {path: size for path, size in sizes.items() if path in contributing or not contributing}
