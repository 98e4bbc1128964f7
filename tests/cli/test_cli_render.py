"""The commands that render: what they write, what they print, and what is kept when they are stopped."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from cli_runner import NETS, QUICK, Run, command_line
from phosphene.cli import render as rendering
from phosphene.rendering.gradient_ascent import Frame
from phosphene.rendering.render import render


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Return a function that runs the command line in a folder of its own, where `nets.py` lies."""
    return command_line(monkeypatch, capsys, tmp_path, NETS)


def test_filters_writes_one_sheet_and_prints_its_path(run: Run, tmp_path: Path) -> None:
    ran = run("filters", "nets:colour", 1, "--channels", "0:3,9", *QUICK, "--out", "sheet.png")
    assert (ran.code, ran.out) == (0, "sheet.png\n")
    assert "convolution 1 is .3" in ran.err
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 2 * 16 * 24  # two by two, 24 times as large
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
    assert [picture["file"] for picture in manifest["pictures"]] == names[:2]
    with Image.open(tmp_path / "sheets" / names[1]) as picture:
        assert json.loads(picture.text["phosphene"])["picture"] == "filter_7"  # type: ignore[attr-defined]


def test_facets_are_a_row_of_the_sheet_and_opposites_have_names_of_their_own(run: Run, tmp_path: Path) -> None:
    ran = run("filters", "nets:colour", ".3", "--channels", "5,7,9", *QUICK, "--facets", 2, "--opposite")
    assert ran.out == "layer_.3_opposite.png\n"
    with Image.open(tmp_path / "layer_.3_opposite.png") as sheet:
        assert sheet.height > sheet.width  # three rows of two, under a caption
        metadata = json.loads(sheet.text["phosphene"])  # type: ignore[attr-defined]
    assert (metadata["facets"], metadata["opposite"]) == (2, True)
    run("filters", "nets:colour", ".3", "--channels", "5", *QUICK, "--facets", 2, "--out", "sheets")
    names = ["grid.png", "layer_.3_filter_5.png", "layer_.3_filter_5_facet_1.png", "manifest.json"]
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == names
    assert run("filters", "nets:colour", ".3", *QUICK, "--facets", 0).code == 2


def test_by_default_the_first_64_filters_or_all_there_are(run: Run) -> None:
    printed = [json.loads(run("filters", "nets:colour", layer, *QUICK, "--json").out) for layer in (0, 1)]
    assert [len(sheet["pictures"]) for sheet in printed] == [6, 64]
    assert printed[0]["files"] == ["layer_.0.png"]


def test_all_channels_and_a_film(run: Run, tmp_path: Path) -> None:
    ran = run("filters", "nets:colour", 0, "--channels", "all", "--size", 16, "--steps", 30, "--film", "film.gif")
    assert ran.out.split() == ["layer_.0.png", "film.gif"]
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 25


FLAT = """
import torch
from torch import nn

def net():
    convolution = nn.Conv2d(3, 3, 3, padding=1)
    with torch.no_grad():
        convolution.weight.copy_(torch.tensor([1.0, 1.0, 0.1]).view(3, 1, 1, 1).expand(3, 3, 3, 3))
        convolution.weight[2] *= torch.tensor([-1.0, 0.0, 1.0])
        convolution.bias.copy_(torch.tensor([0.0, -100.0, 0.0]))
    return nn.Sequential(convolution, nn.ReLU())
"""


def test_dead_and_plain_filters_are_named_each_in_a_sentence(run: Run, tmp_path: Path) -> None:
    (tmp_path / "flat.py").write_text(FLAT)
    ran = run("filters", "flat:net", ".1", "--size", 16, "--steps", 20, "--json")
    assert [(picture["dead"], picture["plain"]) for picture in json.loads(ran.out)["pictures"]] == [
        (False, True),  # white
        (True, False),
        (False, False),  # an edge
    ]
    assert "dead, crossed out in the grid: filter_1" in ran.err
    assert "alive, but a flat colour excites them as much as any pattern, marked plain in the grid: filter_0" in ran.err


def test_objectives(run: Run) -> None:
    for objective, layer, names in (
        ("neuron", 1, ["filter_2"]),
        ("logit", ".7", ["class_2"]),
        ("layer", 1, ["layer"]),
    ):
        ran = run("filters", "nets:colour", layer, "--objective", objective, "--channels", "2", *QUICK, "--json")
        assert [picture["picture"] for picture in json.loads(ran.out)["pictures"]] == names


