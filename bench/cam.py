"""Time Grad-CAM against other packages: `make bench-cam` (peers installed by `make bench-peers`).

ResNet-50 with seeded random weights, 224 px, the last block `layer4.2`, batches of 1 and 16, classes given. Every tool
has a process of its own, as its users have, for what one has left in memory makes others faster or slower; it is set up
once, and then given one batch after another. Rounds are interleaved: every tool runs once a round, while the others
wait, and the figures are medians over rounds of milliseconds a photo, with the median over rounds of the ratio of the
other tool's time to ours. The maps are compared as well: largest difference from
ours over our map's maximum, both divided by their own maximum. (grad-cam returns maps that are enlarged and stretched
from their minimum, which cannot be undone: its difference is mostly that.)
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

import phosphene as ph
from phosphene.network.memory import keep_freed_memory

HERE = Path(__file__).parent
LAYER = "layer4.2"
TOOLS = ("phosphene", "grad-cam", "torchcam", "captum")
Tool = Callable[[Tensor, Tensor], Tensor]  # images (b, 3, h, w) in [0, 1], targets (b,) -> maps (b, h, w)
Ask = Callable[[Tensor, Tensor], tuple[float, Tensor]]  # the same -> seconds, maps


@contextmanager
def set_up(name: str, module: nn.Module, model: ph.Model) -> Iterator[Tool]:
    """Set a tool up for many batches, as its documentation has it, and yield it."""
    layer, ready = module.get_submodule(LAYER), model.preprocessing
    if name == "phosphene":
        keep_freed_memory()
        with ph.explaining(model, LAYER) as explainer:
            yield lambda images, targets: explainer.maps(images, targets)[0].clamp(min=0)
    elif name == "grad-cam":
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        with GradCAM(module, [layer]) as cam:
            yield lambda images, targets: torch.from_numpy(
                cam(ready(images), [ClassifierOutputTarget(int(target)) for target in targets])
            )
    elif name == "torchcam":
        from torchcam.methods import GradCAM as TorchCam

        with TorchCam(module, LAYER) as cam:
            yield lambda images, targets: cam(
                targets.tolist(), module(ready(images).requires_grad_()), normalized=False
            )[0]
    else:
        from captum.attr import LayerGradCam

        attributor = LayerGradCam(module, layer)
        yield lambda images, targets: attributor.attribute(ready(images), targets)[:, 0].clamp(min=0)


def scaled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps at one size, each over its maximum."""
    small = nn.functional.interpolate(maps.detach()[:, None].float(), size, mode="bilinear")[:, 0]
    return small / small.flatten(1).amax(1).clamp(min=1e-12).view(-1, 1, 1)


def network(threads: int) -> tuple[nn.Module, ph.Model]:
    """Return the network, and our handle on it."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    module = models.resnet50(weights=None).eval()
    return module, ph.load(module, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def serve(connection: Connection, name: str, threads: int) -> None:
    """Answer every (images, targets) with the seconds that they took and the maps, until None comes."""
    with set_up(name, *network(threads)) as tool:
        while (wish := connection.recv()) is not None:
            images, targets = map(torch.from_numpy, wish)
            began = time.perf_counter()
            maps = tool(images, targets)
            connection.send((time.perf_counter() - began, maps.detach().numpy()))


@contextmanager
def serving(name: str, threads: int) -> Iterator[Ask]:
    """Start a process for a tool and yield what asks it."""
    context = multiprocessing.get_context("spawn")
    parent_end, child_end = context.Pipe()
    process = context.Process(target=serve, args=(child_end, name, threads))
    process.start()

    def ask(images: Tensor, targets: Tensor) -> tuple[float, Tensor]:
        parent_end.send((images.numpy(), targets.numpy()))
        seconds, maps = parent_end.recv()
        return seconds, torch.from_numpy(maps)

    try:
        yield ask
    finally:
        parent_end.send(None)
        process.join()


def main() -> None:
    """Print the table and write it to bench/results/cam.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=HERE / "results/cam.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{'batch':<8}{'tool':<12}{'ms a photo':>12}{'time / ours':>14}{'difference':>14}")
    with ExitStack() as processes:
        asks = {name: processes.enter_context(serving(name, options.threads)) for name in TOOLS}
        for batch in (1, 16):
            rows += measured(asks, batch, options.rounds)
    machine = {"machine": platform.machine(), "threads": options.threads, "torch": torch.__version__}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**machine, "phosphene": ph.__version__, "rows": rows}, indent=1) + "\n")
    print(options.out)


def measured(asks: dict[str, Ask], batch: int, rounds: int) -> list[dict[str, Any]]:
    """Return and print a row a tool for one size of the batch."""
    torch.manual_seed(1)
    images, targets = torch.rand(batch, 3, 224, 224), torch.arange(batch) * 31
    maps = {name: ask(images, targets)[1] for name, ask in asks.items()}
    times: dict[str, list[float]] = {name: [] for name in asks}
    for _ in range(rounds):
        for name, ask in asks.items():
            times[name].append(ask(images, targets)[0] / batch * 1000)
    size = (maps["phosphene"].shape[-2], maps["phosphene"].shape[-1])
    rows = []
    for name, taken in times.items():
        ratios = [theirs / ours for theirs, ours in zip(taken, times["phosphene"], strict=True)]
        difference = (scaled(maps[name], size) - scaled(maps["phosphene"], size)).abs().max()
        row = {"batch": batch, "tool": name, "milliseconds": statistics.median(taken)}
        rows.append({**row, "ratio": statistics.median(ratios), "difference": float(difference)})
        figures = f"{rows[-1]['milliseconds']:>12.1f}{rows[-1]['ratio']:>14.2f}{rows[-1]['difference']:>14.1e}"
        print(f"{batch:<8}{name:<12}{figures}", flush=True)
    return rows


if __name__ == "__main__":
    main()
