"""The plan of the house, where no tool checks it: `make check` has the import contracts and the rule on printing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src/phosphene"
HEAVY = ("torch", "keras", "ray", "timm", "starlette", "uvicorn", "jinja2", "anyio", "matplotlib")
LOADED = f"print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
CODE = f"""
import json, sys
import phosphene, phosphene.cli
{LOADED}
sys.argv = ["phosphene", "--help"]
try: phosphene.cli.main()
except SystemExit: {LOADED}
for name in dir(phosphene): getattr(phosphene, name)
{LOADED}
"""


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_capture_hooks(path: Path) -> None:
    assert path.name == "capture.py" or "register_" not in path.read_text()


def test_import_and_help_load_nothing_heavy_and_the_library_only_torch() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    imported, after_help, library = lines[0], lines[-2], lines[-1]
    assert json.loads(imported) == json.loads(after_help) == []
    assert json.loads(library) == ["torch"]
    assert any(line.split()[:1] == ["serve"] for line in lines)
