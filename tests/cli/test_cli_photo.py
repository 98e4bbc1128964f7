"""The commands that look at a photo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from cli_runner import NETS, Run, command_line, gradient
from phosphene.inspection.attribution_methods import CAUTIONS


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Return a function that runs the command line in a folder of its own, where `nets.py` lies."""
    return command_line(monkeypatch, capsys, tmp_path, NETS)


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


def test_a_command_has_one_bar_and_none_when_quiet(run: Run, tmp_path: Path, shown_bars: list[str]) -> None:
    (tmp_path / "album").mkdir()
    for name in ("photo.png", "album/1.png", "album/2.png"):
        gradient(tmp_path / name, 40, 40)
    for quiet in ((), ("--quiet",)):
        run("activations", "nets:colour", "photo.png", "--layers", ".3", *quiet)
        run("cam", "nets:colour", "photo.png", "--method", "smoothgrad", *quiet)
        run("cam", "nets:colour", "album", "--method", "integrated-gradients", "--input-size", 32, *quiet)
        assert shown_bars == ["activations", "smoothgrad", "integrated-gradients"]


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
    assert [picture["file"] for picture in manifest["photos"]] == names
    assert list(manifest["refused"]) == ["5.jpg"]
    alone = json.loads(run("cam", "nets:colour", "album/7.png", "--input-size", 32, "--json").out)
    assert alone["strongest"] == pytest.approx(manifest["photos"][7]["strongest"], rel=1e-4)
