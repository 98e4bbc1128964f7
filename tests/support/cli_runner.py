"""Running the command line in a folder of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from phosphene import cli


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
