"""The command line: what it writes, what it prints where, and what bad input gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cli_runner import Run, command_line
from phosphene.cli import COMMANDS, load_command
from phosphene.cli import render as rendering
from phosphene.cli.demonstration import SHEETS
from phosphene.inspection.attribution_methods import CAUTIONS
from phosphene.rendering.gradient_ascent import Frame

NETS = '''
from torch import nn


def colour():
    """Two convolutions and a classifier, for pictures of any size."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(6, 70, 3, padding=1),
        nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(70, 4),
    )


def grey():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 28 * 28, 2))


def broken():
    net = colour()
    nn.init.constant_(net[3].weight, float("nan"))
    return net
'''


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Return a function that runs the command line in a folder of its own, where `nets.py` lies."""
    return command_line(monkeypatch, capsys, tmp_path, NETS)


QUICK = ("--size", 16, "--steps", 2)


def test_layers_prints_a_row_a_layer(run: Run) -> None:
    ran = run("layers", "nets:colour", "--input-size", 32)
    assert ran.code == 0
    rows = [line.split() for line in ran.out.splitlines()]
    assert rows[1][:4] == [".0", "Conv2d", "6", "32×32"]
    assert rows[4][:4] == [".3", "Conv2d", "70", "16×16"]
    assert "8 / 2 / 3" in ran.out  # 3×3, pooled by 2, 3×3 at stride 2: 3 + 1 + 2·2 pixels


def test_layers_as_json(run: Run) -> None:
    ran = run("layers", "nets:colour", "--input-size", 32, "--json")
    printed = json.loads(ran.out)
    assert printed["model"] == "nets:colour"
    assert json.loads(run("layers", "nets:colour", "--input-size", "32x48", "--json").out)["layers"][0]["size"] == [
        32,
        48,
    ]
    assert printed["layers"][3]["receptive_field"] == {"size": [8, 8], "stride": [2.0, 2.0], "padding": [3.0, 3.0]}


def test_filters_writes_one_sheet_and_prints_its_path(run: Run, tmp_path: Path) -> None:
    ran = run("filters", "nets:colour", 1, "--channels", "0:3,9", *QUICK, "--out", "sheet.png")
    assert (ran.code, ran.out) == (0, "sheet.png\n")
    assert "convolution 1 is .3" in ran.err
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (16 * 2 + 5, 16 * 2 + 5)
        metadata = json.loads(sheet.text["phosphene"])  # type: ignore[attr-defined]
    assert metadata["model"] == "nets:colour"
    assert metadata["layers"] == [".3"]
    assert metadata["objective"]["channels"] == [0, 1, 2, 9]
    assert (metadata["recipe"]["name"], metadata["recipe"]["seed"]) == ("fourier", 0)


def test_filters_into_a_folder_writes_a_file_a_filter(run: Run, tmp_path: Path) -> None:
    ran = run("filters", "nets:colour", ".3", "--channels", "5,7", *QUICK, "--out", "sheets", "--recipe", "rms")
    names = ["layer_.3_filter_5.png", "layer_.3_filter_7.png", "grid.png", "manifest.json"]
    assert ran.out.split() == [f"sheets/{name}" for name in names]
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == sorted(names)
    manifest = json.loads((tmp_path / "sheets/manifest.json").read_text())
    assert [one["file"] for one in manifest["pictures"]] == names[:2]
    with Image.open(tmp_path / "sheets" / names[1]) as picture:
        assert json.loads(picture.text["phosphene"])["picture"] == "filter_7"  # type: ignore[attr-defined]


def test_by_default_the_first_64_filters_or_all_there_are(run: Run) -> None:
    printed = [json.loads(run("filters", "nets:colour", layer, *QUICK, "--json").out) for layer in (0, 1)]
    assert [len(sheet["pictures"]) for sheet in printed] == [6, 64]
    assert printed[0]["files"] == ["layer_.0.png"]


def test_all_channels_and_a_film(run: Run, tmp_path: Path) -> None:
    ran = run("filters", "nets:colour", 0, "--channels", "all", "--size", 16, "--steps", 30, "--film", "film.gif")
    assert ran.out.split() == ["layer_.0.png", "film.gif"]
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 25


def test_objectives(run: Run) -> None:
    for objective, layer, names in (
        ("neuron", 1, ["filter_2"]),
        ("logit", ".7", ["class_2"]),
        ("layer", 1, ["layer"]),
    ):
        ran = run("filters", "nets:colour", layer, "--objective", objective, "--channels", "2", *QUICK, "--json")
        assert [one["picture"] for one in json.loads(ran.out)["pictures"]] == names


def test_the_same_command_twice_gives_the_same_bytes(run: Run, tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        run("filters", "nets:colour", 0, "--channels", "0:2", *QUICK, "--out", name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    run("filters", "nets:colour", 0, "--channels", "0:2", *QUICK, "--seed", 1, "--out", "three.png")
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "three.png").read_bytes()


def test_grey_networks_get_grey_pictures(run: Run, tmp_path: Path) -> None:
    ran = run("filters", "nets:grey", 0, "--channels", "0", "--steps", 2, "--out", "grey.png")
    assert ran.code == 0
    with Image.open(tmp_path / "grey.png") as sheet:
        assert (sheet.mode, sheet.size) == ("L", (56, 56))  # twice the 28 px that the network takes


def test_dream_keeps_the_shape_of_the_photo(run: Run, tmp_path: Path) -> None:
    Image.linear_gradient("L").resize((60, 40)).convert("RGB").save(tmp_path / "photo.png")
    ran = run("dream", "nets:colour", "photo.png", 1, "--steps", 2, "--out", "dreamt.png")
    assert (ran.code, ran.out) == (0, "dreamt.png\n")
    with Image.open(tmp_path / "dreamt.png") as dreamt, Image.open(tmp_path / "photo.png") as photo:
        assert dreamt.size == (60, 40)
        assert dreamt.tobytes() != photo.tobytes()


def test_random_weights_are_said_to_be_random(run: Run) -> None:
    assert "random weights" in run("layers", "torchvision/squeezenet1_1", "--weights", "none").err
    assert run("layers", "torchvision/squeezenet1_1", "--weights", "none", "--quiet").err == ""


@pytest.mark.parametrize(
    ("reason", "message"),
    [(KeyboardInterrupt(), "stopped with 2 of 6 done"), (ValueError("no room left."), "no room left; 2 of 6 are done")],
    ids=["Ctrl-C", "an error"],
)
def test_what_stops_a_render_leaves_what_is_finished(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reason: BaseException, message: str
) -> None:
    def stop_in_the_second_batch(frame: Frame) -> None:
        if int(frame.items[0]) == 2 and frame.step == 1:
            raise reason

    monkeypatch.setattr(rendering, "progress_of_frames", lambda *_: _Given(stop_in_the_second_batch))
    ran = run("filters", "nets:colour", 1, "--channels", "0:6", "--batch", 2, *QUICK, "--out", "kept")
    assert ran.code == 1
    assert message in ran.err
    assert sorted(path.name for path in (tmp_path / "kept").glob("layer*")) == [
        "layer_.3_filter_0.png",
        "layer_.3_filter_1.png",
    ]
    assert len(json.loads((tmp_path / "kept/manifest.json").read_text())["pictures"]) == 2


class _Given:
    """A context that hands out what it was given."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __enter__(self) -> object:
        return self.value

    def __exit__(self, *error: object) -> None:
        pass


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


def gradient(path: Path, width: int, height: int) -> None:
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(path)


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


def test_the_output_is_checked_before_the_work(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("rendered although the result cannot be written")

    monkeypatch.setattr(rendering, "render", work)
    (tmp_path / "file").touch()
    assert run("filters", "nets:colour", 0, "--out", "file/sheet.png").code == 2


@pytest.mark.slow
def test_demo_writes_a_sheet_a_block(run: Run) -> None:
    ran = run("demo", "--out", "pictures")
    seen = [f"activations/activations_block{block}_relu1.png" for block in range(1, 6)]
    sheets = [f"{sheet.model.removeprefix('builtin/')}_{layer}.png" for sheet in SHEETS for layer in sheet.layers]
    names = [*sheets, *seen, "activations/summary.png", "activations/manifest.json", "heat_map.png"]
    assert ran.out.split() == [f"pictures/{name}" for name in names]
    assert "phosphene serve pictures" in ran.err
    assert json.loads(Path("pictures/store/store.json").read_text()) == {"format": 1}


def test_activations_writes_a_grid_a_layer_and_a_summary(run: Run, tmp_path: Path) -> None:
    gradient(tmp_path / "photo.png", 60, 40)
    ran = run("activations", "nets:colour", "photo.png", "--layers", ".[03]", "--input-size", 32)
    names = ["activations_.0.png", "activations_.3.png", "summary.png", "manifest.json"]
    assert (ran.code, ran.out.split()) == (0, [f"activations/{name}" for name in names])
    assert sorted(path.name for path in (tmp_path / "activations").iterdir()) == sorted(names)
    printed = json.loads(run("activations", "nets:colour", "photo.png", "--layers", ".3", "--json").out)
    assert [(row["layer"], row["channels"]) for row in printed["layers"]] == [(".3", 70)]


def test_cam_lays_the_heat_on_the_photo_and_says_the_classes(run: Run, tmp_path: Path) -> None:
    gradient(tmp_path / "photo.png", 60, 40)
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\n")
    ran = run("cam", "nets:colour", "photo.png", "--labels", "names.txt", "--target", "bee", "--style", "jet")
    assert (ran.code, ran.out) == (0, "cam.png\n")
    assert "gradcam at" in ran.err
    shares = [float(line.split()[1].rstrip("%")) for line in ran.err.splitlines() if "%" in line]
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(100, abs=0.3)
    with Image.open(tmp_path / "cam.png") as drawn:
        metadata = json.loads(drawn.text["phosphene"])  # type: ignore[attr-defined]
        assert drawn.size == (60, 40)
    assert metadata["model"] == "nets:colour"
    assert metadata["method"] == "gradcam"


def test_cam_says_what_to_mind_about_a_method(run: Run, tmp_path: Path) -> None:
    gradient(tmp_path / "photo.png", 60, 40)
    assert CAUTIONS["eigencam"] in run("cam", "nets:colour", "photo.png", "--method", "eigencam").err
    assert "gradcam: " not in run("cam", "nets:colour", "photo.png").err


def test_cam_of_a_folder_skips_what_is_no_photo_and_says_so(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "album"
    folder.mkdir()
    for number in range(10):
        gradient(folder / f"{number}.png", 40 + number, 40)
    (folder / "5.jpg").write_text("not a picture")
    (folder / "notes.txt").write_text("not meant")
    ran = run("cam", "nets:colour", "album", "--out", "heat", "--input-size", 32)
    assert ran.code == 1
    assert "5.jpg is no image" in ran.err
    assert "1 of 11 photos could not be read" in ran.err
    names = [f"{number}.png" if number != 5 else "5.png.png" for number in range(10)]
    assert ran.out.split() == [f"heat/{name}" for name in [*names, "manifest.json"]]
    manifest = json.loads((tmp_path / "heat/manifest.json").read_text())
    assert [one["file"] for one in manifest["photos"]] == names
    assert list(manifest["refused"]) == ["5.jpg"]
    alone = json.loads(run("cam", "nets:colour", "album/7.png", "--input-size", 32, "--json").out)
    assert alone["strongest"] == pytest.approx(manifest["photos"][7]["strongest"], rel=1e-4)


def test_kernels_writes_one_sheet(run: Run, tmp_path: Path) -> None:
    ran = run("kernels", "nets:colour", 0)
    assert (ran.code, ran.out) == (0, "kernels_.0.png\n")
    assert "convolution 0 is .0" in ran.err
    with Image.open(tmp_path / "kernels_.0.png") as sheet:
        assert json.loads(sheet.text["phosphene"])["model"] == "nets:colour"  # type: ignore[attr-defined]


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
