"""Measure what recording a training costs: `make bench-record`.

A ResNet-18 as it is used on CIFAR (first convolution 3x3, no pooling after it, 10 classes) is trained by SGD with
momentum on random 32x32 pictures, as three identical copies: one plain, one recorded with running gradients, one with
kernels only. Steps are interleaved, each copy makes one a round, in changing order. `ratio` is the median over rounds
of a recorded step's time over the plain step's, plus the measured cost of ending an epoch spread over the steps that an
epoch of CIFAR has. `own share` takes the time spent inside the recorder over that of the plain step: it holds still
where other programs load the machine, but misses what the recorder costs outside of its calls. Both are in processor
time, as the ratio in wall time (`wall`) is at the mercy of such programs.

Then a small network is recorded over 500 epochs of 3 steps, and memory and time an epoch are read on the way.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import statistics
import tempfile
import time
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

import phosphene as ph
from phosphene.training.recorder import Recorder

HERE = Path(__file__).parent
CIFAR = 50_000  # pictures an epoch
MARKS = {"running": 1.03, "kernels only": 1.01}
EPOCHS, FIRST = 500, 50  # of the memory test, and from which on memory may grow no more


@dataclass
class Run:
    """A copy of the network in training, and what its steps took: (wall, processor, processor inside the recorder)."""

    net: nn.Module
    recorder: Recorder | None
    times: list[tuple[float, float, float]] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.01, momentum=0.9)

    def step(self, images: Tensor, classes: Tensor) -> None:
        """Train by one batch."""
        wall, began = time.perf_counter(), time.process_time()
        inside = 0.0
        self.optimizer.zero_grad()
        loss: Any = F.cross_entropy(self.net(images), classes)
        loss.backward()
        if self.recorder:
            before = time.process_time()
            self.recorder.after_backward()
            inside = time.process_time() - before
        self.optimizer.step()
        self.times.append((time.perf_counter() - wall, time.process_time() - began, inside))

    def end(self, epoch: int) -> None:
        """End an epoch."""
        began = time.process_time()
        if self.recorder:
            self.recorder.end_epoch(epoch)
        self.ends.append(time.process_time() - began)


def resnet18() -> nn.Module:
    """Return a ResNet-18 as it is used on CIFAR."""
    net: nn.Module = models.resnet18(weights=None, num_classes=10)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


def cost(folder: Path, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each way of recording."""
    torch.manual_seed(0)
    net = resnet18()
    images, classes = torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,))
    runs = {"plain": Run(copy.deepcopy(net), None)}
    for name, gradients in (("running", "running"), ("kernels only", None)):
        copied = copy.deepcopy(net)
        runs[name] = Run(copied, Recorder(copied, folder / name, gradients=gradients))
    for number in range(rounds + 1):
        names = list(runs)
        for name in names[number % 3 :] + names[: number % 3]:
            runs[name].step(images, classes)
    for epoch in range(3):
        for run in runs.values():
            if epoch:
                run.step(images, classes)
            run.end(epoch)
    same = [all(map(torch.equal, run.net.parameters(), runs["plain"].net.parameters())) for run in runs.values()]
    assert all(same), "the recorder has changed the training"
    plain, rows = runs["plain"].times[1 : rounds + 1], []  # the first step warms up
    typical = statistics.median(seconds for _, seconds, _ in plain)
    for name in MARKS:
        end = statistics.median(runs[name].ends) / (CIFAR / batch)
        pairs = list(zip(runs[name].times[1 : rounds + 1], plain, strict=True))
        rows.append(
            {
                "recorded": name,
                "ratio": statistics.median((recorded[1] + end) / plain_step[1] for recorded, plain_step in pairs),
                "own share": 1
                + statistics.median((recorded[2] + end) / plain_step[1] for recorded, plain_step in pairs),
                "wall": statistics.median((recorded[0] + end) / plain_step[0] for recorded, plain_step in pairs),
                "mark": MARKS[name],
                "plain step ms": typical * 1000,
                "after_backward ms": statistics.median(recorded[2] for recorded, _ in pairs) * 1000,
                "end_epoch ms": statistics.median(runs[name].ends) * 1000,
            }
        )
    return rows


def memory(folder: Path, epochs: int) -> dict[str, float]:
    """Return what a process takes at the end of a first and of the last epoch, in MB, and seconds an epoch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 14 * 14, 5))
    run = Run(net, Recorder(net, folder))
    images, classes = torch.rand(8, 3, 16, 16), torch.randint(5, (8,))
    marks, figures = {min(FIRST, epochs - 1): "first", epochs: "last"}, dict[str, float]()
    tracemalloc.start()
    for epoch in range(epochs):
        for _ in range(3):
            run.step(images, classes)
        run.end(epoch)
        run.times.clear()
        if epoch + 1 in marks:
            gc.collect()
            name = marks[epoch + 1]
            figures[f"resident {name}"], figures[f"python {name}"] = (
                resident(),
                tracemalloc.get_traced_memory()[0] / 1e6,
            )
            figures[f"end_epoch ms {name}"] = statistics.median(run.ends[-20:]) * 1000
    tracemalloc.stop()
    return figures


def resident() -> float:
    """Return how much memory this process holds, in MB; NaN where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("VmRSS")), float("nan"))


def main() -> None:
    """Print the tables and write them to bench/results/record.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=HERE / "results/record.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        flat = memory(Path(folder), options.epochs)  # first, while the process holds nothing else
    head = f"{'batch':<7}{'recorded':<14}{'ratio':>8}{'own share':>11}{'wall':>8}{'mark':>7}"
    print(f"{head}{'plain step':>13}{'after_backward':>16}{'end_epoch':>12}")
    with tempfile.TemporaryDirectory() as folder:
        for batch in options.batches:
            for row in cost(Path(folder) / str(batch), batch, options.rounds):
                rows.append({"batch": batch, **row})
                figures = f"{row['ratio']:>8.4f}{row['own share']:>11.4f}{row['wall']:>8.4f}{row['mark']:>7.2f}"
                times = f"{row['plain step ms']:>10.0f} ms{row['after_backward ms']:>13.1f} ms"
                times += f"{row['end_epoch ms']:>9.0f} ms"
                print(f"{batch:<7}{row['recorded']:<14}{figures}{times}", flush=True)
    for name in ("resident", "python", "end_epoch ms"):
        unit = "ms" if name.endswith("ms") else "MB"
        first, last = (f"{flat[f'{name} {moment}']:.2f} {unit}" for moment in ("first", "last"))
        print(f"{name.removesuffix(' ms')}: {first} after {FIRST} epochs, {last} after {options.epochs}")
    machine = {"machine": platform.machine(), "threads": options.threads, "torch": torch.__version__}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    whole = {**machine, "phosphene": ph.__version__, "rounds": options.rounds, "rows": rows, "memory": flat}
    options.out.write_text(json.dumps(whole, indent=1) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
