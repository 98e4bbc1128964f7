"""A terminal that remembers what stands on it, so that tests can tell what a person sees."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from time import monotonic, sleep

import pytest

from phosphene import progress

SEQUENCE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")
ENVIRONMENT = {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}


class FakeTerminal(io.StringIO):
    """A stream that is a terminal; `broken` makes it fail like one whose window was closed."""

    broken = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.broken:
            raise OSError(5, "Input/output error")
        return super().write(text)

    @property
    def cursor_is_visible(self) -> bool:
        return self.getvalue().count("\x1b[?25l") == self.getvalue().count("\x1b[?25h")

    def lines(self) -> list[str]:
        """Return the lines that stand on the terminal, without colours; those that are empty are left out."""
        rows, row, column = [""], 0, 0
        for number, command, move, text in SEQUENCE.findall(self.getvalue()):
            if move == "\r":
                column = 0
            elif move == "\n":
                row, column = row + 1, 0
                rows += [""] * (row == len(rows))
            elif command == "A":
                row -= int(number or 1)
            elif command == "K":
                rows[row] = ""
            elif text:
                rows[row] = rows[row].ljust(column)[:column] + text + rows[row][column + len(text) :]
                column += len(text)
        return [line.rstrip() for line in rows if line.strip()]


def fake_terminal(monkeypatch: pytest.MonkeyPatch, *names: str, delay: float = 0.0) -> FakeTerminal:
    """Return a terminal that stands in for sys.stderr and the like; bars appear on it after `delay` seconds."""
    terminal = FakeTerminal()
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, text in ENVIRONMENT.items():
        monkeypatch.setenv(name, text)
    for name in names or ("stderr",):
        monkeypatch.setattr(f"sys.{name}", terminal)
    monkeypatch.setattr(progress, "DELAY", delay)
    monkeypatch.setattr(progress, "INTERVALS", (0.01, 0.01))
    return terminal


def counts(bars: Sequence[progress.Bar]) -> list[tuple[str, str, int, int]]:
    """Return the description, the unit, how many are done, and the total, of each bar."""
    return [(bar.description, bar.unit, bar.done, bar.total) for bar in bars]


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; fail after 20 seconds."""
    end = monotonic() + 20
    while not condition():
        assert monotonic() < end, "waited for 20 seconds"
        sleep(0.005)
