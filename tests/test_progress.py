"""The progress bar: what a person sees of it, and that nothing is left of it."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

import phosphene as ph
from fake_terminal import FakeTerminal, fake_terminal, wait_until
from phosphene import progress
from phosphene.progress import LIVE, progress_bar, rate, watched_screen
from phosphene.rendering.recipes import Recipe, choice

QUICK = Recipe("quick", "", (16,), 4, choice("pixels", low=0.3, high=0.7), choice("rms", rate=2.0))


def assert_clean(terminal: FakeTerminal, *lines: str) -> None:
    """Assert that only these lines stand on a terminal, and that no bar is left anywhere."""
    assert terminal.lines() == list(lines)
    assert terminal.cursor_is_visible
    assert not hasattr(sys.stdout, "rich_proxied_file")
    assert not hasattr(sys.stderr, "rich_proxied_file")
    assert (LIVE.bars, LIVE.thread) == ({}, None)
    assert "phosphene-progress" not in [thread.name for thread in threading.enumerate()]


# --- what is seen


def test_a_row_has_the_count_the_rate_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = fake_terminal(monkeypatch)
    with progress_bar("export", "files") as bar:
        bar.done, bar.total = 1, 5
        wait_until(lambda: any("1/5 files" in line for line in terminal.lines()))
        assert [line.split()[0] for line in terminal.lines()] == ["export"]
        bar.done = 3
        wait_until(lambda: any("3/5 files" in line for line in terminal.lines()))
        bar.done = 4  # from here on there is a rate
        wait_until(lambda: any("/s 0:00:0" in line and "4/5 files" in line for line in terminal.lines()))
    assert_clean(terminal)


def test_a_total_that_is_not_known_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = fake_terminal(monkeypatch)
    with progress_bar("1 picture", "steps"):
        wait_until(lambda: any("0/? steps" in line for line in terminal.lines()))
    assert_clean(terminal)


@pytest.mark.parametrize(
    ("speed", "text"), [(None, ""), (2500.0, "2,500.0/s"), (1.0, "1.0/s"), (0.05, "3.0/min")], ids=str
)
def test_a_rate_is_a_second_or_where_that_is_few_a_minute(speed: float | None, text: str) -> None:
    assert rate(speed) == text


def test_a_bar_inside_a_bar_is_a_second_row(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = fake_terminal(monkeypatch)
    with progress_bar("outer", "pictures") as outer:
        outer.total = 2
        with progress_bar("inner", "steps") as inner:
            inner.done, inner.total = 7, 9
            wait_until(lambda: [line.split()[0] for line in terminal.lines()] == ["outer", "inner"])
            assert "0/2 pictures" in terminal.lines()[0]
            assert "7/9 steps" in terminal.lines()[1]
        outer.done = 1
        wait_until(lambda: len(terminal.lines()) == 1 and "1/2 pictures" in terminal.lines()[0])
    assert_clean(terminal)


def test_what_is_printed_meanwhile_stays_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = fake_terminal(monkeypatch, "stderr", "stdout")
    with progress_bar("export", "files"):
        wait_until(lambda: any("export" in line for line in terminal.lines()))
        print("a result")
        wait_until(lambda: [line.split()[0] for line in terminal.lines()] == ["a", "export"])
        print("a remark", file=sys.stderr)
        sys.stdout.write("no new line")
    assert_clean(terminal, "a result", "a remark", "no new line")


def test_what_is_printed_into_a_file_goes_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = fake_terminal(monkeypatch)
    with progress_bar("export", "files"):
        wait_until(lambda: len(terminal.lines()) == 1)
        print("a result")
    assert capsys.readouterr().out == "a result\n"
    assert_clean(terminal)


# --- what is not seen


def test_short_work_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = fake_terminal(monkeypatch, delay=60)
    with progress_bar("export", "files"):
        assert LIVE.thread is not None
    assert terminal.getvalue() == ""
    assert_clean(terminal)


def test_progress_false_shows_no_bar(monkeypatch: pytest.MonkeyPatch, small_net: nn.Sequential) -> None:
    terminal = fake_terminal(monkeypatch)
    with progress_bar("export", "files", progress=False) as bar:
        bar.done += 1
        assert LIVE.thread is None
    ph.render(ph.load(small_net, input_size=32), ph.channel("4", 0), QUICK, progress=False)
    assert terminal.getvalue() == ""


def test_without_a_terminal_nothing_is_printed_and_rich_is_not_loaded() -> None:
    code = """
