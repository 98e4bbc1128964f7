"""Folding batch normalisations into the convolutions before them, for the length of a forward pass.

With the statistics of the training, a batch normalisation multiplies each channel by one number and adds another. If
the weights and the bias of the convolution before it include the two numbers, the result is the same within rounding,
and one pass over the map is saved (Jacob 2018, arXiv:1712.05877, section 3.2).

`batchnorm_pairs` finds the pairs for which that is right. `BatchNormFolding` holds the folded weights, and puts them
in place of the modules' own while a pass runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules

from phosphene.network.batchnorm_pairs import ConvNormPair
from phosphene.network.capture import identity

EXACT_DTYPES = (torch.float32, torch.float64)  # in the others, rounding the folded weights would show


class BatchNormFolding:
    """The folded weights of those pairs of a network that can be folded now.

    The network has to be in evaluation mode. The weights are computed when first needed, and again once those of the
    network have changed.
    """

    def __init__(self, root: nn.Module, modules: Mapping[str, nn.Module], pairs: Iterable[ConvNormPair]) -> None:
        foldable = [pair for pair in pairs if is_foldable(root, modules, pair)]
        self.pairs = [(modules[pair.convolution], modules[pair.norm]) for pair in foldable]
        self.folded_weights: list[FoldedWeights | None] = []
        self.versions: list[int] = []

    def weights(self) -> Sequence[FoldedWeights | None]:
        """Return what replaces each pair, None for a pair whose folded weights are not finite."""
        versions = [tensor._version for pair in self.pairs for module in pair for tensor in module_tensors(module)]
        if versions != self.versions:
            self.folded_weights = [fold(*pair) for pair in self.pairs]
            self.versions = versions
        return self.folded_weights

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Have the convolutions do the work of the normalisations, and on exit leave all modules as they were."""
        replacements = [(*pair, new) for pair, new in zip(self.pairs, self.weights(), strict=True) if new]
        before = [{name: conv._parameters[name] for name in new.weights} for conv, _, new in replacements]
        try:
            for convolution, norm, new in replacements:
                convolution._parameters.update(new.weights)
                vars(norm)["forward"] = new.norm_forward  # takes precedence over the class's method; hooks still run
            yield
        finally:
            for (convolution, norm, _), parameters in zip(replacements, before, strict=True):
                convolution._parameters.update(parameters)
                vars(norm).pop("forward", None)


@dataclass(frozen=True, eq=False)
class FoldedWeights:
    """What replaces a pair: weights of the convolution by name, and what is left for the normalisation to do."""

    weights: dict[str, nn.Parameter]
    norm_forward: Callable[[Tensor], Tensor]


def module_tensors(module: nn.Module) -> list[Tensor]:
    """Return the module's own weights and statistics."""
    return [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]


def is_foldable(root: nn.Module, modules: Mapping[str, nn.Module], pair: ConvNormPair) -> bool:
    """Return whether a pair is still as the survey found it, and folding it changes nothing that the user can see.

    The weights are the modules' own and of an exact dtype; nobody has replaced a module or its `forward`; and the user
    has no hooks on a module that takes or returns the tensor between the two.
    """
    convolution, norm = modules[pair.convolution], modules[pair.norm]
    if not all(is_at(root, path, module) for path, module in ((pair.convolution, convolution), (pair.norm, norm))):
        return False
    if not isinstance(convolution, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
        return False
    tensors = [*module_tensors(convolution), *module_tensors(norm)]
    weights = [tensor for tensor in tensors if tensor.is_floating_point()]
    plain = all(type(weight) in (Tensor, nn.Parameter) and weight.dtype in EXACT_DTYPES for weight in weights)
    alike = len({(weight.dtype, weight.device) for weight in weights}) == 1
    patched = is_patched(convolution) or is_patched(norm)
    hooked = any(has_hooks(modules[path]) for path in paths_between(pair) if path in modules)
    return "weight" in convolution._parameters and plain and alike and not patched and not hooked


def is_at(root: nn.Module, path: str, module: nn.Module) -> bool:
    try:
        return root.get_submodule(path) is module
    except AttributeError:
        return False


def paths_between(pair: ConvNormPair) -> Collection[str]:
    """Return the paths of the modules that take or return the tensor between the two, or might do so."""
    return {*pair.between, *(path_and_parents(pair.convolution) ^ path_and_parents(pair.norm))}


def path_and_parents(path: str) -> set[str]:
    """Return the path and those of the modules that hold it, without the network itself."""
    names = path.split(".")
    return {".".join(names[:count]) for count in range(1, len(names) + 1)}


def is_patched(module: nn.Module) -> bool:
    """Return whether the module instance has a forward pass that is not its class's."""
    return any(name in vars(module) for name in ("forward", "_conv_forward"))


def has_hooks(module: nn.Module) -> bool:
    """Return whether the module has hooks, or all modules have."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(map(bool, (*hooks, of_all_modules._global_forward_hooks, of_all_modules._global_forward_pre_hooks)))


def fold(convolution: nn.Module, norm: nn.Module) -> FoldedWeights | None:
    """Return the folded weights, or None if any factor or shift is not finite.

    The weight (out, in, kh, kw) lies in memory with the channels last. A subclass of `nn.Conv2d` without a bias might
    ignore one that is added, so the normalisation adds the shift instead.
    """
    parameters: dict[str, Any] = dict(convolution._parameters)
    scale = to_float64(norm.weight, 1) / (to_float64(norm.running_var) + cast(float, norm.eps)).sqrt()
    shift = (to_float64(parameters.get("bias"), 0) - to_float64(norm.running_mean)) * scale + to_float64(norm.bias, 0)
    if not bool(torch.isfinite(scale).all() & torch.isfinite(shift).all()):
        return None
    old: Tensor = parameters["weight"].detach()
    weight = torch.empty_like(old, memory_format=torch.channels_last).copy_(old).mul_(scale.to(old).view(-1, 1, 1, 1))
    weights, shift = {"weight": nn.Parameter(weight, requires_grad=False)}, shift.to(old)
    if parameters.get("bias") is None and type(convolution) is not nn.Conv2d:
        return FoldedWeights(weights, lambda input: input.add_(shift.view(-1, 1, 1)))  # nothing else holds `input`
    return FoldedWeights({**weights, "bias": nn.Parameter(shift, requires_grad=False)}, identity)


def to_float64(tensor: Any, default: float = 0.0) -> Tensor:
    """Return a tensor in float64 on the CPU (not every device has float64), or `default` if there is no tensor."""
    return torch.tensor(default, dtype=torch.float64) if tensor is None else tensor.detach().cpu().double()
