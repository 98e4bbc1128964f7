"""What the parts of `engine.py` share: tools in processes of their own, rounds in turn, and the machine's limit."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).parent
OURS = {"ours float32": "fp32", "ours bf16": "bf16"}
PEERS = {
    "plain loop": "plain",
    "torch-lucent": "lucent",
    "tf-keras-vis": "tf-keras-vis",
    "Keras, tf.function": "keras-tf",
}
Row = dict[str, Any]
Ask = Callable[..., Row]
Run = Callable[[], float]


class Failed(RuntimeError):
    """A tool could not do what it was asked."""


@dataclass
class Bench:
    """What all parts share: the options, and the processes of the tools."""

    options: argparse.Namespace
    stack: ExitStack
    started: dict[str, Ask] = field(default_factory=dict)
    limits: list[Row] = field(default_factory=list)
    said: set[str] = field(default_factory=set)

    def ask(self, name: str, **wish: Any) -> Row:
        """Have a tool fulfil a wish, in a process that is kept."""
        if name not in self.started:
            self.started[name] = self.stack.enter_context(serving(PEERS.get(name, "phosphene"), self.options))
        return self.started[name](**wish, **({"precision": OURS[name]} if name in OURS else {}))

    def run(self, name: str, figure: str = "step", **wish: Any) -> Run:
        """Return what has a tool fulfil a wish and returns one figure of its answer."""
        return lambda: float(self.ask(name, **wish)[figure])

    def fresh(self, name: str, **wish: Any) -> Row:
        """Have a tool fulfil a wish in a process that has done nothing before but load the network."""
        with serving(PEERS.get(name, "phosphene"), self.options) as ask:
            precision = {"precision": OURS[name]} if name in OURS else {}
            ask(**{**wish, "size": 32, "steps": 1, "batch": 1, "channels": [0]}, **precision)
            return ask(**wish, **precision)

    @cached_property
    def limit_program(self) -> Path | None:
        """The program that measures the limit, built by the system's C compiler; None where there is none."""
        compiler = shutil.which("cc")
        if compiler is None:
            print("no C compiler `cc` on this system: the machine's limit is not measured")
            return None
        built = Path(self.stack.enter_context(TemporaryDirectory())) / "limit"
        command = [compiler, "-O3", "-pthread", str(HERE / "limit.c"), "-o", str(built)]
        failed = subprocess.run(command, capture_output=True, text=True, check=False)
        if failed.returncode:
            print(f"`cc` cannot build bench/limit.c, the machine's limit is not measured:\n{failed.stderr}")
            return None
        return built

    def note_limit(self, seconds: float = 0.3) -> None:
        """Measure what the machine can do at most, in 1e9 multiplications and additions a second, by format.

        A format that cannot be measured is None or left out, and the reason is printed once.
        """
        self.limits.append({})
        if self.limit_program is None:
            return
        command = [str(self.limit_program), str(self.options.threads), str(seconds)]
        printed, reason = "", "this processor has no instructions for it"
        try:
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except subprocess.CalledProcessError as error:
            printed, reason = error.stdout, str(error)  # what it measured before it died counts
        except OSError as error:
            reason = str(error)
        for line in printed.splitlines():
            self.limits[-1].update(json.loads(line))
        for number_format in ("float32", "bf16"):
            if self.limits[-1].get(number_format) is None:
                self.say_once(f"the machine's limit in {number_format} is not measured: {reason}")

    def say_once(self, sentence: str) -> None:
        """Print a sentence unless it was printed before."""
        if sentence not in self.said:
            self.said.add(sentence)
            print(sentence, flush=True)


@contextmanager
def serving(tool: str, options: argparse.Namespace) -> Iterator[Ask]:
    """Start a process for a tool and yield what asks it; its environment's Python is among the options."""
    python = options.tensorflow if "keras" in tool else Path(sys.executable)
    if not python.exists():
        raise Failed(f"{tool}: there is no {python}; `make bench-peers` sets it up")
    count = str(options.threads)
    process = subprocess.Popen(
        [python, str(HERE / "tools.py"), tool, count],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    wishes, replies = process.stdin, process.stdout

    def ask(**wish: Any) -> Row:
        if process.poll() is None:
            wishes.write(json.dumps(wish) + "\n")
            wishes.flush()
        reply: Row = json.loads(replies.readline() or '{"error": "its process has ended"}')
        if "error" in reply:
            raise Failed(f"{tool}: {reply['error']}")
        return reply

    try:
        yield ask
    finally:
        wishes.close()
        process.wait()


def nothing() -> None:
    """Do nothing."""


def interleaved(rounds: int, runs: Mapping[str, Run], also: Callable[[], None] = nothing) -> dict[str, list[float]]:
    """Return the figures of every run, by round, and do something else once a round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        also()
        for name, run in runs.items():
            times[name].append(run())
    return times


def over(figures: list[float], others: list[float]) -> float:
    """Return the median over rounds of one figure over another."""
    return statistics.median(figure / baseline for figure, baseline in zip(figures, others, strict=True))
