"""The command `demo`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli_runner import NETS, Run, command_line
from phosphene.cli.demonstration import SHEETS


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Return a function that runs the command line in a folder of its own, where `nets.py` lies."""
    return command_line(monkeypatch, capsys, tmp_path, NETS)


@pytest.mark.slow
def test_demo_writes_a_sheet_a_block(run: Run) -> None:
    ran = run("demo", "--out", "pictures")
    seen = [f"activations/activations_block{block}_relu1.png" for block in range(1, 6)]
    sheets = [f"{sheet.model.removeprefix('builtin/')}_{layer}.png" for sheet in SHEETS for layer in sheet.layers]
    names = [*sheets, *seen, "activations/summary.png", "activations/manifest.json", "heat_map.png"]
    assert ran.out.split() == [f"pictures/{name}" for name in names]
    assert "phosphene serve pictures" in ran.err
    assert json.loads(Path("pictures/store/store.json").read_text()) == {"format": 1}
