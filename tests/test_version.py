"""The version can be read without importing anything."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import phosphene
from phosphene import version


def test_the_version_is_that_of_its_file_which_imports_nothing() -> None:
    path = Path(version.__file__)
    assert "import" not in re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)
    assert runpy.run_path(str(path))["__version__"] == phosphene.__version__ == version.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version.__version__)
