"""Small atlases of a network of two convolutions, a runner for them, and a network that kills its process."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from phosphene.atlases.plan import Atlas, Job, atlas
from phosphene.atlases.runners.pool import Outcome, try_job
from phosphene.network.loading import load
from phosphene.network.model import Model

NETS = """
import torch
from torch import Tensor, nn

def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU())
"""

# a network that kills its process once for each of two files
TRAP = """
import os, signal, torch
from pathlib import Path
from torch import nn

class Trap(nn.Sequential):
    def forward(self, image):
        for name in ("armed.1", "armed.2"):
            if Path(name).exists():
                Path(name).unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(image)

def trap():
    torch.manual_seed(0)
    return Trap(nn.Conv2d(3, 2, 3))
"""


def tiny(bias: float = 0.0) -> nn.Sequential:
    """Return two convolutions of 6 and 8 filters, seed 0; `bias` is added to that of the last filter."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU())
        cast(Tensor, net[2].bias)[7] += bias
    return net.eval()


def tiny_model(bias: float = 0.0) -> Model:
    return load(tiny(bias), input_size=24)


def tiny_atlas(model: Model, **options: Any) -> Atlas:
    """Return a plan of four jobs, which take a few milliseconds each."""
    return atlas(model, **{"size": 16, "steps": 3, "per_job": 4, "precision": "fp32", **options})


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class InProcessRunner:
    """A runner in this process that remembers its jobs; the jobs of the digests `failing` fail."""

    def __init__(self, *failing: str) -> None:
        self.failing, self.done, self.closed = failing, list[Job](), False

    def run(self, model: Model, jobs: Iterable[Job]) -> Generator[Outcome, None, None]:
        try:
            for job in jobs:
                self.done.append(job)
                yield Outcome(job, error="it failed") if job.digest in self.failing else try_job(model, job)
        finally:
            self.closed = True
