"""Time Grad-CAM against other packages: `make bench-cam` (peers installed by `make bench-peers`).

ResNet-50 with seeded random weights, 224 px, the last block `layer4.2`, batches of 1 and 16, classes given. Rounds are
interleaved: every tool runs once a round, and the figures are medians over rounds of milliseconds a photo, with the
median over rounds of the ratio of the other tool's time to ours. The maps are compared as well: largest difference from
ours over our map's maximum, both divided by their own maximum. (grad-cam returns maps that are enlarged and stretched
from their minimum, which cannot be undone: its difference is mostly that.)
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models

import phosphene as ph
from phosphene.explain import heatmaps

HERE = Path(__file__).parent
LAYER = "layer4.2"
Tool = Callable[[Tensor, Tensor], Tensor]  # images (b, 3, h, w) in [0, 1], targets (b,) -> maps (b, h, w)


def tools(module: nn.Module, model: ph.Model) -> dict[str, Tool]:
    """Return every tool as a function of the same images and targets."""
    from captum.attr import LayerGradCam
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from torchcam.methods import GradCAM as TorchCam

    layer = module.get_submodule(LAYER)
    ready = model.preprocessing

    def ours(images: Tensor, targets: Tensor) -> Tensor:
        return heatmaps(model, images, targets, LAYER)[0].clamp(min=0)

    def grad_cam(images: Tensor, targets: Tensor) -> Tensor:
        with GradCAM(module, [layer]) as cam:
            maps: Tensor = torch.from_numpy(cam(ready(images), [ClassifierOutputTarget(int(one)) for one in targets]))
        return maps

    def torchcam(images: Tensor, targets: Tensor) -> Tensor:
        with TorchCam(module, LAYER) as cam:
            scores = module(ready(images).requires_grad_())
            maps: Tensor = cam(targets.tolist(), scores, normalized=False)[0]
        return maps

    def captum(images: Tensor, targets: Tensor) -> Tensor:
        maps: Tensor = LayerGradCam(module, layer).attribute(ready(images), targets)
        return maps[:, 0].clamp(min=0)

    return {"phosphene": ours, "grad-cam": grad_cam, "torchcam": torchcam, "captum": captum}


def scaled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps at one size, each over its maximum."""
    small = nn.functional.interpolate(maps.detach()[:, None].float(), size, mode="bilinear")[:, 0]
    return small / small.flatten(1).amax(1).clamp(min=1e-12).view(-1, 1, 1)


def main() -> None:
    """Print the table and write it to bench/results/cam.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=HERE / "results/cam.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    module = models.resnet50(weights=None).eval()
    model = ph.load(module, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    rows = []
    print(f"{'batch':<8}{'tool':<12}{'ms a photo':>12}{'time / ours':>14}{'difference':>14}")
    for batch in (1, 16):
        images, targets = torch.rand(batch, 3, 224, 224), torch.arange(batch) * 31
        every = tools(module, model)
        maps = {name: tool(images, targets) for name, tool in every.items()}
        times: dict[str, list[float]] = {name: [] for name in every}
        for _ in range(options.rounds):
            for name, tool in every.items():
                began = time.perf_counter()
                tool(images, targets)
                times[name].append((time.perf_counter() - began) / batch * 1000)
        size = (maps["phosphene"].shape[-2], maps["phosphene"].shape[-1])
        for name, taken in times.items():
            ratios = [other / own for other, own in zip(taken, times["phosphene"], strict=True)]
            difference = (scaled(maps[name], size) - scaled(maps["phosphene"], size)).abs().max()
            rows.append(
                {
                    "batch": batch,
                    "tool": name,
                    "milliseconds": statistics.median(taken),
                    "ratio": statistics.median(ratios),
                    "difference": float(difference),
                }
            )
            figures = f"{rows[-1]['milliseconds']:>12.1f}{rows[-1]['ratio']:>14.2f}{rows[-1]['difference']:>14.1e}"
            print(f"{batch:<8}{name:<12}{figures}", flush=True)
    machine = {"machine": platform.machine(), "threads": options.threads, "torch": torch.__version__}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**machine, "phosphene": ph.__version__, "rows": rows}, indent=1) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
