"""Writing results: every file appears whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phosphene.errors import OutputRefused


def check_writable(target: Path, folder: bool) -> None:
    """Find out before the work whether a file, or files in a folder, can be written there; leaves nothing behind.

    Raises:
        OutputRefused: they cannot.
    """
    if folder and target.exists() and not target.is_dir():
        raise OutputRefused(f"{target} is a file, so no folder can be made there; give another --out")
    if not folder and target.is_dir():
        raise OutputRefused(f"{target} is a folder; give --out the name of a file in it")
    place = target if folder else target.parent
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OutputRefused(f"{target} cannot be written: {error.strerror or error}; give another --out") from error


def write_file(path: Path, content: bytes) -> Path:
    """Write a file by way of a temporary name beside it, making folders as needed, and return its path.

    Raises:
        OutputRefused: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputRefused(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_manifest(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a manifest as JSON; always the last file of a result."""
    return write_file(path, (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())
