"""Writing results: every file appears whole or not at all."""

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from phosphene.errors import OutputRefused


def check_writable(target: Path, folder: bool) -> None:
    """Check before the work that a file, or files in a folder, can be written; leaves nothing behind.

    Raises:
        OutputRefused: they cannot.
    """
    parent = target if folder else target.parent
    try:
        if folder and target.exists() and not target.is_dir():
            raise OutputRefused(f"{target} is a file, so no folder can be made there; give another place")
        if not folder and target.is_dir():
            raise OutputRefused(f"{target} is a folder; give --out the name of a file in it")
        with suppress(FileNotFoundError):
            temporary_name(target).stat()  # fails if a name is too long, or below a file
        while not os.path.lexists(parent):
            parent = parent.parent
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OutputRefused:
        raise
    except (OSError, ValueError) as error:
        raise cannot_write(target, error) from error


def write_file(path: Path, content: bytes) -> Path:
    """Write a file under a temporary name, then rename it, making folders as needed, and return its path.

    Raises:
        OutputRefused: it cannot be written.
    """
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise cannot_write(path, error) from error
    return path


def temporary_name(path: Path) -> Path:
    """Return the name of a file until it is complete: hidden, in the same folder, different in each process."""
    return path.parent / f".{path.name}.{os.getpid()}.part"


def cannot_write(path: Path, error: Exception) -> OutputRefused:
    """Return the refusal of a path; a ValueError comes from a name that no file can have."""
    reason = getattr(error, "strerror", None) or str(error)
    return OutputRefused(f"{path} cannot be written: {reason}; give another place")


def write_manifest(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a manifest as JSON; always the last file of a result."""
    return write_file(path, (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())
