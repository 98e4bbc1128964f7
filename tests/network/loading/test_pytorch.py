"""PyTorch models by reference: torchvision, timm, and the user's callable."""

from __future__ import annotations

import importlib
import sys
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from test_load import load, refused
from torch import nn

from phosphene import errors
from phosphene.network.loading.pytorch import UNNORMALISED
from phosphene.network.loading.weights import RANDOM
from phosphene.network.preprocessing import Preprocessing

Guard = Callable[[nn.Module], AbstractContextManager[None]]
IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Take the network away, and return the folder where torch looks for files downloaded before."""

    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub/checkpoints"
    cache.mkdir(parents=True)
    return cache


# --- torchvision ------------------------------------------------------------------------------------------------------


def test_torchvision_s_default_entry_gives_preprocessing_size_and_labels(offline: Path) -> None:
    model = load("torchvision/squeezenet1_1", weights="none")
    assert (model.input_size, model.channels_in, model.preprocessing) == ((224, 224), 3, IMAGENET)
    assert (len(model.labels), model.labels[281], model.notes) == (1000, "tabby", (RANDOM,))
    assert model.fingerprint == load("torchvision/squeezenet1_1", weights="none").fingerprint


@pytest.mark.slow
def test_inception_s_own_colour_transform_is_on_as_in_its_weights_entry(recwarn: pytest.WarningsRecorder) -> None:
    model = load("torchvision/inception_v3", weights="none")
    assert model.input_size == (299, 299)
    assert model.module.transform_input
    assert not recwarn.list


def test_torchvision_s_trained_weights_come_from_the_cache_of_torch(offline: Path) -> None:
    from torchvision.models import get_model, get_model_weights

    entry = get_model_weights("squeezenet1_1").DEFAULT
    with torch.random.fork_rng(devices=[]):
        source = get_model("squeezenet1_1")
    torch.save(source.state_dict(), offline / entry.url.rpartition("/")[2])
    model = load("torchvision/squeezenet1_1")
    assert all(torch.equal(weight, source.state_dict()[name]) for name, weight in model.module.state_dict().items())
    assert model.notes == ()
    assert not model.module.training


def test_a_failed_download_says_what_to_do(offline: Path) -> None:
    assert refused(errors.ModelNotFound, "torchvision/resnet18") == (
        "torchvision/resnet18 could not be made (URLError: <urlopen error no network>); trained weights are downloaded "
        "once and kept, which needs a network connection; --weights none or --weights PATH does without"
    )


def test_random_weights_download_no_backbone_either(offline: Path) -> None:
    model = load("torchvision/lraspp_mobilenet_v3_large", weights="none")
    assert model.input_size == (224, 224)
    assert "backbone.0.0" in model.modules


def test_torchvision_networks_for_other_numbers_of_channels_are_refused() -> None:
    message = refused(errors.InvalidRequest, "torchvision/squeezenet1_1", weights="none", channels_in=1)
    assert "takes images of 3 channels, not 1; timm/NAME is made for any number" in message
    assert load("torchvision/squeezenet1_1", weights="none", channels_in=3).channels_in == 3


def test_quantized_networks_are_refused() -> None:
    assert "use torchvision/resnet18" in refused(errors.ModelRefused, "torchvision/quantized_resnet18")


# --- timm -------------------------------------------------------------------------------------------------------------


def test_timm_s_data_config_gives_preprocessing_and_size() -> None:
    model = load("timm/resnet10t", weights="none")
    assert (model.input_size, model.channels_in, model.preprocessing) == ((176, 176), 3, IMAGENET)
    assert (len(model.labels), model.labels[281], model.notes) == (1000, "tabby", (RANDOM,))


def test_timm_makes_a_network_for_seven_channels() -> None:
    model = load("timm/resnet10t", weights="none", channels_in=7)
    assert model.channels_in == 7
    assert isinstance(model.preprocessing, Preprocessing)
    # the mean of (0.485, 0.456, 0.406) and of (0.229, 0.224, 0.225)
    assert model.preprocessing.mean == pytest.approx([0.449])
    assert model.preprocessing.std == pytest.approx([0.226])
    assert model.find(0).channels == 24


def test_timm_reads_a_weights_file(tmp_path: Path) -> None:
    source = load("timm/resnet10t", weights="none")
    state = {**source.module.state_dict(), "fc.bias": source.module.state_dict()["fc.bias"] + 1}
    torch.save({"state_dict": state, "epoch": 7}, tmp_path / "w.pth")
    model = load("timm/resnet10t", weights=tmp_path / "w.pth")
    assert torch.equal(model.module.state_dict()["fc.bias"], state["fc.bias"])


def test_timm_s_unknown_names_and_failed_downloads_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "resnet18" in refused(errors.ModelNotFound, "timm/resnet18x")

    def fail(*_: object, **options: object) -> None:
        assert options == {"pretrained": True}
        raise OSError("no network\nand more")

    monkeypatch.setattr("timm.create_model", fail)
    message = refused(errors.ModelNotFound, "timm/resnet10t.c3_in1k")
    assert "(OSError: no network); trained weights are downloaded once" in message


def test_without_timm_its_install_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert refused(errors.ExtraMissing, "timm/resnet18").endswith("pip install 'phosphene[timm]'")


# --- package.module:callable ------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Return a function that writes a file of Python into what is the current folder during the test."""
    monkeypatch.chdir(tmp_path)
    modules, path = set(sys.modules), list(sys.path)

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    yield write
    assert sys.path == path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    importlib.invalidate_caches()


