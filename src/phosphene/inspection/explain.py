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
from phosphene.images.photo import Region
from phosphene.inspection.attribution_methods import CAMS, INPUT_METHODS, PASSES, Cam
from phosphene.inspection.class_scores import ClassScore, class_indices, class_name, class_probabilities, target_logits
from phosphene.inspection.default_layer import default_layer
from phosphene.inspection.heatmap import Heatmap
from phosphene.network.batchnorm_folding import BatchNormFolding
from phosphene.network.feature_maps import as_map
from phosphene.network.layers import Layer
from phosphene.network.model import Model
from phosphene.progress import progress_bar

Address = str | int
Target = int | str | None
TOP = 5  # classes that a heat map names
LEAST_BATCH = 4  # fewest images for which it pays to lay out the weights anew


def explain(
    model: Model,
    photo: Tensor,
    target: Target = None,
    *,
    layer: Address | None = None,
    method: str | Cam = "gradcam",
    progress: bool = True,
) -> Heatmap:
    """Return where on a photo the evidence for a class lies.

    Args:
        model: from `load`; it is used as it is and left as it was.
        photo: (1, c, H, W) in [0, 1], such as `read` returns, of any size.
        target: the class, by index or name; by default the most probable.
        layer: where to look, by default `default_layer`. The values read are those that the layer computed, before
            anything overwrites them: at a convolution before its ReLU, at the ReLU after it.
        method: a name from `CAMS` or `INPUT_METHODS`, or a function (acts, grads), each (b, c, h, w), -> (b, h, w).
            The methods of `INPUT_METHODS` look at the image itself and take no layer. Guided backpropagation is not
            offered: it fails the sanity checks of Adebayo 2018. For `gradcam++`, `layercam`, `eigencam` see CAUTIONS.
        progress: whether the methods of many passes show a bar; see `progress.progress_bar`.

    Raises:
        LayerNotFound, ChannelNotFound: there is no such layer, or class.
        LayerRefused: the layer has no map, or does not feed the class scores; or the network returns no class scores.
        InvalidRequest: there is no such method, or the photo is no (1, c, H, W).

    Example:
        >>> explain(load("builtin/efficientnet-lite0"), photo).overlay(photo).save("cam.png")
    """
    with explaining(model, layer, method, progress=progress) as explainer:
        return explainer(photo, target)


