"""The progress bar of what takes long: on stderr if that is a terminal, or under the cell of a notebook.

A function counts in a `Bar`. One thread draws all bars of the process, one per row, so that functions with a bar may
call one another and run in several threads. Until a bar is `DELAY` seconds old nothing is drawn, nor rich imported.
"""

from __future__ import annotations

import atexit
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from html import escape
from multiprocessing import parent_process
from threading import Condition, Thread
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Task, TaskID

DELAY = 0.5  # seconds before a bar is drawn
INTERVALS = (0.25, 2.0)  # seconds until it is drawn again, least and most
SHARE = 0.01  # of the time that may go into drawing, as far as these intervals allow
PERIOD = 600  # seconds over which a rate is taken: the jobs of an atlas come in minutes apart


@dataclass(eq=False)
class Bar:
    """A count that its owner raises: `done` of `total` units; the total is 0 until it is known."""

    description: str
    unit: str
    done: int = 0
    total: int = 0
    began: float = field(default_factory=monotonic)
    ended: bool = False


Draw = Callable[[Sequence[Bar]], None]
Screen = Callable[[], AbstractContextManager[Draw]]  # what bars can be drawn on


@contextmanager
def progress_bar(description: str, unit: str, progress: bool = True) -> Iterator[Bar]:
    """Yield a bar, which is shown with its rate and the time left for as long as the context lasts.

    Nothing is shown if `progress` is False, if nobody watches (see `watched_screen`), or if the work takes less than
    `DELAY` seconds.

    Example:
        >>> with progress_bar("export", "files") as bar:
        ...     bar.total = len(paths)
        ...     for path in paths:
        ...         write(path)
        ...         bar.done += 1
    """
    bar = Bar(description, unit)
    screen = watched_screen() if progress else None
    try:
        if screen:
            LIVE.add(bar, screen)
        yield bar
    finally:
        bar.ended = True
        if screen:
            LIVE.remove_ended()


class LiveBars:
    """The bars of this process, and the thread that draws them while there are any."""

    def __init__(self) -> None:
        self.bars: dict[Bar, Screen] = {}
        self.changed = Condition()
        self.thread: Thread | None = None

    def add(self, bar: Bar, screen: Screen) -> None:
        """Have a bar drawn; all are drawn on the screen of the first."""
        with self.changed:
            self.bars[bar] = screen
            if self.thread is None:
                thread = Thread(target=self.draw, name="phosphene-progress", daemon=True)
                with suppress(RuntimeError):  # no more threads may start: the work goes on without a bar
                    thread.start()
                    self.thread = thread

    def remove_ended(self) -> None:
        """Return when the screen is as before, if the last bar has ended."""
        with self.changed:
            thread = None if self.drop_ended() else self.thread
            self.changed.notify_all()
        if thread:
            thread.join()

    def drop_ended(self) -> dict[Bar, Screen]:
        """Forget the bars that have ended, and return the others."""
        self.bars = {bar: screen for bar, screen in self.bars.items() if not bar.ended}
        return self.bars

    def draw(self) -> None:
        """Draw the bars that are old enough, until there are none left; in the thread."""
        with self.changed:
            try:
                with suppress(Exception), ExitStack() as screens:  # whatever becomes of its bar, the work goes on
                    draw: Draw | None = None
                    while self.drop_ended():
                        grown = [bar for bar in self.bars if monotonic() - bar.began >= DELAY]
                        if grown and draw is None:
                            draw = screens.enter_context(self.bars[grown[0]]())
                        began = monotonic()
                        if draw:
                            draw(grown)
                        self.changed.wait(min(max(INTERVALS[0], (monotonic() - began) / SHARE), INTERVALS[1]))
            finally:
                self.thread = None

    def close(self) -> None:
        """End all bars; at the exit of the process some are left if a generator was not used up."""
        for bar in tuple(self.bars):
            bar.ended = True
        self.remove_ended()


LIVE = LiveBars()
atexit.register(LIVE.close)


