"""Explaining: maps against gradients taken without our capture, at every convolution; targets, layers, refusals."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients, LayerGradCam, Saliency
from torch import Tensor, nn
from torchvision import models
from torchvision.models import inception
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig

from fake_terminal import counts
from phosphene.errors import ChannelNotFound, InvalidRequest, LayerNotFound, LayerRefused
from phosphene.images.photo import Region
from phosphene.inspection.attribution_methods import CAMS, INPUT_METHODS
from phosphene.inspection.default_layer import default_layer
from phosphene.inspection.explain import explain, explaining
from phosphene.network.feature_maps import as_map, token_grid
from phosphene.network.loading import load
from phosphene.network.model import Model
from phosphene.network.preprocessing import Preprocessing
from phosphene.progress import Bar
from raw_heatmaps import heatmaps

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
NETS = {  # name -> side of the image in pixels
    "vgg11": 48,
    "vgg11_bn": 48,
    "resnet18": 33,
    "resnet50": 33,
    "densenet121": 48,
    "inception_v3": 80,
    "small inception": 25,
    "mobilenet_v2": 48,
    "mobilenet_v3_small": 33,
    "efficientnet_b0": 33,
    "convnext_tiny": 48,
    "small densenet": 48,
    "small efficientnet": 33,
    "small convnext": 48,
}
SLOW = ("vgg11", "resnet50", "densenet121", "inception_v3", "mobilenet_v2", "efficientnet_b0", "convnext_tiny")


def noise(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def vgg11(batch_norm: bool) -> nn.Module:
    """Return VGG11 with a single layer as its classifier: a hundred million weights less."""
    features = models.vgg.make_layers(models.vgg.cfgs["A"], batch_norm)
    head = {"avgpool": nn.AdaptiveAvgPool2d(7), "flatten": nn.Flatten(), "classifier": nn.Linear(512 * 49, 10)}
    return nn.Sequential(OrderedDict(features=features, **head))


def small_inception() -> nn.Module:
    """Return a stem and three of the blocks with branches that Inception v3 has."""
    blocks = inception.InceptionA(8, 4), inception.InceptionB(228), inception.InceptionC(708, 8)
    stem = inception.BasicConv2d(3, 8, kernel_size=3, stride=2)
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(768, 10))


BLOCKS = [MBConvConfig(1, 3, 1, 32, 16, 1), MBConvConfig(6, 3, 2, 16, 24, 2), MBConvConfig(6, 5, 2, 24, 40, 2)]
MAKERS: dict[str, Callable[[], nn.Module]] = {  # the small ones have the same kinds of blocks as the large, but few
    "vgg11": lambda: vgg11(False),
    "vgg11_bn": lambda: vgg11(True),
    "inception_v3": lambda: models.inception_v3(init_weights=False),
    "small inception": small_inception,
    "small densenet": lambda: models.DenseNet(8, (2, 3, 2, 2), 16, num_classes=10),
    "small efficientnet": lambda: models.EfficientNet(BLOCKS, 0.2, num_classes=10),
    "small convnext": lambda: models.ConvNeXt([CNBlockConfig(24, 48, 2), CNBlockConfig(48, None, 3)], num_classes=10),
}


@lru_cache(maxsize=2)
def built(name: str) -> nn.Module:
    """Return a network in float64 and evaluation mode, its weights and statistics from seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = (MAKERS[name]() if name in MAKERS else models.get_model(name, weights=None)).double().eval()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean = 0.1 * torch.randn(module.num_features, dtype=torch.float64)
                module.running_var = 0.2 + torch.rand(module.num_features, dtype=torch.float64)
    return net


def model_of(net: nn.Module, side: int, labels: tuple[str, ...] = ()) -> Model:
    return Model(net, "net", (side, side), preprocessing=Preprocessing((0.5,), (0.25,)), labels=labels)


def reference(net: nn.Module, image: Tensor, targets: list[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return every convolution's activations and gradients, by hooks on a copy with nothing in place."""
    net, acts = copy.deepcopy(net), {}
    for module in net.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]

    def keep(path: str, output: Tensor) -> None:
        output.retain_grad()
        acts[path] = output

    for path, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, _inputs, output, path=path: keep(path, output))
    logits = net((image - 0.5) / 0.25)
    sum(logits[number, target] for number, target in enumerate(targets)).backward()
    return {path: (act.detach(), act.grad) for path, act in acts.items() if act.grad is not None}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NETS])