import sys, time, torch, phosphene as ph
from phosphene import progress
progress.DELAY = 0
def watch(frame): time.sleep(0.1)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3))
ph.render(ph.load(net, input_size=8), ph.channel("0", 0), "fast", size=8, steps=4, watch=watch)
print("rich" in sys.modules, progress.LIVE.thread)
"""
    environment = {
        **os.environ,
        "FORCE_COLOR": "1",
        "TTY_COMPATIBLE": "1",
    }  # with which rich takes a pipe for a terminal
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert (done.stdout, done.stderr) == ("False None\n", "")


@pytest.mark.parametrize("stream", [None, SimpleNamespace(), FakeTerminal()], ids=["none", "no isatty", "closed"])
def test_streams_that_are_no_terminals(monkeypatch: pytest.MonkeyPatch, stream: object) -> None:
    if isinstance(stream, FakeTerminal):
        stream.close()
        monkeypatch.setattr(stream, "isatty", lambda: io_error())
    monkeypatch.setattr(sys, "stderr", stream)
    assert watched_screen() is None


def io_error() -> bool:
    raise ValueError("I/O operation on closed file")


def test_no_bar_in_the_processes_of_multiprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_terminal(monkeypatch)
    assert watched_screen() is not None
    monkeypatch.setattr(progress, "parent_process", lambda: object())
    assert watched_screen() is None


def test_the_users_own_display_of_rich_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = fake_terminal(monkeypatch)
    with Progress(console=Console(file=terminal), transient=True) as own:
        own.add_task("the user's own", total=3)
        with progress_bar("export", "files"):
            assert LIVE.thread is None
        own.refresh()
        assert [line.split("━")[0].strip() for line in terminal.lines()] == ["the user's own"]
    assert_clean(terminal)


# --- whatever happens


def test_an_exception_leaves_a_clean_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = fake_terminal(monkeypatch)

    def fail() -> None:
        with progress_bar("outer", "files"), progress_bar("inner", "steps"):
            wait_until(lambda: len(terminal.lines()) == 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert_clean(terminal)


def test_ctrl_c_in_a_render_leaves_a_clean_terminal(monkeypatch: pytest.MonkeyPatch, small_net: nn.Sequential) -> None:
    terminal = fake_terminal(monkeypatch)

    def interrupt(frame: ph.Frame) -> None:
        if frame.step == 2:
            wait_until(lambda: any("9/12 steps" in line for line in terminal.lines()))
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # processes in the background ignore it
    try:
        with pytest.raises(ph.errors.Interrupted, match="0 of 3 done"):
            ph.render(ph.load(small_net, input_size=32), ph.channel("4", range(3)), QUICK, watch=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert_clean(terminal)


def test_a_terminal_that_breaks_does_not_stop_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = fake_terminal(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as one of a thread that has died
        with progress_bar("export", "files") as bar:
            wait_until(lambda: len(terminal.lines()) == 1)
            terminal.broken = True
            wait_until(lambda: LIVE.thread is None)
            bar.done += 1
    assert (LIVE.bars, bar.done) == ({}, 1)
    assert sys.stderr is terminal


def test_where_no_thread_can_start_the_work_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = fake_terminal(monkeypatch)

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with progress_bar("export", "files") as bar:
        bar.done += 1
    assert_clean(terminal)


def test_a_stream_that_the_user_replaced_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = fake_terminal(monkeypatch)
    replacement = FakeTerminal()
    with progress_bar("export", "files"):
        wait_until(lambda: len(terminal.lines()) == 1)
        sys.stderr = replacement
    assert sys.stderr is replacement


def test_two_renders_in_two_threads(monkeypatch: pytest.MonkeyPatch, small_net: nn.Sequential) -> None:
    terminal = fake_terminal(monkeypatch)
    models = [ph.load(small_net, input_size=32), ph.load(nn.Sequential(nn.Conv2d(3, 4, 3)), input_size=32)]
    objectives = [ph.channel("4", range(3)), ph.channel("0", range(2))]
    expected = [ph.render(*pair, QUICK, progress=False) for pair in zip(models, objectives, strict=True)]
    both_seen, rendered = threading.Event(), dict[int, ph.Rendered]()

    def wait(frame: ph.Frame) -> None:
        both_seen.wait(20)

    def work(index: int) -> None:
        rendered[index] = ph.render(models[index], objectives[index], QUICK, watch=wait)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: sorted(line[:10] for line in terminal.lines()) == ["2 pictures", "3 pictures"])
    both_seen.set()
    for thread in threads:
        thread.join()
    assert_clean(terminal)
    assert [torch.equal(rendered[index].images, expected[index].images) for index in range(2)] == [True, True]


def test_a_render_inside_the_watch_of_a_render(monkeypatch: pytest.MonkeyPatch, small_net: nn.Sequential) -> None:
    terminal = fake_terminal(monkeypatch)
    model, other = (ph.load(net, input_size=32) for net in (small_net, nn.Sequential(nn.Conv2d(3, 4, 3))))
    seen: list[list[str]] = []

    def look(frame: ph.Frame) -> None:
        wait_until(lambda: len(terminal.lines()) == 2)
        seen.append([line.split()[1] for line in terminal.lines()])

    def inner(frame: ph.Frame) -> None:
        if frame.step == 1:
            ph.render(other, ph.channel("0", 0), QUICK, watch=look)

    ph.render(model, ph.channel("4", range(2)), QUICK, watch=inner)
    assert seen == [["pictures", "picture"]] * 5  # four steps and the finished frame
    assert_clean(terminal)


def test_a_generator_that_is_not_used_up_leaves_a_clean_terminal(tmp_path: Path) -> None:
    code = """