def watched_screen() -> Screen | None:
    """Return where bars are drawn, None if nobody would see them.

    That is the case where stderr is no terminal, in a notebook that runs by itself (nbconvert, papermill), in the
    processes of `multiprocessing`, and while another program's live display of rich has the terminal.
    """
    if parent_process() is not None:
        return None
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)
    kernel = getattr(get_ipython(), "kernel", None)
    if kernel is not None:
        return notebook_screen if getattr(kernel, "_allow_stdin", True) else None  # False: nobody could answer input()
    foreign = hasattr(sys.stderr, "rich_proxied_file") and not LIVE.bars
    return partial(terminal_screen, sys.stderr) if is_terminal(sys.stderr) and not foreign else None


def is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal; a program without a console has None in place of a stream."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # ValueError: it was closed
        return False


@contextmanager
def terminal_screen(stream: Any) -> Iterator[Draw]:
    """Yield the function that draws bars in a terminal; they vanish at the end."""
    from rich.console import Console

    rows = Rows(Console(file=stream))
    with prints_above(rows.progress.console), rows.progress:
        yield rows.update


@contextmanager
def prints_above(console: Console) -> Iterator[None]:
    """Have what is printed meanwhile appear above the bars: on stdout and stderr, if they are terminals.

    What is printed into a file or a pipe goes there as ever, which rich alone would send to the terminal.
    """
    from rich.file_proxy import FileProxy

    streams = {name: getattr(sys, name) for name in ("stdout", "stderr") if is_terminal(getattr(sys, name))}
    proxies = {name: FileProxy(console, stream) for name, stream in streams.items()}
    for name, proxy in proxies.items():
        setattr(sys, name, proxy)
    try:
        yield
    finally:
        for name, proxy in proxies.items():
            proxy.flush()
            if getattr(sys, name) is proxy:  # else somebody has replaced it since
                setattr(sys, name, streams[name])


@contextmanager
def notebook_screen() -> Iterator[Draw]:
    """Yield the function that draws bars under the cell of a notebook; they vanish at the end.

    They are HTML of their own, since rich and tqdm need ipywidgets for bars that move.
    """
    from IPython.display import display
    from rich.console import Console

    rows = Rows(Console(file=io.StringIO(), force_jupyter=False))
    handle = display({"text/html": "", "text/plain": ""}, raw=True, display_id=True)

    def draw(bars: Sequence[Bar]) -> None:
        rows.update(bars)
        handle.update({"text/html": rows.html(), "text/plain": rows.text()}, raw=True)

    try:
        yield draw
    finally:
        handle.update({"text/html": "", "text/plain": ""}, raw=True)


class Rows:
    """The rows of bars: each has a description, the bar itself, and then how many, of what, how fast, the time left."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        unit, speed = (TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("unit", "rate"))
        self.numbers = (MofNCompleteColumn(), unit, speed, TimeRemainingColumn())
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *self.numbers,
            console=console,
            transient=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            speed_estimate_period=PERIOD,
        )
        self.tasks: dict[Bar, TaskID] = {}

    def update(self, bars: Sequence[Bar]) -> None:
        """Draw these bars."""
        for bar in [bar for bar in self.tasks if bar not in bars]:
            self.progress.remove_task(self.tasks.pop(bar))
        for bar in bars:
            total = bar.total or None
            if bar not in self.tasks:
                self.tasks[bar] = self.progress.add_task(
                    bar.description, total=total, completed=bar.done, unit=bar.unit, rate=""
                )
            self.progress.update(self.tasks[bar], total=total, completed=bar.done)
        for task in self.progress.tasks:
            task.fields["rate"] = rate(task.speed)
        self.progress.refresh()

    def text(self) -> str:
        """Return the rows without the bars."""
        return "\n".join(f"{task.description} {self.count(task)}" for task in self.progress.tasks)

    def count(self, task: Task) -> str:
        """Return the numbers of a row."""
        return " ".join(str(column.render(task)) for column in self.numbers)

    def html(self) -> str:
        """Return the rows as HTML."""
        rows = []
        for task in self.progress.tasks:
            value = "" if task.total is None else f' value="{task.completed}" max="{task.total}"'
            text = escape(task.description), escape(self.count(task))
            rows.append(f"<div><label>{text[0]} <progress{value}></progress> {text[1]}</label></div>")
        return "".join(rows)


def rate(speed: float | None) -> str:
    """Return the units done per second or, if that is below 1, per minute.

    >>> rate(0.05)
    '3.0/min'
    """
    if not speed:
        return ""
    return f"{speed:,.1f}/s" if speed >= 1 else f"{60 * speed:.1f}/min"
