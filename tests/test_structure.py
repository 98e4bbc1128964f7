"""The plan of the house: who may import whom, and how long files are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src/phosphene"
FLOORS = (
    ("constants",),
    (
        "errors",
        "version",
        "transforms",
        "colour",
        "leaky",
        "receptive",
        "cams",
        "gradients",
        "allocator",
        "slugs",
        "shelf",
    ),
    ("strongest", "spread", "tiles", "steps", "commands"),
    ("capture", "tracing", "objectives", "parameterizations", "photo", "files", "figure"),
    ("folding", "places", "sources"),
    ("layers", "recipes", "rendered", "heatmap", "store"),
    ("model", "ascent", "positions", "linear", "subpixel", "lowered"),
    ("cropping", "graphed", "precision", "batching"),
    ("shortcuts", "loaders.weights", "loaders.archive", "loaders.mending", "loaders.network"),
    ("loaders.builtin",),
    ("loaders.pytorch",),
    ("loaders.keras",),
    ("loaders",),
    ("render", "explain", "activations", "kernels"),
    ("history", "subject"),
    ("looks",),
    ("subject_keras", "live", "strip", "curves", "budget"),
    ("record",),
    ("record_keras", "record_lightning", "record_transformers"),
    ("photos", "verdict"),
    ("viewing", "page", "sheets"),
    ("crops",),
    ("evidence", "atlas"),
    ("work",),
    ("entries", "estimate"),
    ("runners",),
    ("runners.local", "runners.ray"),
    ("runners.ray_evidence",),
    ("running", "report"),
    ("gallery", "trainings"),
    ("views",),
    ("portrait",),
    ("demo",),
    ("web",),
    ("web.networks", "web.wish"),
    ("web.pages", "web.guard", "web.studio", "web.visitor"),
    ("web.site", "web.live"),
    ("web.export", "web.server"),
    ("cli.terminal",),
    ("cli.options",),
    ("cli.rendering", "cli.photos", "cli.training", "cli.atlas", "cli.web"),
    ("cli",),
    ("", "__main__"),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def name_of(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix("__init__").rstrip(".")


def imports_of(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, by their names inside it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "phosphene":
            base = node.module.removeprefix("phosphene").lstrip(".")
            inner = [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
            found |= {one for one in inner if one in FLOOR} or {base}
        elif isinstance(node, ast.Import):
            found |= {one.name.removeprefix("phosphene.") for one in node.names if one.name.startswith("phosphene.")}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_only_from_floors_below(path: Path) -> None:
    name = name_of(path)
    assert name in FLOOR, f"{name} has no floor yet"
    for imported in imports_of(path):
        assert FLOOR[imported] < FLOOR[name], f"{name} imports {imported}, which is not below it"


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