import sys, time
from phosphene import progress
progress.DELAY = 0
def generator():
    with progress.progress_bar("generator", "files"):
        time.sleep(0.5)
        yield
left = generator()
next(left)
"""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    terminal = FakeTerminal()
    try:
        while chunk := os.read(ours, 65536):
            terminal.write(chunk.decode())
    except OSError:  # the process has ended
        pass
    assert process.wait(20) == 0
    assert "generator" in terminal.getvalue()
    assert terminal.lines() == []
    assert terminal.cursor_is_visible


# --- notebooks


def notebook(monkeypatch: pytest.MonkeyPatch, allow_stdin: bool) -> list[dict[str, str]]:
    """Stand in for IPython in a notebook, and return the list of what is shown under the cell."""
    shown: list[dict[str, str]] = []

    def display(content: dict[str, str], raw: bool, display_id: bool) -> SimpleNamespace:
        shown.append(content)
        return SimpleNamespace(update=lambda content, raw: shown.append(content))

    ipython, module = ModuleType("IPython"), ModuleType("IPython.display")
    shell = SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=allow_stdin))
    ipython.get_ipython, module.display = lambda: shell, display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


def test_a_notebook_shows_a_bar_of_html_that_vanishes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "DELAY", 0)
    shown = notebook(monkeypatch, allow_stdin=True)
    empty = {"text/html": "", "text/plain": ""}
    with progress_bar("<photos>", "photos") as bar:
        wait_until(lambda: len(shown) > 1)
        assert shown[:2] == [
            empty,
            {
                "text/html": "<div><label>&lt;photos&gt; <progress></progress> 0/? photos  </label></div>",
                "text/plain": "<photos> 0/? photos  ",
            },
        ]
        bar.done, bar.total = 2, 9
        wait_until(lambda: '<progress value="2" max="9"></progress> 2/9 photos' in shown[-1]["text/html"])
    assert shown[-1] == empty
    assert capsys.readouterr() == ("", "")


def test_a_notebook_that_runs_by_itself_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook(monkeypatch, allow_stdin=False)
    assert watched_screen() is None
