"""The layer table: what addresses mean, and how it prints."""

from __future__ import annotations

import json
from collections import OrderedDict

import pytest
import torch
from torch import nn

import phosphene
from phosphene.errors import LayerNotFound
from phosphene.network.layers import Layers
from phosphene.network.survey import survey


def table(net: nn.Module, *shape: int) -> Layers:
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    return survey(net, net, dict(net.named_modules()), image)


@pytest.fixture(scope="module")
def vgg19() -> Layers:
    """Return the table of a network with the layers of VGG19 by name, one channel each."""
    net = nn.Sequential()
    for block, count in enumerate((2, 2, 4, 4, 4), 1):
        for index in range(1, count + 1):
            net.add_module(f"block{block}_conv{index}", nn.Conv2d(1, 1, 3, padding=1))
            net.add_module(f"block{block}_relu{index}", nn.ReLU())
        net.add_module(f"block{block}_pool", nn.MaxPool2d(2))
    return table(net, 1, 32, 32)


@pytest.fixture
def plain() -> Layers:
    return table(nn.Sequential(nn.Conv2d(1, 2, (1, 3)), nn.ReLU(True), nn.Conv2d(2, 3, 2, 2), nn.Flatten(1)), 1, 4, 8)


def test_paths_of_digits_have_a_dot_and_integers_count_convolutions(plain: Layers) -> None:
    assert [layer.path for layer in plain] == [".0", ".1", ".2", ".3"]
    assert plain.find(1).path == plain.find("2").path == plain.find(".2").path == ".2"
    assert plain.find("1").kind == "ReLU"
    assert plain[1:3][0].path == ".1"
    with pytest.raises(LayerNotFound, match="there is no convolution 2: the network has 2, 0 to 1"):
        plain.find(2)
    with pytest.raises(LayerNotFound, match="no convolution -1"):
        plain.find(-1)
    with pytest.raises(LayerNotFound, match="the network has none; give a path"):
        table(nn.Sequential(nn.ReLU()), 1, 2, 2).find(0)


def test_an_unknown_layer_is_an_error_with_the_nearest_names(vgg19: Layers) -> None:
    with pytest.raises(LayerNotFound, match="no layer 'block3_cnov1'; the nearest are: block3_conv1, ") as caught:
        vgg19.find("block3_cnov1")
    assert isinstance(caught.value, KeyError)
    with pytest.raises(LayerNotFound, match=r"no layer matches 'blok3\*'; the nearest are: block3"):
        vgg19.matching("blok3*")


def test_a_glob_finds_layers_in_their_order(vgg19: Layers, plain: Layers) -> None:
    assert [layer.path for layer in vgg19.matching("block3_c*")] == [f"block3_conv{number}" for number in (1, 2, 3, 4)]
    assert [layer.path for layer in vgg19.matching("*_pool")] == [f"block{number}_pool" for number in (1, 2, 3, 4, 5)]
    assert [layer.path for layer in vgg19.matching("block[12]_conv1")] == ["block1_conv1", "block2_conv1"]
    assert len(vgg19.matching("*")) == 37
    assert [layer.path for layer in plain.matching("[12]")] == [".1", ".2"]


def test_the_table_prints_as_one(plain: Layers) -> None:
    assert repr(plain).splitlines() == [
        "layer  kind     channels  map  receptive field / stride / padding  overwritten by",
        ".0     Conv2d   2         4×6  1×3 / 1 / 0                         relu_",
        ".1     ReLU     2         4×6  1×3 / 1 / 0",
        ".2     Conv2d   3         2×3  2×4 / 2 / 0",
        ".3     Flatten  18             ?",
    ]


def test_the_table_of_a_notebook_has_the_same_cells(plain: Layers) -> None:
    html = plain._repr_html_()
    assert html.count("<tr>") == 5
    assert "<tr><td>.0</td><td>Conv2d</td><td>2</td><td>4×6</td><td>1×3 / 1 / 0</td><td>relu_</td></tr>" in html
    assert html.startswith("<table><thead><tr><th>layer</th><th>kind</th>")
    odd = table(nn.Sequential(OrderedDict({"<b>": nn.ReLU()})), 1, 2, 2)
    assert "<td>&lt;b&gt;</td>" in odd._repr_html_()


def test_the_table_as_json(plain: Layers) -> None:
    assert json.loads(json.dumps(plain.to_json()))[0] == {
        "path": ".0",
        "kind": "Conv2d",
        "convolution": True,
        "channels": 2,
        "size": [4, 6],
        "receptive_field": {"size": [1, 3], "stride": [1, 1], "padding": [0, 0]},
        "sees": "part",
        "in_place": "relu_",
    }
    assert plain.to_json()[3]["receptive_field"] is None
    assert plain.to_json()[3]["sees"] == "unknown"


def test_a_layer_that_is_spelled_just_so_is_meant_alone() -> None:
    net = nn.Sequential()
    for name in ("a?", "ab", "a[b]"):
        net.add_module(name, nn.Conv2d(3, 3, 1))
    layers = phosphene.load(net, input_size=8).layers()
    assert [layer.path for layer in layers.matching("a?")] == ["a?"]
    assert [layer.path for layer in layers.matching("a[b]")] == ["a[b]"]
    assert [layer.path for layer in layers.matching("a*")] == ["a?", "ab", "a[b]"]