def test_equal_to_a_reference_at_every_convolution(name: str) -> None:
    net, side = built(name), NETS[name]
    model, image = model_of(net, side), noise(1, 3, side, side, dtype=torch.float64)
    expected = reference(net, image, [7])
    spatial = [path for path, (act, _) in expected.items() if max(act.shape[2:]) > 1]
    assert len(spatial) >= 7
    for path in spatial:
        act, grad = expected[path]
        wanted = torch.zeros_like(act[0, 0])
        for weight, channel in zip(grad[0].mean((1, 2)).tolist(), act[0], strict=True):
            wanted += weight * channel
        maps, _ = heatmaps(model, image, 7, path)
        assert float((maps[0] - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max()), path
    assert sum(bool(expected[path][1].any()) for path in spatial) > 0.9 * len(spatial)


@pytest.mark.parametrize("method", [method for method in CAMS if method != "gradcam"])
def test_every_method_gets_the_right_activations_and_gradients(method: str) -> None:
    net = built("vgg11_bn")
    images = noise(2, 3, 48, 48, dtype=torch.float64)
    act, grad = reference(net, images, [3, 8])["features.15"]
    maps, _ = heatmaps(model_of(net, 48), images, [3, 8], "features.15", method)
    torch.testing.assert_close(maps, CAMS[method](act, grad), rtol=1e-6, atol=1e-5 * float(maps.abs().max()))


@pytest.mark.parametrize(("name", "layer"), [("vgg11", "features.18"), ("resnet18", "layer3.1.conv2")])
def test_equal_to_captum(name: str, layer: str) -> None:
    net = built(name)
    model, images = model_of(net, 48), noise(2, 3, 48, 48, dtype=torch.float64)
    maps, logits = heatmaps(model, images, [3, 9], layer)
    captum = LayerGradCam(model.forward, net.get_submodule(layer))
    wanted = captum.attribute(images, target=[3, 9])[:, 0].detach()
    assert float((maps - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    torch.testing.assert_close(logits, model.forward(images).detach())


def test_input_methods_are_equal_to_captum(small_net: nn.Sequential) -> None:
    model, images = model_of(small_net, 16), noise(2, 3, 16, 16, dtype=torch.float64)
    for module in small_net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # for captum
    saliency = Saliency(model.forward).attribute(images.clone().requires_grad_(), target=[1, 4], abs=False).sum(1)
    torch.testing.assert_close(heatmaps(model, images, [1, 4], method="gradient")[0], saliency)
    integrated = IntegratedGradients(model.forward).attribute(
        images, target=[1, 4], n_steps=32, method="riemann_middle"
    )
    torch.testing.assert_close(heatmaps(model, images, [1, 4], method="integrated-gradients")[0], integrated.sum(1))


@pytest.mark.parametrize("method", [*CAMS, *INPUT_METHODS])
def test_a_map_does_not_depend_on_its_batch(small_net: nn.Sequential, method: str) -> None:
    model, images = model_of(small_net, 16), noise(3, 3, 16, 16, dtype=torch.float64)
    maps, logits = heatmaps(model, images, [0, None, 2], method=method)
    for number, target in enumerate((0, int(logits[1].argmax()), 2)):
        alone, _ = heatmaps(model, images[number : number + 1], target, method=method)
        torch.testing.assert_close(maps[number], alone[0], rtol=1e-8, atol=1e-10)


def test_a_method_of_the_user(small_net: nn.Sequential) -> None:
    def strongest(acts: Tensor, grads: Tensor) -> Tensor:
        return acts.amax(1)

    model, photo = model_of(small_net, 16), noise(1, 3, 16, 16)
    heat = explain(model, photo, layer=1, method=strongest)
    with model.reading([1]) as read:
        expected = read(model.fitted(photo)[0])[1].amax(1)[0]
    torch.testing.assert_close(heat.map, expected, rtol=0, atol=1e-12)
    assert (heat.method, heat.layer) == ("strongest", ".4")
    with pytest.raises(InvalidRequest, match=r"<lambda> returned \(1, 8\), not a map"):
        explain(model, photo, method=lambda acts, grads: acts.amax((2, 3)))


def test_what_a_heat_map_tells_of_itself(small_net: nn.Sequential, untouched: Untouched) -> None:
    model = model_of(small_net, 16, ("ant", "bee", "cat", "dog", "eel"))
    photo = noise(1, 3, 32, 48)
    with untouched(small_net):
        heat = explain(model, photo, "bee", layer="0")
    image, region = model.fitted(photo)
    logits = model.forward(image)[0].detach()
    chances = torch.exp(logits) / torch.exp(logits).sum()
    order = sorted(range(5), key=lambda index: -float(chances[index]))
    assert [guess.index for guess in heat.top] == order
    assert [guess.name for guess in heat.top] == [model.labels[index] for index in order]
    assert [guess.probability for guess in heat.top] == pytest.approx([float(chances[index]) for index in order])
    assert (heat.target.index, heat.target.name) == (1, "bee")
    assert heat.target.probability == pytest.approx(float(chances[1]))
    assert heat.region == region == Region(0.0, 8.0, 32.0, 32.0)
    assert heat.photo_size == (32, 48)
    assert heat.map.shape == (16, 16)
    assert heat.spec["fingerprint"] == model.fingerprint
    assert (heat.spec["layer"], heat.spec["method"], heat.spec["target"]["name"]) == (".0", "gradcam", "bee")
    assert heat.overlay(photo, legend=False).size == (48, 32)
    assert explain(model, photo).target == heat.top[0]


def test_photos_of_several_sizes_at_once(small_net: nn.Sequential) -> None:
    model = model_of(small_net, 16)
    photos = [noise(1, 3, 20, 36), noise(1, 3, 40, 17, seed=2)]
    with explaining(model, method="hirescam") as explainer:
        both = explainer.explain_batch(photos, [1, 2])
        alone = [explainer(photo, target) for photo, target in zip(photos, (1, 2), strict=True)]
    for heat, wanted in zip(both, alone, strict=True):
        torch.testing.assert_close(heat.map, wanted.map)
        assert (heat.region, heat.photo_size) == (wanted.region, wanted.photo_size)
        assert heat.target.index == wanted.target.index


class OneLogit(nn.Module):
    """Its logit is the mean of the image's first channel minus 0.4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1))
            self.conv.bias.fill_(-0.4)  # type: ignore[union-attr]

    def forward(self, image: Tensor) -> Tensor:
        output: Tensor = self.conv(image).mean((2, 3))
        return output


def test_a_single_logit_by_hand() -> None:
    photo = torch.zeros(1, 3, 2, 2)
    photo[0, 0] = torch.tensor([[1.0, 0.0], [1.0, 1.0]])  # logit .75 - .4 = .35
    model = Model(OneLogit(), "one", (2, 2))
    heat = explain(model, photo)
    assert heat.target.index == 0
    assert heat.target.probability == pytest.approx(1 / (1 + 2.718281828**-0.35))
    assert heat.map.flatten().tolist() == pytest.approx([0.15, -0.1, 0.15, 0.15])  # a quarter of the activations
    pair = Model(OneLogit(), "one", (2, 2), labels=("cat", "dog"))
    dog, cat = explain(pair, photo), explain(pair, photo, "cat")
    assert (dog.target.name, dog.target.probability) == ("dog", heat.target.probability)
    assert cat.target.probability == pytest.approx(1 - dog.target.probability)
    assert torch.equal(cat.map, -dog.map)
    assert torch.equal(dog.map, heat.map)


def test_nothing_speaks_for_a_class(small_net: nn.Sequential) -> None:
    with torch.no_grad():
        small_net[-1].weight[2] = -small_net[-1].weight[2].abs()  # type: ignore[index,operator]
    heat = explain(model_of(small_net, 16), noise(1, 3, 16, 16), 2, layer=".5")  # after a ReLU
    assert heat.is_empty
    assert heat.empty_message() == "nothing speaks for class 2 at .5"
    assert not explain(model_of(small_net, 16), noise(1, 3, 16, 16), 2, method="gradient").is_empty


def small_vit() -> nn.Module:
    """Return a vision transformer of torchvision with a classifier that is not 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net: nn.Module = models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=16, num_classes=5
        )
        nn.init.normal_(net.get_parameter("heads.head.weight"))
    return net.double().eval()


def act_and_gradient(net: nn.Module, path: str, image: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """Return what a layer returns, and the gradient of a class score there, by a plain hook."""
    acts: list[Tensor] = []
    handle = net.get_submodule(path).register_forward_hook(lambda _module, _inputs, output: acts.append(output))
    score = net((image - 0.5) / 0.25)[0, target]
    handle.remove()
    return acts[0].detach(), torch.autograd.grad(score, acts)[0]


def test_tokens_are_mapped_through_their_grid() -> None:
    net, image = small_vit(), noise(1, 3, 32, 32, dtype=torch.float64)
    layer = "encoder.layers.encoder_layer_1.ln_1"
    model = model_of(net, 32)
    assert default_layer(model).path == layer
    act, grad = act_and_gradient(net, layer, image, 2)
    weights = grad[0, 1:].mean(0)  # the class token comes first
    expected = (act[0, 1:] * weights).sum(1).view(4, 4)
    maps, _ = heatmaps(model, image, 2)
    torch.testing.assert_close(maps[0], expected)


def test_channels_last_are_turned_to_maps() -> None:
    net = models.SwinTransformer([4, 4], 12, [1, 1], [1, 2], [2, 2], num_classes=5).double().eval()
    model, image = model_of(net, 32), noise(1, 3, 32, 32, dtype=torch.float64)
    act, grad = act_and_gradient(net, "norm", image, 1)
    assert act.shape == (1, 4, 4, 24)
    torch.testing.assert_close(heatmaps(model, image, 1, "norm")[0], (act * grad.mean((1, 2))).sum(-1))


@pytest.mark.parametrize(
    ("count", "sides", "grid"),
    [
        (196, (224, 224), (14, 14)),
        (197, (224, 224), (14, 14)),
        (198, (224, 224), (14, 14)),
        (1374, (518, 518), (37, 37)),  # 1,369, a class and four registers
        (8, (64, 32), (4, 2)),
        (9, (64, 32), (4, 2)),
        (3136, (224, 224), (56, 56)),
        (1, (224, 224), None),
        (30, (32, 32), (4, 4)),
        (300, (224, 224), None),
    ],
)
def test_the_grid_of_tokens(count: int, sides: tuple[int, int], grid: tuple[int, int] | None) -> None:
    assert token_grid(count, sides) == grid


def test_tokens_that_make_no_grid_are_refused() -> None:
    layer = model_of(small_vit(), 32).find("encoder.dropout")
    with pytest.raises(LayerRefused, match=r"encoder.dropout returns \(1, 300, 8\), in which no map"):
        as_map(torch.zeros(1, 300, 8), layer, torch.zeros(1, 3, 224, 224))


class Segmenter(nn.Module):
    """Returns a map of classes, by itself or in a dict with another."""

    def __init__(self, several: bool) -> None:
        super().__init__()
        self.conv, self.several = nn.Conv2d(3, 4, 3, padding=1), several

    def forward(self, image: Tensor) -> Any:
        return {"out": self.conv(image), "aux": self.conv(image)} if self.several else self.conv(image)


class Branching(nn.Module):
    """One branch never reaches the class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, image: Tensor) -> Tensor:
        self.unused(image)
        output: Tensor = self.used(image).mean((2, 3))
        return output


class Dense(nn.Module):
    """Has no convolution at all."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten, self.line = nn.Flatten(), nn.Linear(3 * 64, 4)

    def forward(self, image: Tensor) -> Tensor:
        output: Tensor = self.line(self.flatten(image))
        return output


def test_what_is_refused(small_net: nn.Sequential, untouched: Untouched) -> None:
    model, photo = model_of(small_net, 16), noise(1, 3, 16, 16)
    with untouched(small_net):
        for layer in (".6", ".7", ".8"):  # pooled, flattened, the classifier
            with pytest.raises(LayerRefused, match=rf"{layer} has no map any more.*with a map are: .2, .3, .4, .5"):
                explain(model, photo, layer=layer)
        with pytest.raises(LayerNotFound, match="there is no layer 'conv'"):
            explain(model, photo, layer="conv")
        with pytest.raises(ChannelNotFound, match="there is no class 5: the network has 5, 0 to 4"):
            explain(model, photo, 5)
        with pytest.raises(InvalidRequest, match=r"no method 'gradcamm'; there are: gradcam, gradcam\+\+"):
            explain(model, photo, method="gradcamm")
        with pytest.raises(InvalidRequest, match=r"no method 'guided-backprop': its pictures.*Adebayo"):
            explain(model, photo, method="guided-backprop")
        with pytest.raises(InvalidRequest, match="smoothgrad looks at the image itself"):
            explain(model, photo, layer=0, method="smoothgrad")
        with pytest.raises(InvalidRequest, match=r"\(1, 3, height, width\).*not \(1, 1, 16, 16\)"):
            explain(model, photo[:, :1])
        with pytest.raises(InvalidRequest, match="there are 3 targets for 2 images"):
            heatmaps(model, noise(2, 3, 16, 16, dtype=torch.float64), [0, 1, 2])
        with pytest.raises(LayerRefused, match="NaN or infinite for this photo"):
            explain(model, photo * float("nan"))
    with pytest.raises(LayerRefused, match=r"Seg|net returns .*one tensor \(images, classes\).*segmentation"):
        explain(model_of(Segmenter(False), 8), noise(1, 3, 8, 8))
    with pytest.raises(LayerRefused, match=r"one tensor \(images, classes\), not those for detection or segmentation"):
        explain(model_of(Segmenter(True), 8), noise(1, 3, 8, 8))
    with pytest.raises(LayerRefused, match="class scores of net do not depend on what unused returned"):
        explain(model_of(Branching(), 8), noise(1, 3, 8, 8), layer="unused")
    with pytest.raises(LayerRefused, match="no convolution or normalisation with a map"):
        explain(model_of(Dense(), 8), noise(1, 3, 8, 8))


@pytest.mark.parametrize(("method", "passes"), [("gradient", 1), ("smoothgrad", 24), ("integrated-gradients", 32)])
def test_the_bar_counts_the_passes(
    small_net: nn.Sequential, method: str, passes: int, bars: list[Bar], shown_bars: list[str]
) -> None:
    model, photo = model_of(small_net, 16), noise(1, 3, 16, 16)
    with explaining(model, method=method, progress=False) as explainer:
        explainer.explain_batch([photo, photo])
    explain(model, photo, method=method)
    assert counts(bars) == [(method, "passes", passes, passes)] * 2
    assert shown_bars == [method]


@pytest.mark.parametrize("method", ["gradcam", "smoothgrad", "integrated-gradients"])
def test_nothing_is_left_behind(small_net: nn.Sequential, untouched: Untouched, method: str) -> None:
    small_net.train()
    model = model_of(small_net, 16)
    with untouched(small_net):
        explain(model, noise(1, 3, 16, 16), method=method)

    def fail() -> None:
        with explaining(model, method=method) as explainer:
            explainer(noise(1, 3, 16, 16))
            raise ZeroDivisionError

    with untouched(small_net), pytest.raises(ZeroDivisionError):
        fail()


def landscape(seed: int) -> Tensor:
    """Return a picture (1, 3, 256, 256) with what photos have: 1/f noise, with discs of colour and stripes in it."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.fft.fftfreq(256), torch.fft.rfftfreq(256), indexing="ij")
    spectrum = torch.fft.rfft2(torch.randn(3, 256, 256, generator=generator))
    picture = torch.fft.irfft2(spectrum / (rows**2 + columns**2).sqrt().clamp(min=1 / 256), s=(256, 256))
    picture = 0.5 + 0.2 * picture / picture.std()
    down, across = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    for _ in range(4):
        y, x, radius = (256 * torch.rand(3, generator=generator) * torch.tensor([1, 1, 0.25])).tolist()
        inside = (down - y).square() + (across - x).square() < (radius + 12) ** 2
        colour = torch.rand(3, 1, 1, generator=generator)
        stripes = (
            0.3
            * torch.sin(across * (0.2 + torch.rand(1, generator=generator)))
            * (torch.rand(1, generator=generator) > 0.5)
        )
        picture = torch.where(inside, colour + stripes, picture)
    whole: Tensor = picture.clamp(0, 1)[None]
    return whole


def ranks(values: Tensor) -> Tensor:
    order: Tensor = values.flatten().argsort().argsort()
    return order.double()


@pytest.fixture(scope="module")
def shuffled() -> tuple[Model, Model]:
    """Return EfficientNet-lite0, and again with its classifier's weights shuffled."""
    model, randomised = load("builtin/efficientnet-lite0"), load("builtin/efficientnet-lite0")
    weight = randomised.module.get_parameter("_fc.weight")
    order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weight.copy_(weight.flatten()[order].view_as(weight))
    return model, randomised


RANDOMISED = {  # what is left of the map's ranks; these keep only what is positive in the gradient, or nothing of it
    "gradcam++": (0.5, 1.0),
    "layercam": (0.5, 1.0),
    "eigencam": (1.0, 1.0),
}


@pytest.mark.parametrize("method", [*CAMS, *INPUT_METHODS])
def test_with_a_randomised_classifier_the_map_is_another(shuffled: tuple[Model, Model], method: str) -> None:
    """Adebayo 2018: a map that stays says nothing of what the network has learned about classes."""
    images = torch.cat([shuffled[0].fitted(landscape(seed))[0] for seed in range(4)])
    if method in INPUT_METHODS:  # dozens of passes
        images = F.interpolate(images[:2], (64, 64), mode="area")
    first, logits = heatmaps(shuffled[0], images, method=method)
    second, _ = heatmaps(shuffled[1], images, logits.argmax(1), method=method)
    correlations = [
        float(torch.corrcoef(torch.stack([ranks(original), ranks(randomised)]))[0, 1])
        for original, randomised in zip(first, second, strict=True)
    ]
    mean = sum(correlations) / len(correlations)
    low, high = RANDOMISED.get(method, (-0.5, 0.5))
    assert low - 1e-9 <= mean <= high + 1e-9, correlations