def test_the_same_command_twice_gives_the_same_bytes(run: Run, tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        run("filters", "nets:colour", 0, "--channels", "0:2", *QUICK, "--out", name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    run("filters", "nets:colour", 0, "--channels", "0:2", *QUICK, "--seed", 1, "--out", "three.png")
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "three.png").read_bytes()


def test_grey_networks_get_grey_pictures(run: Run, tmp_path: Path) -> None:
    ran = run("filters", "nets:grey", 0, "--channels", "0", "--steps", 2, "--out", "grey")
    assert ran.code == 0
    with Image.open(tmp_path / "grey/layer_.0_filter_0.png") as picture:
        assert (picture.mode, picture.size) == ("L", (56, 56))  # twice the 28 px that the network takes


def test_dream_keeps_the_shape_of_the_photo(run: Run, tmp_path: Path) -> None:
    Image.linear_gradient("L").resize((60, 40)).convert("RGB").save(tmp_path / "photo.png")
    ran = run("dream", "nets:colour", "photo.png", 1, "--steps", 2, "--out", "dreamt.png")
    assert (ran.code, ran.out) == (0, "dreamt.png\n")
    with Image.open(tmp_path / "dreamt.png") as dreamt, Image.open(tmp_path / "photo.png") as photo:
        assert dreamt.size == (60, 40)
        assert dreamt.tobytes() != photo.tobytes()


def test_accentuate_says_how_much_the_filter_answers_before_and_after(run: Run, tmp_path: Path) -> None:
    Image.linear_gradient("L").resize((60, 40)).convert("RGB").save(tmp_path / "photo.png")
    ran = run("accentuate", "nets:colour", "photo.png", 1, "--channel", 3, "--amount", "0,1")
    assert (ran.code, ran.out) == (0, "accentuated.png\n")
    ran = run("accentuate", "nets:colour", "photo.png", 1, "--channel", 3, "--amount", "0,1", "--json")
    facts = json.loads(ran.out)
    before, (at_0, at_1) = facts["before"], facts["after"]
    assert before == at_0 == facts["pictures"][0]["score"] != at_1
    assert f".3, mean of filter 3: {before:.4g} before, {at_0:.4g}, {at_1:.4g} after" in ran.err
    assert [row["picture"] for row in facts["pictures"]] == ["filter_3_amount_0", "filter_3_amount_1"]
    with Image.open(tmp_path / "accentuated.png") as sheet, Image.open(tmp_path / "photo.png") as start:
        assert sheet.size == (125, 40)
        assert sheet.crop((0, 0, 60, 40)).tobytes() == start.tobytes()
        assert sheet.crop((65, 0, 125, 40)).tobytes() != start.tobytes()


def test_accentuate_without_a_channel_is_a_caricature_of_the_layer(run: Run, tmp_path: Path) -> None:
    Image.linear_gradient("L").resize((60, 40)).convert("RGB").save(tmp_path / "photo.png")
    ran = run("accentuate", "nets:colour", "photo.png", 0, "--out", "all.png", "--json")
    facts = json.loads(ran.out)
    assert facts["files"] == ["all.png"]
    assert facts["before"] == pytest.approx(1)
    assert facts["after"][0] > 1
    assert [row["picture"] for row in facts["pictures"]] == ["caricature"]


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

    monkeypatch.setattr(rendering, "render", partial(render, watch=stop_in_the_second_batch))
    ran = run("filters", "nets:colour", 1, "--channels", "0:6", "--batch", 2, *QUICK, "--out", "kept")
    assert ran.code == 1
    assert message in ran.err
    assert sorted(path.name for path in (tmp_path / "kept").glob("layer*")) == [
        "layer_.3_filter_0.png",
        "layer_.3_filter_1.png",
    ]
    assert len(json.loads((tmp_path / "kept/manifest.json").read_text())["pictures"]) == 2


def test_a_command_has_one_bar_and_none_when_quiet(run: Run, tmp_path: Path, shown_bars: list[str]) -> None:
    Image.linear_gradient("L").resize((60, 40)).convert("RGB").save(tmp_path / "photo.png")
    for quiet in ((), ("--quiet",)):
        run("filters", "nets:colour", 1, "--channels", "0:3", *QUICK, "--out", "sheet.png", *quiet)
        run("dream", "nets:colour", "photo.png", 1, "--steps", 2, "--out", "dreamt.png", *quiet)
        assert shown_bars == ["3 pictures", "1 picture"]


def test_the_output_is_checked_before_the_work(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("rendered although the result cannot be written")

    monkeypatch.setattr(rendering, "render", work)
    (tmp_path / "file").touch()
    assert run("filters", "nets:colour", 0, "--out", "file/sheet.png").code == 2
