"""Mean, norm and histogram of an epoch's gradients, summed up over the backward passes that a training does anyway."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EXPONENTS = 256  # the exponents of float32, one for each bin of a histogram
BIAS = 127


@dataclass(frozen=True, eq=False)
class Gradient:
    """The gradients of one weight tensor over an epoch.

    Attributes:
        mean: the mean over the batches, entry by entry, in the shape of the weight, on the CPU; or the gradient of the
            total loss.
        mean_abs: mean over the batches of the mean magnitude of the entries; `norm`: of their L2 norm.
        histogram: (256,) number of entries, of all batches, by float32 exponent: bin k counts
            2^(k-127) <= |g| < 2^(k-126), bin 0 also zeros, bin 255 NaN and infinity.
        batches: those in which the tensor had a gradient; `nonfinite` of these held NaN or infinity, the first of them
            is batch `first_nonfinite`, counted from 0.
    """

    mean: Tensor
    mean_abs: float
    norm: float
    histogram: Tensor
    batches: int
    nonfinite: int
    first_nonfinite: int | None


class RunningGradients:
    """Sums over the gradients of an epoch; nothing waits for the device until `take`."""

    def __init__(self) -> None:
        self.sums: dict[str, RunningSum] = {}
        self.batches = 0

    def add(self, gradients: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Add one batch's gradients by name, each divided by `scale`."""
        scaled = {name: dense(gradient, scale) for name, gradient in gradients.items()}
        for name, gradient in scaled.items():
            if name not in self.sums:
                self.sums[name] = RunningSum.zeros_like(gradient)
        sums, batch = [self.sums[name] for name in scaled], list(scaled.values())
        if not batch:
            return
        torch._foreach_add_([running_sum.entries for running_sum in sums], batch)
        norms, magnitudes = torch._foreach_norm(batch, 2), torch._foreach_norm(batch, 1)
        counts = histograms(batch)
        for running_sum, norm, magnitude, count in zip(sums, norms, magnitudes, counts, strict=True):
            running_sum.add(norm, magnitude, count, self.batches)
        self.batches += 1

    def take(self) -> dict[str, Gradient]:
        """Return the gradients by name, and reset the sums."""
        gradients = {name: running_sum.mean() for name, running_sum in self.sums.items()}
        self.sums, self.batches = {}, 0
        return gradients


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
    def zeros_like(cls, gradient: Tensor) -> RunningSum:
        """Return sums that are 0, for gradients like this one."""
        zero, count = gradient.new_zeros((), dtype=torch.float64), gradient.new_zeros((), dtype=torch.int64)
        return cls(
            entries=torch.zeros_like(gradient),
            norm=zero,
            magnitude=zero.clone(),
            histogram=gradient.new_zeros(EXPONENTS, dtype=torch.int64),
            nonfinite=count,
            first=count - 1,
        )

    def add(self, norm: Tensor, magnitude: Tensor, histogram: Tensor, batch: int) -> None:
        """Add the measures of one batch's gradient."""
        nonfinite = histogram[-1] > 0
        self.norm += norm
        self.magnitude += magnitude
        self.histogram += histogram
        self.first = torch.where(nonfinite & (self.first < 0), batch, self.first)
        self.nonfinite += nonfinite
        self.batches += 1

    def mean(self) -> Gradient:
        """Return the means over the batches, on the CPU."""
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


class AccumulationTracker:
    """Separates what each backward pass adds to gradients that accumulate over several.

    If a `.grad` is still the same tensor and was written to once since, the new gradient was added to it. If it was
    written to more often, it was set to zero in between; if not at all, this pass gave it no gradient.
    """

    def __init__(self) -> None:
        self.seen: dict[str, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def since_last(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the last backward pass added, by name, and remember the gradients as they are now."""
        added: dict[str, Tensor] = {}
        copies, originals = list[Tensor](), list[Tensor]()
        for name, gradient in gradients.items():
            reference, version, before = self.seen.get(name, NEVER_SEEN)
            same = reference() is gradient
            if same and gradient._version == version:
                continue
            added[name] = gradient - before if same and gradient._version == version + 1 else gradient
            copy = before if before.shape == gradient.shape and before.dtype == gradient.dtype else gradient.clone()
            copies.append(copy)
            originals.append(gradient)
            self.seen[name] = (weakref.ref(gradient), gradient._version, copy)
        if originals:
            torch._foreach_copy_(copies, originals)
        return added


NEVER_SEEN: tuple[weakref.ref[Tensor], int, Tensor] = (weakref.ref(torch.empty(0)), -1, torch.empty(0))


def single_batch(gradient: Tensor) -> Gradient:
    """Return the statistics of a single gradient."""
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
    exponents = [upper_halves(gradient).bitwise_right_shift(7).bitwise_and(EXPONENTS - 1) for gradient in gradients]
    on_cpu = all(tensor.device.type == "cpu" for tensor in exponents)
    return count_each(exponents) if on_cpu else count_at_once(exponents)


def count_each(exponents: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return how often each exponent occurs in each tensor, counting one tensor after another."""
    return [torch.bincount(tensor, minlength=EXPONENTS) for tensor in exponents]


def count_at_once(exponents: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the same from a single count, since every count waits for the GPU."""
    shifted = [tensor.int() + index * EXPONENTS for index, tensor in enumerate(exponents)]
    return torch.bincount(torch.cat(shifted), minlength=EXPONENTS * len(shifted)).view(-1, EXPONENTS).unbind()


def upper_halves(gradient: Tensor) -> Tensor:
    """Return the upper 16 bits of each entry as float32, (n,) int16, in any order."""
    full = gradient.float()
    dense = full.is_contiguous() or full.is_contiguous(memory_format=torch.channels_last)
    flat = full.as_strided((full.numel(),), (1,)) if dense and full.dim() == 4 else full.reshape(-1)
    return flat.view(torch.int16)[1::2]
