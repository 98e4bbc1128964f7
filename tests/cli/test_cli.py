"""The command line as a whole: its commands, and what bad input gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cli_runner import NETS, Run, command_line, gradient
from phosphene.cli import COMMANDS, load_command


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Return a function that runs the command line in a folder of its own, where `nets.py` lies."""
    return command_line(monkeypatch, capsys, tmp_path, NETS)


class Payload:
    """A pickle that would write a file."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("executed"),))


def spoil(folder: Path) -> None:
    """Put all kinds of bad files into a folder."""
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("not a picture")
    (folder / "file").touch()
    (folder / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    save_file({"0.weight": torch.zeros(2, 2), "extra": torch.zeros(1)}, folder / "other.safetensors")
    torch.save(Payload(), folder / "evil.pt")
    (folder / "cut.pt").write_bytes(b"PK\x03\x04")
    (folder / "bare").mkdir()
    (folder / "photos").mkdir()
    gradient(folder / "photo.png", 40, 30)


BAD = {
    "unknown library": (("layers", "hub/vgg19"), "'hub/vgg19' is no model reference"),
    "unknown built-in": (("layers", "builtin/vgg16"), "no built-in model 'vgg16'"),
    "unknown torchvision name": (("layers", "torchvision/vgg17"), "vgg16"),
    "unknown timm name": (("layers", "timm/resnet51"), "resnet"),
    "unknown package": (("layers", "nonsense:net"), "cannot be imported"),
    "unknown callable": (("layers", "nets:absent"), "cannot be imported"),
    "unknown layer": (("filters", "nets:colour", "features.28"), "there is no layer 'features.28'"),
    "convolution out of range": (("filters", "nets:colour", 2), "the network has 2, 0 to 1"),
    "glob": (("filters", "nets:colour", ".*"), "stands for several"),
    "channel out of range": (("filters", "nets:colour", 0, "--channels", "6"), "the layer has 0 to 5"),
    "channel range out of range": (("filters", "nets:colour", 0, "--channels", "0:64"), "the layer has 0 to 5"),
    "channels that are none": (("filters", "nets:colour", 0, "--channels", "x"), "0:64, 3,7,11 or all"),
    "no channels": (("filters", "nets:colour", 0, "--channels", "3:3"), "choose nothing"),
    "unknown recipe": (("filters", "nets:colour", 0, "--recipe", "nice"), "no recipe 'nice'"),
    "unknown objective": (("filters", "nets:colour", 0, "--objective", "all"), "no objective 'all'"),
    "a layer that is no map": (("filters", "nets:colour", ".7"), "returns no map"),
    "logit of a map": (("filters", "nets:colour", 0, "--objective", "logit"), "returns maps"),
    "size too small": (("filters", "builtin/vgg19", "block5_conv1", "--size", 8), "does not take a picture of 3×8×8"),
    "size zero": (("filters", "nets:colour", 0, "--size", 0), "at least 1 px"),
    "steps zero": (("filters", "nets:colour", 0, "--steps", 0), "at least 1"),
    "batch zero": (("filters", "nets:colour", 0, "--batch", 0), "at least 1"),
    "missing weights": (("layers", "nets:colour", "--weights", "w.pt"), "no weights file w.pt"),
    "weights cut short": (("layers", "nets:colour", "--weights", "cut.safetensors"), "cut short"),
    "pickle cut short": (("layers", "nets:colour", "--weights", "cut.pt"), "cut short"),
    "other network's weights": (("layers", "nets:colour", "--weights", "other.safetensors"), "5 missing (0.bias"),
    "weights that run code": (("layers", "nets:colour", "--weights", "evil.pt"), "wants to run code"),
    "not a weights file": (("layers", "nets:colour", "--weights", "file"), ".safetensors, .pt or .pth"),
    "NaN in the weights": (("filters", "nets:broken", 0), "3.weight"),
    "mean of two numbers": (("layers", "nets:colour", "--mean", "1,2"), "1 or 3 numbers"),
    "half an input size": (("layers", "nets:colour", "--input-size", "32x"), "such as 96x128, not '32x'"),
    "an input size of nothing": (("layers", "nets:colour", "--input-size", "0"), "of at least 1 px, not (0, 0)"),
    "std of zero": (("layers", "nets:colour", "--std", "0"), "above 0"),
    "mean that is no number": (("layers", "nets:colour", "--mean", "a"), "not 'a'"),
    "unknown device": (("layers", "nets:colour", "--device", "tpu9"), "cannot be used"),
    "unknown precision": (("filters", "nets:colour", 0, "--precision", "int3"), "fp32, bf16 or auto"),
    "output in a file": (("filters", "nets:colour", 0, "--out", "file/sheets"), "cannot be written"),
    "output of another kind": (("filters", "nets:colour", 0, "--out", "sheet.tif"), "does not end in .png"),
    "film of another kind": (("filters", "nets:colour", 0, "--film", "film.mp4"), "does not end in .gif"),
    "missing photo": (("dream", "nets:colour", "none.jpg", 0), "there is no photo"),
    "empty photo": (("dream", "nets:colour", "empty.jpg", 0), "0 bytes"),
    "photo that is none": (("dream", "nets:colour", "text.jpg", 0), "no image"),
    "accentuating a missing photo": (("accentuate", "nets:colour", "none.jpg", 0), "there is no photo"),
    "accentuating channel 6 of 6": (("accentuate", "nets:colour", "photo.png", ".0", "--channel", 6), "0 to 5"),
    "accentuating a negative channel": (
        ("accentuate", "nets:colour", "photo.png", ".0", "--channel", -1),
        "at least 0",
    ),
    "accentuating a classifier": (("accentuate", "nets:colour", "photo.png", ".7", "--channel", 1), "no map"),
    "an amount of 2": (("accentuate", "nets:colour", "photo.png", ".0", "--amount", "0,2"), "from 0"),
    "an amount that is no number": (("accentuate", "nets:colour", "photo.png", ".0", "--amount", "full"), "'full'"),
    "too small to accentuate": (("accentuate", "builtin/vgg19", "photo.png", "block5_conv1", "--size", 8), "3×8×"),
    "a picture that is no PNG": (("accentuate", "nets:colour", "photo.png", ".0", "--out", "a.jpg"), "end in .png"),
    "activations of a folder": (("activations", "nets:colour", "photos"), "is a folder, not a photo"),
    "activations of no layer": (("activations", "nets:colour", "photo.png", "--layers", "x*"), "no layer matches 'x*'"),
    "activations of channel 6": (("activations", "nets:colour", "photo.png", "--layers", ".0", "--channel", 6), "6"),
    "a heat map of text": (("cam", "nets:colour", "text.jpg"), "no image"),
    "a folder without photos": (("cam", "nets:colour", "bare"), "there is no photo in bare"),
    "a class of no name": (("cam", "nets:colour", "photo.png", "--target", "cat"), "no class names"),
    "a class out of range": (("cam", "nets:colour", "photo.png", "--target", 4), "has 4, 0 to 3"),
    "a layer after pooling": (("cam", "nets:colour", "photo.png", "--layer", ".5"), ".5"),
    "a classifier as a layer": (("cam", "nets:colour", "photo.png", "--layer", ".7"), ".7"),
    "unknown method": (("cam", "nets:colour", "photo.png", "--method", "guided"), "gradcam"),
    "unknown style": (("cam", "nets:colour", "photo.png", "--style", "neon"), "no style 'neon'"),
    "a heat map into a folder": (("cam", "nets:colour", "photo.png", "--out", "bare"), "does not end in .png"),
    "heat maps of a folder into a file": (("cam", "nets:colour", "photos", "--out", "f.png"), "looks like a file"),
    "no class vector": (("cam", "builtin/vgg19", "photo.png"), "class"),
    "kernels of a ReLU": (("kernels", "nets:colour", ".1"), "which has no kernels"),
    "kernels as a GIF": (("kernels", "nets:colour", 0, "--out", "k.gif"), "does not end in .png"),
    "missing argument": (("filters", "nets:colour"), "Missing argument"),
    "unknown option": (("filters", "nets:colour", 0, "--colour"), "No such option"),
    "unknown command": (("paint",), "No such command"),
    "demo into a file": (("demo", "--out", "file"), "is a file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_exit_code_2(case: str, run: Run, tmp_path: Path) -> None:
    arguments, sentence = BAD[case]
    spoil(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    ran = run(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    remarks = ("no normalisation was given", "phosphene: convolution ", "phosphene: gradcam at ")
    message = [line for line in ran.err.splitlines() if not any(remark in line for remark in remarks)]
    assert len(message) == 1, ran.err
    assert message[0].startswith("phosphene: ")
    assert sentence in message[0]
    after = [path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts]
    assert sorted(after) == before, "something was left half-written, or code in a file was run"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_of_commands_names_functions_that_are_there(run: Run, name: str) -> None:
    command = load_command(name)
    assert command.name == name
    assert command.help
    ran = run(name, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert f"phosphene {name} " in ran.out.splitlines()[0]


def test_a_wrong_command_is_told_the_nearest(run: Run) -> None:
    ran = run("filtres", "builtin/vgg19")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "phosphene: No such command 'filtres'. Did you mean 'filters'?; see `phosphene --help`\n"