@contextmanager
def explaining(
    model: Model, layer: Address | None = None, method: str | Cam = "gradcam", *, progress: bool = True
) -> Iterator[Explainer]:
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
    target_layer = None
    if not at_input:
        target_layer = default_layer(model) if layer is None else check_has_map(model, model.find(layer))
    roots = [target_layer.path] if target_layer else []
    addresses = [*roots, model.logits]
    folding = model.folding(addresses)
    with model.reading(addresses, roots) as read:
        yield Explainer(model, target_layer, method, read, folding, progress)


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
    progress: bool

    @cached_property
    def spec(self) -> dict[str, Any]:
        """What determines the maps besides photo and class, in JSON terms."""
        layer = self.layer.path if self.layer else "input"
        return {**self.model.origin, "layer": layer, "method": method_name(self.method)}

    def __call__(self, photo: Tensor, target: Target = None) -> Heatmap:
        """Return the heat map of one photo (1, c, H, W)."""
        return self.explain_batch([photo], [target])[0]

    def explain_batch(self, photos: Sequence[Tensor], targets: Sequence[Target] | Target = None) -> list[Heatmap]:
        """Return the heat maps of photos (1, c, H, W), each of any size, in one forward and one backward pass."""
        for photo in photos:
            self.model.check_photo(photo)
        images, regions = zip(*map(self.model.fitted, photos), strict=True)
        maps, logits = self.maps(torch.cat(images), targets)
        probabilities = class_probabilities(logits, self.model.labels).double().cpu()
        indices = class_indices(targets, logits, self.model.labels)
        columns = (maps.cpu(), probabilities, indices, regions, photos)
        return [self.heatmap(*row) for row in zip(*columns, strict=True)]

    def heatmap(self, values: Tensor, probabilities: Tensor, target: int, region: Region, photo: Tensor) -> Heatmap:
        """Return a map's values (h, w) with all that belongs to them; probabilities (k,)."""
        labels, count = self.model.labels, len(probabilities)
        top = probabilities.argsort(descending=True, stable=True)[:TOP].tolist()
        scores = {
            index: ClassScore(index, class_name(index, labels, count), float(probabilities[index]))
            for index in [*top, target]
        }
        return Heatmap(
            map=values.clone(),
            method=self.spec["method"],
            layer=self.spec["layer"],
            target=scores[target],
            top=tuple(scores[index] for index in top),
            region=region,
            photo_size=(photo.shape[-2], photo.shape[-1]),
            spec={**self.spec, "target": asdict(scores[target])},
        )

    def maps(self, images: Tensor, targets: Sequence[Target] | Tensor | Target = None) -> tuple[Tensor, Tensor]:
        """Return raw maps (b, h, w) and logits (b, k) of images (b, c, h, w) at the network's input size.

        `targets` is one class for all images, or one for each.
        """
        # Convolutions are fastest with channels last in memory and normalisations folded into them. Both lay out the
        # weights anew, which pays for several images, or if gradients go all the way back; the results are the same
        # within rounding. What runs again in the backward pass has to find the same weights.
        fold_batchnorm = len(images) >= LEAST_BATCH or self.layer is None
        with self.folding.folded() if fold_batchnorm else nullcontext():
            maps, logits = (self.cam_maps if self.layer else self.input_gradient_maps)(images, targets)
        check_finite(self.model, maps, logits)
        return maps, logits

    def cam_maps(self, images: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Return maps from the layer's activations and gradients."""
        assert self.layer is not None
        values = self.read(
            images.contiguous(memory_format=torch.channels_last) if len(images) >= LEAST_BATCH else images
        )
        logits, raw = self.logits(values, len(images)), values[self.layer.path]
        score = target_logits(logits, class_indices(targets, logits, self.model.labels), self.model.labels).sum()
        gradient = torch.autograd.grad(score, raw, allow_unused=True)[0] if score.requires_grad else None
        if gradient is None:
            raise LayerRefused(
                f"the class scores of {self.model.name} do not depend on what {self.layer.path} returned; "
                f"{layers_with_maps(self.model)}"
            )
        acts, grads = (as_map(tensor, self.layer, images) for tensor in (raw.detach(), gradient))
        method = CAMS[self.method] if isinstance(self.method, str) else self.method
        maps = method(acts, grads)
        if tuple(maps.shape) != (len(acts), *acts.shape[2:]):
            raise InvalidRequest(
                f"{method_name(self.method)} returned {tuple(maps.shape)}, not a map (b, h, w) of "
                f"{(len(acts), *acts.shape[2:])} for activations of {tuple(acts.shape)}"
            )
        return maps.detach(), logits.detach()

    def input_gradient_maps(self, images: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Return maps from the gradients of the class scores with respect to the images."""
        with torch.no_grad():
            logits = self.logits(self.read(images), len(images))
        indices = class_indices(targets, logits, self.model.labels)

        def input_gradient(batch: Tensor) -> Tensor:
            leaf = batch.detach().requires_grad_()
            scores = target_logits(self.logits(self.read(leaf), len(leaf)), indices, self.model.labels)
            gradient = torch.autograd.grad(scores.sum(), leaf)[0]
            bar.done += 1
            return gradient

        name = str(self.method)
        with progress_bar(name, "passes", self.progress) as bar:
            bar.total = PASSES.get(name, 1)
            return INPUT_METHODS[name](input_gradient, images.detach()), logits

    def logits(self, values: dict[Address, Tensor], count: int) -> Tensor:
        """Return the class scores (b, k) from what `read` returned for `count` images.

        Raises:
            LayerRefused: the tensor read in their place is not (b, k).
        """
        logits = values[self.model.logits]
        if logits.dim() != 2 or len(logits) != count or not logits.is_floating_point():
            raise not_a_classifier(self.model, f"a tensor of {tuple(logits.shape)}")
        return logits


def method_name(method: str | Cam) -> str:
    """Return the name of a method.

    Raises:
        InvalidRequest: there is no such method; guided backpropagation is left out on purpose.
    """
    if not isinstance(method, str):
        return getattr(method, "__name__", type(method).__name__)
    if method in CAMS or method in INPUT_METHODS:
        return method
    guided = ": its pictures stay the same when the network's weights are randomised (Adebayo 2018)"
    reason = guided if "guided" in method.lower() else ""
    raise InvalidRequest(f"there is no method {method!r}{reason}; there are: {', '.join([*CAMS, *INPUT_METHODS])}")


def check_classifies(model: Model) -> None:
    """Refuse a network that returns several tensors, none of them known to be class scores."""
    if model.logits == "":
        try:
            model.output_part  # noqa: B018 - computed once and cached
        except LayerRefused as error:
            raise not_a_classifier(model, "several tensors or none") from error


def not_a_classifier(model: Model, returned: str) -> LayerRefused:
    return LayerRefused(
        f"{model.name} returns {returned}, not class scores; a heat map explains networks that return one tensor "
        "(images, classes), not those for detection or segmentation; `phosphene activations` works for these, too"
    )


def check_has_map(model: Model, layer: Layer) -> Layer:
    """Return a layer, or refuse it if the table of layers shows that it has no positions."""
    if layer.size is None and layer.channels is None:
        return layer  # tokens perhaps, or channels last: seen when it runs
    if layer.size is None or max(layer.size) == 1:
        raise LayerRefused(
            f"{layer.path} has no map any more: it follows the pooling over all positions; {layers_with_maps(model)}"
        )
    return layer


def layers_with_maps(model: Model) -> str:
    """Return in words which layers to take instead."""
    paths = [layer.path for layer in model.layers() if layer.size and max(layer.size) > 1]
    return f"the last ones with a map are: {', '.join(paths[-4:])}" if paths else "no layer has a map"


def check_finite(model: Model, maps: Tensor, logits: Tensor) -> None:
    """Refuse NaN or infinity in maps (b, h, w) and logits (b, k)."""
    if not bool(maps.isfinite().all() and logits.isfinite().all()):
        raise LayerRefused(f"the class scores of {model.name} or their gradients are NaN or infinite for this photo")
