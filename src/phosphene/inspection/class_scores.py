"""Class scores: which logit a class has, its probability, and finding a class by its name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phosphene.errors import ChannelNotFound, InvalidRequest, nearest


@dataclass(frozen=True)
class ClassScore:
    """A class and its probability."""

    index: int
    name: str
    probability: float


def is_binary(logits: Tensor, labels: Sequence[str]) -> bool:
    """Return whether one logit stands for two classes: it speaks for the second, and its opposite for the first."""
    return logits.shape[1] == 1 and len(labels) == 2


def target_logits(logits: Tensor, targets: Sequence[int], labels: Sequence[str]) -> Tensor:
    """Return from logits (b, k) that of each image's target class, (b,)."""
    indices = torch.tensor(targets, device=logits.device)
    if is_binary(logits, labels):
        return logits[:, 0] * (2 * indices - 1)
    return logits.gather(1, indices[:, None])[:, 0]


def class_probabilities(logits: Tensor, labels: Sequence[str]) -> Tensor:
    """Return the probabilities (b, k): the softmax, or the sigmoid of a single logit.

    Logits that are probabilities already are returned as they are. A single logit with two class names gives both
    probabilities, (b, 2).
    """
    if logits.shape[1] == 1:
        second = logits.sigmoid()
        return torch.cat([1 - second, second], 1) if is_binary(logits, labels) else second
    if bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-3).all()):
        return logits  # the network ends in a softmax of its own that could not be taken off
    return logits.softmax(1)


def class_indices(targets: Any, logits: Tensor, labels: Sequence[str]) -> list[int]:
    """Return the class of each image by index: its target, or the most probable class where the target is None."""
    if isinstance(targets, Tensor):
        targets = targets.tolist()
    per_image = [targets] * len(logits) if targets is None or isinstance(targets, int | str) else list(targets)
    if len(per_image) != len(logits):
        raise InvalidRequest(f"there are {len(per_image)} targets for {len(logits)} images; give one, or one for each")
    count = 2 if is_binary(logits, labels) else logits.shape[1]
    pairs = zip(per_image, class_probabilities(logits.detach(), labels).argmax(1).tolist(), strict=True)
    return [top if target is None else class_index(target, count, labels) for target, top in pairs]


def class_index(target: int | str, count: int, labels: Sequence[str]) -> int:
    """Return the index of a class among `count`, by index or by name.

    Case does not matter. A class matches if its name equals the target; if no name does, if it contains the target.

    Raises:
        ChannelNotFound: no class matches, or several do.
    """
    if isinstance(target, str):
        wanted = normalised(target)
        names = [normalised(label) for label in labels[:count]]
        matches = [index for index, name in enumerate(names) if name == wanted]
        if not matches and wanted.isascii() and wanted.isdigit():
            return class_index(int(wanted), count, labels)
        matches = matches or [index for index, name in enumerate(names) if wanted and wanted in name]
        if len(matches) == 1:
            return matches[0]
        raise ChannelNotFound(no_single_match(target, matches, count, labels))
    if isinstance(target, bool) or not 0 <= target < count:
        raise ChannelNotFound(f"there is no class {target}: the network has {count}, 0 to {count - 1}")
    return int(target)


def normalised(name: str) -> str:
    return name.replace("_", " ").strip().casefold()


def no_single_match(target: str, matches: Sequence[int], count: int, labels: Sequence[str]) -> str:
    """Return the message for a class name that no class matches, or several."""
    if not labels:
        return f"the network has no class names to find {target!r} among; give an index, 0 to {count - 1}"
    if not matches:
        return f"no class is called {target!r}; the nearest are: {nearest(normalised(target), labels)}"
    listed = ", ".join(f"{index} {labels[index]}" for index in matches[:12])
    more = f" and {len(matches) - 12} more" if len(matches) > 12 else ""
    return f"{target!r} may be any of {len(matches)} classes: {listed}{more}; give the whole name or the index"


def class_name(index: int, labels: Sequence[str], count: int) -> str:
    """Return the name of a class among `count`; one without a name is "class 3", or "the only output"."""
    if index < len(labels) and len(labels) <= max(count, 2):
        return labels[index]
    return "the only output" if count == 1 else f"class {index}"
