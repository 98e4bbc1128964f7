"""Explaining: where on a photo the evidence for a class lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from phosphene.errors import InvalidRequest, LayerRefused
from phosphene.inspection.attribution_methods import CAMS, INPUT_METHODS, Cam
from phosphene.inspection.heatmap import ClassScore, Heatmap, chosen_scores, class_indices, class_name, probabilities
from phosphene.network.batchnorm_folding import BatchNormFolding
from phosphene.network.capture import TensorAddress
from phosphene.network.feature_maps import as_map, as_map_or_none, map_is_certain
from phosphene.network.layers import Layer
from phosphene.network.model import Model

Address = str | int
Target = int | str | None
INPUT = "input"  # the "layer" of the methods that look at the image itself
TOP = 5
SEVERAL = 4


def explain(
    model: Model, photo: Tensor, target: Target = None, *, layer: Address | None = None, method: str | Cam = "gradcam"
) -> Heatmap:
    """Return where on a photo the evidence for a class lies.

    Args:
        model: from `load`; it is used as it is and left as it was.
        photo: (1, c, H, W) in [0, 1], such as `read` returns, of any size.
        target: the class, by index or name; by default the most probable.
        layer: where to look, by default `default_layer`. What is read is what the layer computed, before anything
            that overwrites it: at a convolution before its ReLU, at the ReLU after it.
        method: a name from `CAMS` or `INPUT_METHODS`, or a function (acts, grads), each (b, c, h, w), -> (b, h, w).
            The methods of `INPUT_METHODS` look at the image itself and take no layer. Guided backpropagation is not
            offered: it fails the sanity checks of Adebayo 2018. Of `gradcam++`, `layercam`, `eigencam` see CAUTIONS.

    Raises:
        LayerNotFound, ChannelNotFound: there is no such layer, or class.
        LayerRefused: the layer has no map, or does not feed the class scores; or the network returns no class scores.
        InvalidRequest: there is no such method, or the photo is no (1, c, H, W).

    Example:
        >>> explain(load("builtin/efficientnet-lite0"), photo).overlay(photo).save("cam.png")
    """
    with explaining(model, layer, method) as explainer:
        return explainer(photo, target)


def heatmaps(
    model: Model,
    images: Tensor,
    targets: Sequence[Target] | Tensor | Target = None,
    layer: Address | None = None,
    method: str | Cam = "gradcam",
) -> tuple[Tensor, Tensor]:
    """Return raw maps (b, h, w) and logits (b, k) of images (b, c, h, w) as the network takes them; see `explain`.

    `targets` is one class for all, or one an image.
    """
    with explaining(model, layer, method) as explainer:
        return explainer.maps(images, targets)


@contextmanager
def explaining(model: Model, layer: Address | None = None, method: str | Cam = "gradcam") -> Iterator[Explainer]:
    """Borrow a network once to explain many photos, one after another or in batches; nothing is kept between them.

    Example:
        >>> with explaining(model) as explainer:
        ...     for path in paths:
        ...         explainer(photo := read(path)).save(path.with_suffix(".png"), photo)
    """
    check_classifies(model)
    name, at_input = method_name(method), method in INPUT_METHODS
    if at_input and layer is not None:
        raise InvalidRequest(f"{name} looks at the image itself; leave the layer out, or take one of {', '.join(CAMS)}")
    chosen = (
        None if at_input else check_has_map(model, model.find(layer)) if layer is not None else default_layer(model)
    )
    roots = [chosen.path] if chosen else []
    addresses = [*roots, model.logits]
    folding = model.folding(addresses)
    with model.reading(addresses, roots) as read:
        yield Explainer(model, chosen, method, read, folding)


@dataclass(frozen=True, eq=False)
class Explainer:
    """A borrowed network with a layer and a method; valid inside `explaining`.

    Attributes:
        layer: where it looks, None for the methods that look at the image itself.
    """

    model: Model
    layer: Layer | None
    method: str | Cam
    read: Callable[[Tensor], dict[Address, Tensor]]
    folding: BatchNormFolding

    @cached_property
    def spec(self) -> dict[str, Any]:
        """What the maps follow from beside photo and class, in JSON terms."""
        return {
            **self.model.origin,
            "layer": self.layer.path if self.layer else INPUT,
            "method": method_name(self.method),
        }

    def __call__(self, photo: Tensor, target: Target = None) -> Heatmap:
        """Return the heat map of one photo (1, c, H, W)."""
        return self.several([photo], [target])[0]

    def several(self, photos: Sequence[Tensor], targets: Sequence[Target] | Target = None) -> list[Heatmap]:
        """Return the heat maps of photos (1, c, H, W), each of any size, in one forward and one backward pass."""
        for photo in photos:
            self.model.check_photo(photo)
        images, regions = zip(*map(self.model.fitted, photos), strict=True)
        maps, logits = self.maps(torch.cat(images), targets)
        chances = probabilities(logits, self.model.labels).double().cpu()
        chosen = class_indices(targets, logits, self.model.labels)
        return [
            self.result(one, chance, index, region, photo)
            for one, chance, index, region, photo in zip(maps.cpu(), chances, chosen, regions, photos, strict=True)
        ]

    def result(self, one: Tensor, chances: Tensor, index: int, region: Any, photo: Tensor) -> Heatmap:
        """Return a map (h, w) with all that belongs to it; chances (k,)."""
        labels = self.model.labels
        order = chances.argsort(descending=True, stable=True)[:TOP].tolist()
        guesses = {
            one: ClassScore(one, class_name(one, labels, len(chances)), float(chances[one])) for one in [*order, index]
        }
        return Heatmap(
            map=one.clone(),
            method=self.spec["method"],
            layer=self.spec["layer"],
            target=guesses[index],
            top=tuple(guesses[one] for one in order),
            region=region,
            photo_size=(photo.shape[-2], photo.shape[-1]),
            spec={**self.spec, "target": asdict(guesses[index])},
        )

    def maps(self, images: Tensor, targets: Sequence[Target] | Tensor | Target = None) -> tuple[Tensor, Tensor]:
        """Return raw maps (b, h, w) and logits (b, k) of images (b, c, h, w) at the network's input size."""
        # convolutions are fastest with the channels last in memory and with the normalisations folded into them; for
        # both the weights are laid out anew, which pays from a few images on, or where passes go all the way back; the
        # results are the same within rounding; what runs again in the backward pass has to find the same weights
        pays = len(images) >= SEVERAL or self.layer is None
        with self.folding.folded() if pays else nullcontext():
            maps, logits = self.at_layer(images, targets) if self.layer else self.at_input(images, targets)
        need_finite(self.model, maps, logits)
        return maps, logits

    def at_layer(self, images: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Return maps from the layer's activations and gradients."""
        assert self.layer is not None
        found = self.read(images.contiguous(memory_format=torch.channels_last) if len(images) >= SEVERAL else images)
        logits, raw = self.logits(found, len(images)), found[self.layer.path]
        score = chosen_scores(logits, class_indices(targets, logits, self.model.labels), self.model.labels).sum()
        slope = torch.autograd.grad(score, raw, allow_unused=True)[0] if score.requires_grad else None
        if slope is None:
            raise LayerRefused(
                f"the class scores of {self.model.name} do not depend on what {self.layer.path} returned; "
                f"{those_with_maps(self.model)}"
            )
        acts, grads = (as_map(one, self.layer, images) for one in (raw.detach(), slope))
        method = CAMS[self.method] if isinstance(self.method, str) else self.method
        maps = method(acts, grads)
        if tuple(maps.shape) != (len(acts), *acts.shape[2:]):
            raise InvalidRequest(
                f"{method_name(self.method)} returned {tuple(maps.shape)}, not a map (b, h, w) of "
                f"{(len(acts), *acts.shape[2:])} for activations of {tuple(acts.shape)}"
            )
        return maps.detach(), logits.detach()

    def at_input(self, images: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Return maps from the gradients of the class scores with respect to the images."""
        with torch.no_grad():
            logits = self.logits(self.read(images), len(images))
        chosen = class_indices(targets, logits, self.model.labels)

        def slope(some: Tensor) -> Tensor:
            leaf = some.detach().requires_grad_()
            scores = chosen_scores(self.logits(self.read(leaf), len(leaf)), chosen, self.model.labels)
            return torch.autograd.grad(scores.sum(), leaf)[0]

        return INPUT_METHODS[str(self.method)](slope, images.detach()), logits

    def logits(self, found: dict[Address, Tensor], count: int) -> Tensor:
        """Return the class scores (b, k) of what was read.

        Raises:
            LayerRefused: they are nothing of the kind.
        """
        logits = found[self.model.logits]
        if logits.dim() != 2 or len(logits) != count or not logits.is_floating_point():
            raise no_classes(self.model, f"a tensor of {tuple(logits.shape)}")
        return logits


def method_name(method: str | Cam) -> str:
    """Return what a method is called.

    Raises:
        InvalidRequest: there is no such method; guided backpropagation is left out on purpose.
    """
    if not isinstance(method, str):
        return getattr(method, "__name__", type(method).__name__)
    if method in CAMS or method in INPUT_METHODS:
        return method
    guided = ": its pictures stay the same when the network's weights are randomised (Adebayo 2018)"
    why = guided if "guided" in method.lower() else ""
    raise InvalidRequest(f"there is no method {method!r}{why}; there are: {', '.join([*CAMS, *INPUT_METHODS])}")


def check_classifies(model: Model) -> None:
    """Refuse a network that returns several tensors, none of them known to be class scores."""
    if model.logits == "":
        try:
            model.output_part  # noqa: B018 - found once and kept
        except LayerRefused as error:
            raise no_classes(model, "several tensors or none") from error


def no_classes(model: Model, returned: str) -> LayerRefused:
    return LayerRefused(
        f"{model.name} returns {returned}, not class scores; a heat map explains networks that return one tensor "
        "(images, classes), not those for detection or segmentation; `phosphene activations` works for these, too"
    )


def check_has_map(model: Model, layer: Layer) -> Layer:
    """Refuse a layer that has no positions, as far as its table tells."""
    if layer.size is None and layer.channels is None:
        return layer  # tokens perhaps, or channels last: seen when it runs
    if layer.size is None or max(layer.size) == 1:
        raise LayerRefused(
            f"{layer.path} has no map any more, it comes after the pooling over all positions; {those_with_maps(model)}"
        )
    return layer


def those_with_maps(model: Model) -> str:
    """Return which layers to take, in words."""
    maps = [one.path for one in model.layers() if one.size and max(one.size) > 1]
    return f"the last ones with a map are: {', '.join(maps[-4:])}" if maps else "no layer has a map"


def default_layer(model: Model) -> Layer:
    """Return the layer where a heat map is taken by default.

    That is the last convolution or normalisation with a map larger than 1×1, or the last block of layers with the same
    map size that follows or ends with it: VGG16's last convolution (14×14, as in R4.3) rather than what is pooled from
    it to 7×7; `layer4` of a ResNet. A bare activation function after it does not count: before it the map also holds
    what speaks against the class, which makes it sharper (`bench/mosaics.py`). Where tokens take part, the class scores
    must depend on the layer's positions: in a ViT that makes it the first normalisation of the last block, for after it
    only the class token counts.

    Raises:
        LayerRefused: no layer has a map.
    """
    layers = before_the_scores(model)
    known = [
        number
        for number, one in enumerate(layers)
        if has_own_weights(model, one, matrix=False) and has_known_map(model, one)
    ]
    tail = layers[known[-1] :] if known else layers
    sizes = {one.path: one.size for one in tail if has_known_map(model, one)}
    if any(may_have_hidden_map(model, one) for one in tail):
        sizes = sizes_that_count(model, tail)
    anchors = [
        number for number, one in enumerate(tail) if one.path in sizes and has_own_weights(model, one, matrix=False)
    ]
    if not anchors:
        raise LayerRefused(f"{model.name} has no convolution or normalisation with a map that counts; name a layer")
    size = sizes[tail[anchors[-1]].path]
    fitting = [one for one in tail[anchors[-1] :] if sizes.get(one.path) == size]
    weighty = [one for one in fitting if any(True for _ in model.modules[one.place.path].parameters())]
    return [one for one in weighty if not has_own_weights(model, one, matrix=True)][-1]


def before_the_scores(model: Model) -> list[Layer]:
    """Return the layers in the order of the forward pass, up to the class scores."""
    layers = list(model.layers())
    if model.logits == "":
        return layers
    found = model.find(model.logits)
    place = found.place if found in layers else TensorAddress(found.place.path.partition("#")[0], found.place.call)
    return layers[: next(number for number, one in enumerate(layers) if one.place == place)]


def has_known_map(model: Model, layer: Layer) -> bool:
    return map_is_certain(layer, model.input_size) and layer.size is not None and max(layer.size) > 1


def may_have_hidden_map(model: Model, layer: Layer) -> bool:
    """Return whether a layer may return tokens, or a map in another order than its table row says."""
    is_vector = layer.size is None and layer.channels is not None
    return not is_vector and not map_is_certain(layer, model.input_size)


def has_own_weights(model: Model, layer: Layer, matrix: bool) -> bool:
    """Return whether a layer has weights of its own, with a plain matrix (Linear) or none (convolutions, norms)."""
    module = model.modules[layer.place.path]
    inner = {id(one) for one in module.modules()} - {id(module)}
    holds_layers = any(id(one) in inner for one in model.modules.values())
    dimensions = [one.dim() for one in module.parameters()]
    return not holds_layers and bool(dimensions) and (2 in dimensions) == matrix


def sizes_that_count(model: Model, layers: Sequence[Layer]) -> dict[str, tuple[int, int] | None]:
    """Return the map sizes of the layers whose positions matter to the class scores, tried on an image of noise.

    Where none seems to matter (the classifier's weights may be 0), those of all that have a map.
    """
    noise = torch.rand((1, model.channels_in, *model.input_size), generator=torch.Generator().manual_seed(0))
    image, paths = noise.to(model.like), [one.path for one in layers]
    with model.reading([*paths, model.logits], paths[:1]) as read:
        found = read(image)
        score = found[model.logits].float().amax()
        acts = {path: found[path] for path in paths if found[path].requires_grad}
        grads = torch.autograd.grad(score, list(acts.values()), allow_unused=True) if acts else ()
    by_path = {one.path: one for one in layers}
    pairs = [(path, act, grad) for (path, act), grad in zip(acts.items(), grads, strict=True)]
    maps = {
        path: (as_map_or_none(act, by_path[path], image), as_map_or_none(grad, by_path[path], image))
        for path, act, grad in pairs
    }
    sizes = {path: (act.shape[2], act.shape[3]) for path, (act, _) in maps.items() if act is not None}
    counting = {path for path, (_, grad) in maps.items() if grad is not None and bool(grad.any())}
    return {path: size for path, size in sizes.items() if path in counting or not counting}


def need_finite(model: Model, maps: Tensor, logits: Tensor) -> None:
    """Refuse NaN or infinity in maps (b, h, w) and logits (b, k)."""
    if not bool(maps.isfinite().all() and logits.isfinite().all()):
        raise LayerRefused(f"the class scores of {model.name} or their gradients are NaN or infinite for this photo")
