"""Running the command line in a folder of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from phosphene import cli

QUICK = ("--size", 16, "--steps", 2)
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


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


def command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, nets: str, name: str = "nets"
) -> Run:
    """Return a function that runs the command line in a folder, where a module of networks lies."""
    monkeypatch.chdir(folder)
    (folder / f"{name}.py").write_text(nets)
    monkeypatch.delitem(sys.modules, name, raising=False)

    def command(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["phosphene", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Ran(int(str(ended.value.code or 0)), captured.out, captured.err)

    return command


def gradient(path: Path, width: int, height: int) -> None:
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(path)
