"""What the command line prints: paths and JSON to stdout, remarks to stderr. Nothing else prints but `progress.py`."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phosphene.errors import InvalidRequest
from phosphene.storage.atomic import check_writable


def to_stderr(text: str) -> None:
    """Print a remark to stderr."""
    print(f"phosphene: {text}", file=sys.stderr)


def to_stdout(text: object) -> None:
    """Print a result to stdout at once."""
    print(text, flush=True)


def report(paths: Sequence[Path | str], as_json: bool, facts: Mapping[str, Any]) -> None:
    """Print what was written: a path a line, or one JSON object."""
    if as_json:
        to_stdout(json.dumps({"files": [str(path) for path in paths], **facts}))
    else:
        for path in paths:
            to_stdout(path)


def check_target(target: Path, suffix: str, folders: bool = True) -> None:
    """Find out before the work whether the result can be written where the user wants it."""
    is_folder = folders and is_folder_name(target)
    if not is_folder and target.suffix.lower() != suffix:
        also = " or a folder" if folders else ""
        raise InvalidRequest(f"{target} does not end in {suffix}; give a {suffix} file{also}")
    check_writable(target, folder=is_folder)


def is_folder_name(target: Path) -> bool:
    """Return whether a target is a folder: there is one, or the name has no ending."""
    return target.is_dir() or target.suffix == ""
