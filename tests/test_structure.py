"""The plan of the house: how long files are, and who hooks and prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src/phosphene"


def name_of(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix("__init__").rstrip(".")


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_longer_than_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_capture_hooks_and_only_the_command_line_prints(path: Path) -> None:
    text = path.read_text()
    assert path.name == "capture.py" or "register_" not in text
    assert name_of(path).startswith("cli.") or not re.search(r"\bprint\(", text)


def test_import_loads_nothing_heavy() -> None:
    code = "import sys, phosphene; print([one for one in ('keras', 'ray', 'timm', 'starlette') if one in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
