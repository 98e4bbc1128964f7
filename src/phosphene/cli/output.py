"""What the command line prints: paths and JSON to stdout, progress and remarks to stderr. Nothing else prints."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from phosphene.errors import InvalidRequest
from phosphene.storage.atomic import check_writable

PERIOD = 600  # seconds over which a rate is taken: the jobs of an atlas come in minutes apart


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


class Rate(ProgressColumn):
    """The units done per second or, if that is below 1, per minute."""

    def render(self, task: Task) -> Text:
        if not task.speed:
            return Text("")
        return Text(f"{task.speed:,.1f}/s" if task.speed >= 1 else f"{60 * task.speed:.1f}/min")


@contextmanager
def progress(what: str, unit: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a bar with the rate and the time left on stderr, if that is a terminal.

    Yields `advance(done, total)`: so many units more are done, of so many in all.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        Rate(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        speed_estimate_period=PERIOD,
        disable=quiet or not console.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, total=total, advance=done)


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
