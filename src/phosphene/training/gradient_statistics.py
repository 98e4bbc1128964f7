"""What the gradients of an epoch come to, gathered from the backward passes that a training does anyway."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EXPONENTS = 256  # of float32, which are the bins of a histogram
BIAS = 127


@dataclass(frozen=True, eq=False)
class Gradient:
    """What the gradients of one weight tensor come to over an epoch.

    Attributes:
        mean: the mean over the batches, entry by entry, in the shape of the weight; on the CPU. Where the gradient of
            the total loss was taken, that gradient.
        mean_abs: mean over the batches of the mean magnitude of the entries; `norm`: of their L2 norm.
        histogram: (256,) how many entries, of all batches, had which float32 exponent: bin k counts
            2^(k-127) <= |g| < 2^(k-126), bin 0 also what is 0, bin 255 NaN and infinity.
        batches: in how many the tensor had a gradient; in `nonfinite` of these it held NaN or infinity, for the first
            time in batch `first_nonfinite`, counted from 0.
    """

    mean: Tensor
    mean_abs: float
    norm: float
    histogram: Tensor
    batches: int
    nonfinite: int
    first_nonfinite: int | None


class RunningGradients:
    """The sums that an epoch's gradients come to; nothing waits for the device until `take`."""

    def __init__(self) -> None:
        self.sums: dict[str, RunningSum] = {}
        self.batches = 0

    def add(self, gradients: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Add one batch's gradients by name, each divided by `scale`."""
        found = {name: dense(one, scale) for name, one in gradients.items()}
        for name, one in found.items():
            if name not in self.sums:
                self.sums[name] = RunningSum.of(one)
        sums, batch = [self.sums[name] for name in found], list(found.values())
        if not batch:
            return
        torch._foreach_add_([one.entries for one in sums], batch)
        norms, magnitudes = torch._foreach_norm(batch, 2), torch._foreach_norm(batch, 1)
        counts = histograms(batch)
        for total, norm, magnitude, count in zip(sums, norms, magnitudes, counts, strict=True):
            total.add(norm, magnitude, count, self.batches)
        self.batches += 1

    def take(self) -> dict[str, Gradient]:
        """Return what was gathered by name, and start anew."""
        taken = {name: one.taken() for name, one in self.sums.items()}
        self.sums, self.batches = {}, 0
        return taken


@dataclass
class RunningSum:
    """The sums of one weight tensor's gradients, on its device."""

    entries: Tensor
    norm: Tensor
    magnitude: Tensor
    histogram: Tensor
    nonfinite: Tensor
    first: Tensor
    batches: int = 0

    @classmethod
    def of(cls, gradient: Tensor) -> RunningSum:
        """Return sums of nothing, for gradients like this one."""
        number, count = gradient.new_zeros((), dtype=torch.float64), gradient.new_zeros((), dtype=torch.int64)
        return cls(
            entries=torch.zeros_like(gradient),
            norm=number,
            magnitude=number.clone(),
            histogram=gradient.new_zeros(EXPONENTS, dtype=torch.int64),
            nonfinite=count,
            first=count - 1,
        )

    def add(self, norm: Tensor, magnitude: Tensor, histogram: Tensor, batch: int) -> None:
        """Add what one batch's gradient measures."""
        bad = histogram[-1] > 0
        self.norm += norm
        self.magnitude += magnitude
        self.histogram += histogram
        self.first = torch.where(bad & (self.first < 0), batch, self.first)
        self.nonfinite += bad
        self.batches += 1

    def taken(self) -> Gradient:
        """Return means instead of sums, on the CPU."""
        first = int(self.first)
        return Gradient(
            mean=(self.entries / self.batches).cpu(),
            mean_abs=float(self.magnitude) / self.batches / max(1, self.entries.numel()),
            norm=float(self.norm) / self.batches,
            histogram=self.histogram.cpu(),
            batches=self.batches,
            nonfinite=int(self.nonfinite),
            first_nonfinite=None if first < 0 else first,
        )


class SinceLast:
    """Tells apart what each backward pass gave where gradients accumulate over several.

    A `.grad` that is the very tensor it was, written to once since, had the new gradient added to it. Written to more
    often, it was set to zero in between; not at all, this pass gave it nothing.
    """

    def __init__(self) -> None:
        self.seen: dict[str, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def batch(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the last backward pass gave, by name; the gradients as they stand now are remembered."""
        found: dict[str, Tensor] = {}
        old, new = list[Tensor](), list[Tensor]()
        for name, gradient in gradients.items():
            known, version, before = self.seen.get(name, NOTHING)
            same = known() is gradient
            if same and gradient._version == version:
                continue
            added = same and gradient._version == version + 1
            found[name] = gradient - before if added else gradient
            kept = before if before.shape == gradient.shape and before.dtype == gradient.dtype else gradient.clone()
            old.append(kept)
            new.append(gradient)
            self.seen[name] = (weakref.ref(gradient), gradient._version, kept)
        if new:
            torch._foreach_copy_(old, new)
        return found


NOTHING: tuple[weakref.ref[Tensor], int, Tensor] = (weakref.ref(torch.empty(0)), -1, torch.empty(0))


def single_batch(gradient: Tensor) -> Gradient:
    """Return what a single gradient comes to."""
    running = RunningGradients()
    running.add({"": gradient})
    return running.take()[""]


def dense(gradient: Tensor, scale: float) -> Tensor:
    """Return a gradient with all its entries, in float32 at least, divided by a scale."""
    full = gradient.detach()
    full = full.to_dense() if full.layout != torch.strided else full
    full = full if full.dtype in (torch.float32, torch.float64) else full.float()
    return full if scale == 1 else full / scale


def histograms(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return for each gradient the (256,) counts of its entries by float32 exponent."""
    exponents = [upper_halves(one).bitwise_right_shift(7).bitwise_and(EXPONENTS - 1) for one in gradients]
    on_cpu = all(one.device.type == "cpu" for one in exponents)
    return counted(exponents) if on_cpu else counted_together(exponents)


def counted(exponents: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return how often each exponent occurs in each tensor, one tensor after another."""
    return [torch.bincount(one, minlength=EXPONENTS) for one in exponents]


def counted_together(exponents: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the same from a single count, for a GPU, which has to be waited for at every count."""
    marked = [one.int() + number * EXPONENTS for number, one in enumerate(exponents)]
    return torch.bincount(torch.cat(marked), minlength=EXPONENTS * len(marked)).view(-1, EXPONENTS).unbind()


def upper_halves(gradient: Tensor) -> Tensor:
    """Return the upper 16 bits of each entry as float32, (n,) int16, in any order."""
    whole = gradient.float()
    dense = whole.is_contiguous() or whole.is_contiguous(memory_format=torch.channels_last)
    flat = whole.as_strided((whole.numel(),), (1,)) if dense and whole.dim() == 4 else whole.reshape(-1)
    return flat.view(torch.int16)[1::2]
