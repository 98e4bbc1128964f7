"""`load`: references that name nothing, and the arguments beside the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import phosphene.network.loading
from phosphene import errors
from phosphene.network.model import Model
from phosphene.network.preprocessing import Preprocessing

RANDOM = "random weights: the pictures show the architecture, not anything learned"
UNNORMALISED = "no normalisation was given: the network gets values of 0..1"


def load(model: Any, **options: Any) -> Model:
    """Load a model, and check that the global random state is as before, after a refusal too."""
    before = torch.get_rng_state()
    try:
        return phosphene.network.loading.load(model, **options)
    finally:
        assert torch.equal(before, torch.get_rng_state())


def refused(error: type[errors.PhospheneError], model: Any, **options: Any) -> str:
    """Return the one sentence with which `load` refuses."""
    with pytest.raises(error) as caught:
        load(model, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_unknown_reference_says_what_there_is() -> None:
    assert "there are: vgg19, efficientnet-lite0" in refused(errors.ModelNotFound, "builtin/vgg16")
    for reference in ("vgg19", "", "onnx/x", "builtin"):
        assert "torchvision/NAME" in refused(errors.ModelNotFound, reference)
    assert "resnet18" in refused(errors.ModelNotFound, "torchvision/resnt18")
    assert "not <class 'int'>" in refused(errors.ModelNotFound, 3)


def small() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())


def test_mean_and_deviation_are_one_number_or_one_a_channel() -> None:
    assert load(small(), mean=[0.5], std=[0.1, 0.2, 0.3]).preprocessing == Preprocessing((0.5,), (0.1, 0.2, 0.3))
    assert load("builtin/vgg19", std=[1]).preprocessing == Preprocessing(
        (123.68 / 255, 116.779 / 255, 103.939 / 255), (1.0,), bgr=True
    )
    assert load(small()).notes == (UNNORMALISED,)
    assert load(small(), mean=[0.5]).notes == ()
    assert load(small(), mean=[0.5]).options == {}  # of an object that no reference leads to
    assert "needs 1 or 3 numbers, one per channel, not 2" in refused(errors.InvalidRequest, small(), mean=[1, 2])
    assert "std needs 1 or 3" in refused(errors.InvalidRequest, small(), std=[])
    assert "above 0, not 0.0" in refused(errors.InvalidRequest, small(), std=[1, 0, 1])
    assert "finite" in refused(errors.InvalidRequest, small(), mean=[float("nan")])


def test_labels_come_from_a_sequence_or_a_file_without_its_last_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_bytes("\ufeffcat\r\n\r\nchien à poil\n\n".encode())
    assert load(small(), labels=tmp_path / "l.txt").labels == ("cat", "", "chien à poil")
    assert load(small(), labels=["a", "b"]).labels == ("a", "b")
    assert "cannot be read" in refused(errors.InvalidRequest, small(), labels=tmp_path / "none.txt")
    (tmp_path / "l.txt").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refused(errors.InvalidRequest, small(), labels=str(tmp_path / "l.txt"))


def test_an_input_size_is_a_side_or_height_and_width() -> None:
    assert load(small(), input_size=40).input_size == (40, 40)
    assert load(small(), input_size=(20, 30)).layers()[0].size == (18, 28)
    for wrong in (0, (3,), (3, 3, 3), (4, 0)):
        assert "at least 1 px" in refused(errors.InvalidRequest, small(), input_size=wrong)
    assert "at least 1 input channel, not 0" in refused(errors.InvalidRequest, small(), channels_in=0)


def test_a_device_that_is_not_there_is_refused() -> None:
    assert "choose auto, cpu, cuda" in refused(errors.InvalidRequest, "builtin/vgg19", device="gpu")
    assert "choose auto, cpu, cuda" in refused(errors.InvalidRequest, "builtin/vgg19", device="cuda:99")


def test_weights_that_are_not_finite_are_refused_by_the_layer_s_name() -> None:
    net = small()
    weights = net.state_dict()["0.weight"]
    weights[1, 2, 0, 0], weights[0, 0, 0, 0] = float("nan"), float("inf")
    assert "0.weight holds 2 values that are NaN or infinite" in refused(errors.WeightsRefused, net)
