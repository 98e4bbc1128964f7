"""What is wrong with the gradients of a training, in words."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from phosphene.training.gradient_norms import GradientNorms
from phosphene.training.history import History

VANISHING = 1e-3  # of the last layer's gradient: less vanishes
STANDSTILL = 2.0**-24  # of the weight's norm: half of float32's precision
EXPLODING = 1000.0  # times the weight's norm
GROWTH, LARGE = 100.0, 100.0  # times the first epoch's gradient, if it is also that many times the weight's norm
NAMED = 4  # weights that a sentence names if there are at least two more


def verdicts(history: History) -> list[str]:
    """Return in words what is wrong with the gradients of a training, a sentence each; or that nothing is.

    - NaN or infinity: in which batch first.
    - Exactly 0: in the last epoch, for all batches; or no gradient at all.
    - Vanishing, in the last epoch: the root mean square of a gradient's entries is less than a thousandth of the last
      layer's, and so is its norm over the weight's norm. In nine networks of torchvision that began to train, from
      AlexNet to DenseNet-121, and in smaller ones that had learned, one of the two was always above a hundredth; in a
      network of five layers with sigmoids, each of which passes on a quarter at most, both fell below a thousandth, and
      the loss stood still. ConvNeXt's vanish until its layer scale has grown, which starts at a millionth.
      Also: the norm is less than 2^-24 of the weight's, which float32 rounds off, so that plain gradient descent at a
      rate of 1 would leave the weight as it is.
    - Exploding, in any epoch: the norm is a thousand times the weight's, or a hundred times it and a hundred times what
      it was in the first epoch. A ResNet-50 begins at 300 times. Growth alone is no fault: when a deep network
      begins to learn after a while, the gradients of its first layers grow ten thousandfold, to a few times the norm of
      the weight. A loss that is a sum over samples is as many times larger; the sentence says so.

    Biases and scales are left out of the last two: they start at 0 or at 1, and a batch normalisation takes the
    gradient away from the bias before it.

    Raises:
        InvalidRequest: the run holds no finished epoch, or no gradients.
    """
    return verdicts_of(GradientNorms.of(history))


def verdicts_of(norms: GradientNorms) -> list[str]:
    """Return in words what is wrong with gradients; see `verdicts`."""
    checks = (check_finite, check_zero, check_vanishing, check_exploding)
    sentences = [sentence for check in checks for sentence in check(norms)]
    extent = f"{len(norms.names)} weights over {len(norms.epochs)} epoch{'s' * (len(norms.epochs) > 1)}"
    return sentences or [
        f"nothing is wrong with the gradients of the {extent}: none vanishes, explodes, is exactly 0, or holds NaN "
        "or infinity"
    ]


def check_finite(norms: GradientNorms) -> Iterator[str]:
    """Say which gradients hold NaN or infinity, and where it began."""
    bad = norms.nonfinite > 0
    if not bool(bad.any()):
        return
    row = int(bad.any(1).nonzero()[0])
    batch = int(norms.first[row][bad[row]].min())
    at_first = bad[row] & (norms.first[row] == batch)
    amount = int(norms.nonfinite[row].max())
    yield (
        f"NaN or infinity: it began in epoch {norms.epochs[row]}, batch {batch} (counted from 0), in the "
        f"{gradients_of(norms, at_first)}; {amount} of the {int(norms.batches[row].max())} batches of that epoch "
        f"have it, and {int(bad.any(0).sum())} of {len(norms.names)} weights in all"
    )


def check_zero(norms: GradientNorms) -> Iterator[str]:
    """Say which gradients are exactly 0 or missing in the last epoch."""
    for mask, diagnosis in (
        (norms.norm == 0, "exactly 0 in all batches: dead units before or after them let nothing through"),
        (norms.batches == 0, "not there: these weights play no part in the loss"),
    ):
        if bool(mask[-1].any()):
            since = {norms.epochs[first_row(mask[:, index])] for index in mask[-1].nonzero()[:, 0].tolist()}
            period = f"since epoch {min(since)}" if len(norms.epochs) > 1 else f"in epoch {norms.epochs[-1]}"
            yield f"zero: the {gradients_of(norms, mask[-1])} {is_are(mask[-1])} {diagnosis} ({period})"


def check_vanishing(norms: GradientNorms) -> Iterator[str]:
    """Say which gradients vanish in the last epoch."""
    epoch, ratio, rms = norms.epochs[-1], norms.ratio[-1], norms.rms[-1]
    alive = norms.layered & (norms.norm[-1] > 0) & norms.norm[-1].isfinite()
    columns = alive.nonzero()[:, 0].tolist()
    if not columns:
        return
    last = columns[-1]
    share = rms / rms[last]
    small = alive & (share < VANISHING) & (ratio / ratio[last] < VANISHING)
    if bool(small.any()):
        worst = int(torch.where(small, share, math.inf).argmin())
        yield (
            f"vanishing: the {gradients_of(norms, small)} {is_are(small)} less than {VANISHING:g} of the last "
            f"layer's in epoch {epoch}; in {norms.names[worst]} the root mean square is "
            f"{float(rms[worst]):.2g}, and {float(rms[last]):.2g} in {norms.names[last]}"
        )
    still = alive & ~small & (ratio < STANDSTILL)
    if bool(still.any()):
        worst = int(torch.where(still, ratio, math.inf).argmin())
        yield (
            f"vanishing: the {gradients_of(norms, still)} {is_are(still)} smaller than what float32 rounds "
            f"off the weight, in epoch {epoch}; in {norms.names[worst]} the norm is {float(ratio[worst]):.2g} of the "
            "weight's, which is as it should be only where the loss can get no lower"
        )


def check_exploding(norms: GradientNorms) -> Iterator[str]:
    """Say which gradients explode, in the epoch in which they are largest."""
    grown = norms.norm / norms.norm[0]
    high = (norms.ratio >= EXPLODING) | ((grown >= GROWTH) & (norms.ratio >= LARGE))
    high &= norms.layered & norms.norm.isfinite() & (norms.weight_norm > 0)
    if not bool(high.any()):
        return
    row, column = divmod(int(torch.where(high, norms.ratio, 0).argmax()), len(norms.names))
    growth = float(grown[row, column])
    rise = f", {growth:,.0f} times the first epoch's" if 1.5 < growth < math.inf else ""
    yield (
        f"exploding: the {gradients_of(norms, high.any(0))}; in epoch {norms.epochs[row]} the norm in "
        f"{norms.names[column]} is {float(norms.norm[row, column]):.3g}, {float(norms.ratio[row, column]):,.0f} times "
        f"the weight's norm{rise}; a smaller rate or clipping helps, and a loss that is a mean over the samples, not a "
        "sum"
    )


def first_row(mask: Tensor) -> int:
    """Return the row from which on a mask (epochs,) is true to the last."""
    misses = (~mask).nonzero()
    return int(misses[-1]) + 1 if len(misses) else 0


def gradients_of(norms: GradientNorms, mask: Tensor) -> str:
    """Return "gradients of" the weights that a mask (weights,) selects, with at most five names."""
    names: Sequence[str] = [name for name, selected in zip(norms.names, mask.tolist(), strict=True) if selected]
    listed = names if len(names) <= NAMED + 1 else names[:NAMED]
    more = f" and {len(names) - NAMED} more weights" if len(listed) < len(names) else ""
    return f"gradient{'s' * (len(names) > 1)} of {', '.join(listed)}{more}"


def is_are(mask: Tensor) -> str:
    return "is" if int(mask.sum()) == 1 else "are"