NET = """
import random, numpy, torch
from torch import nn

def make():
    from {0}_parts import width
    random.random(), numpy.random.rand()
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width))

class Net(nn.Conv2d):
    def __init__(self):
        super().__init__(2, 3, 1)
"""


def test_the_user_s_callable_is_imported_from_the_current_folder(write: Callable[[str, str], None]) -> None:
    write("mynet_a.py", NET.format("mynet_a"))
    write("mynet_a_parts.py", "width = 6")  # imported when the callable runs
    model = load("mynet_a:make", mean=[0.1])
    assert (model.name, model.ref, model.channels_in, model.notes) == ("mynet_a:make", None, 1, ())
    assert model.find(0).channels == 6
    assert not model.module.training
    assert model.fingerprint == load("mynet_a:make", mean=[0.1]).fingerprint
    assert load("mynet_a:Net").channels_in == 2


def test_the_user_s_callable_takes_weights(write: Callable[[str, str], None], tmp_path: Path) -> None:
    write("nets_b/__init__.py", "")
    write(
        "nets_b/inner.py",
        NET.format("nets_b.inner").replace("nets_b.inner_parts import width", "math import tau; width = 5"),
    )
    source = load("nets_b.inner:make")
    state = {name: weight + 1 for name, weight in source.module.state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    model = load("nets_b.inner:make", weights=tmp_path / "w.pt")
    assert torch.equal(model.module.state_dict()["0.weight"], state["0.weight"])
    assert model.notes == (f"weights from {tmp_path / 'w.pt'}", UNNORMALISED)
    random = load("nets_b.inner:make", weights="none")
    assert random.notes == (RANDOM, UNNORMALISED)
    assert random.fingerprint == load("nets_b.inner:make", weights="none").fingerprint


WRONG = {
    "nowhere_c:make": (errors.ModelNotFound, "cannot be imported: No module named 'nowhere_c'"),
    "wrong_c:absent": (errors.ModelNotFound, "has no attribute 'absent'"),
    ".wrong_c:make": (errors.ModelNotFound, "cannot be imported"),
    ":make": (errors.ModelNotFound, "cannot be imported"),
    "wrong_c:": (errors.ModelNotFound, "cannot be imported"),
    "wrong_c:number": (errors.ModelRefused, "is a int; name a function or class that makes the network"),
    "wrong_c:ready": (errors.ModelRefused, "is a Linear; name a function"),
    "wrong_c:fails": (errors.ModelRefused, "calling wrong_c:fails() failed: ZeroDivisionError: division by zero"),
    "wrong_c:leaves": (errors.ModelRefused, "failed: SystemExit: 3"),
    "wrong_c:needs": (errors.ModelRefused, "missing 1 required positional argument: 'width'"),
    "wrong_c:nothing": (errors.ModelRefused, "wrong_c:nothing() returned NoneType, not a torch.nn.Module"),
    "broken_c:make": (errors.ModelRefused, "importing broken_c failed: NameError: name 'oops' is not defined"),
    "grammar_c:make": (errors.ModelRefused, "importing grammar_c failed: SyntaxError"),
}


@pytest.mark.parametrize("reference", WRONG)
def test_a_callable_that_does_not_work_is_refused_in_one_sentence(
    write: Callable[[str, str], None], reference: str
) -> None:
    write(
        "wrong_c.py",
        "import sys, torch\nnumber = 3\nready = torch.nn.Linear(1, 1)\ndef fails(): 1 / 0\ndef leaves(): sys.exit(3)\n"
        "def needs(width): pass\ndef nothing(): pass\n",
    )
    write("broken_c.py", "oops")
    write("grammar_c.py", "def (:")
    error, words = WRONG[reference]
    assert words in refused(error, reference)
