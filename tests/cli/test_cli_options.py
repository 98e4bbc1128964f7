"""Options as people type them, and the model that they name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from torch import nn

from phosphene.cli.options import (
    MODEL_OPTIONS,
    address,
    batch_size,
    chosen_layer,
    height_and_width,
    numbers,
    takes_model,
)
from phosphene.errors import InvalidRequest, LayerNotFound
from phosphene.network.loading import load


def test_numbers_and_sizes_are_read() -> None:
    assert numbers("0.5,0.25, 1e-1", "mean") == [0.5, 0.25, 0.1]
    assert numbers(None, "mean") is None
    assert height_and_width("96") == (96, 96)
    assert height_and_width("96X128") == (96, 128)
    assert height_and_width(None) is None
    assert (batch_size("8"), batch_size("auto")) == (8, "auto")
    assert (address("3"), address(".3"), address("conv3")) == (3, ".3", "conv3")


@pytest.mark.parametrize("text", ["", "x", "1x2x3", "-3", "٣", "3.5"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="side in pixels or height and width, such as 96x128"):
        height_and_width(text)


def test_a_number_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"--std is one number or several, such as 0\.5,0\.4,0\.3, not '1;2'"):
        numbers("1;2", "std")


def test_a_command_gets_the_options_of_a_model_behind_its_own() -> None:
    given: dict[str, Any] = {}

    @takes_model
    def command(open_model: Any, layer: str, quiet: bool = False) -> None:
        given.update(layer=layer, quiet=quiet, model=open_model())

    assert [*inspect.signature(command).parameters] == ["model", "layer", "quiet", *MODEL_OPTIONS]
    defaults = {name: default for name, (_, default) in MODEL_OPTIONS.items()}
    command(**{**defaults, "model": "builtin/vgg19", "layer": "block1_conv1", "quiet": True, "device": "cpu"})
    assert (given["layer"], given["quiet"], given["model"].name) == ("block1_conv1", True, "builtin/vgg19")


def test_a_layer_is_found_and_a_number_explained(capsys: pytest.CaptureFixture[str]) -> None:
    model = load(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), input_size=16)
    assert chosen_layer(model, "1", quiet=False).path == ".2"
    assert capsys.readouterr().err == "phosphene: convolution 1 is .2\n"
    assert chosen_layer(model, ".2", quiet=False).path == chosen_layer(model, "1", quiet=True).path == ".2"
    assert capsys.readouterr().err == ""
    with pytest.raises(LayerNotFound, match=r"'\.\*' stands for several: \.0, \.1, \.2$"):
        chosen_layer(model, ".*", quiet=True)
