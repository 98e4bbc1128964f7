"""Watching a Lightning training: `Trainer(callbacks=[LightningRecorder("runs/a")])`.

When Lightning 2 calls what (its source, `plugins/precision`): the backward passes of an accumulation, in distributed
training with the mean over the processes in the last of them; then the scale of mixed precision is taken out; then
`on_before_optimizer_step`, where the gradients are read; then they are clipped; then the optimizer steps.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from phosphene.errors import InvalidRequest, nearest, require_extra
from phosphene.rendering.recipes import Recipe
from phosphene.training.adapter import TrainedNetwork, torch_network
from phosphene.training.history import History, open_history
from phosphene.training.recorder import CAP, Recorder
from phosphene.training.writers import matched_writers

PACKAGES = ("lightning.pytorch", "pytorch_lightning")  # the same under two names
SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")  # no process has a whole weight


def callback_class() -> Any:
    """Return Lightning's `Callback`, of the package that the user has imported where there are both.

    Raises:
        ExtraMissing: there is neither.
    """
    imported = [name for name in PACKAGES if name in sys.modules]
    available = imported or [name for name in PACKAGES if find_spec(name.partition(".")[0])] or PACKAGES
    return require_extra(available[0], "lightning").Callback


class LightningRecorder(callback_class()):  # type: ignore[misc]
    """Records a Lightning training, epoch by epoch, and leaves the training as it is.

    One batch of the record is one step of an optimizer: its gradient is the one that the optimizer is to use, over all
    batches that were accumulated, the mean over all processes, without the scale of mixed precision, before clipping.
    The metrics of an epoch are those of `trainer.callback_metrics` that were logged in it, validation included; what
    the module logs only in its own `on_train_epoch_end` comes too late. A fit that goes on from a checkpoint goes on
    with the record; epochs that it trains again replace what was recorded of them.

    In manual optimisation each `optimizer.step()` is one batch, of the weights that this optimizer holds.

    Args:
        store, layers, gradients, filters, every, data, loss, recipe, cap: as for `Recorder`.
        network: what to record of the LightningModule: the path of a module in it, or a function from it to one; by
            default all of it, with the names that it uses.
        writer: as for `Recorder`; True for the TensorBoard and Weights & Biases loggers of the Trainer.
        clipped: whether a module with manual optimisation has clipped its gradients by the time of `optimizer.step()`,
            which cannot be seen from outside; it is noted in the record.

    Attributes:
        recorder: the Recorder of the fit that goes on, or of the last one.

    Raises:
        InvalidRequest, LayerNotFound, ...: at the start of the fit, as for `Recorder`; also where the weights are split
            up between processes, or `writer=True` finds no logger to write to.
    """

    def __init__(
        self,
        store: str | Path,
        layers: str = "conv*",
        gradients: str | None = "running",
        filters: str | None = None,
        every: int = 1,
        *,
        network: str | Callable[[Any], nn.Module] | None = None,
        data: Any = None,
        loss: Any = None,
        recipe: str | Recipe = "fast",
        writer: Any = None,
        cap: int = CAP,
        clipped: bool = False,
    ) -> None:
        super().__init__()
        self.store, self.network, self.writer, self.clipped = Path(store), network, writer, clipped
        self.settings: dict[str, Any] = {
            "layers": layers, "gradients": gradients, "filters": filters, "every": every,
            "data": data, "loss": loss, "recipe": recipe, "cap": cap,
        }  # fmt: skip
        self.recorder: Recorder | None = None
        self.stepping: set[int] | None = None  # the weights of the optimizer that steps now, by identity
        self.steps = 0
        self.earlier: dict[str, Any] = {}

    @property
    def history(self) -> History:
        """The record as it lies on the disk, also where other processes did the training."""
        return open_history(self.store)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin, or go on with, the record; the sanity check of the validation is over by now."""
        strategy = type(trainer.strategy).__name__
        if strategy in SHARDED:
            raise InvalidRequest(
                f"{strategy} splits up the weights between processes, so that none has a gradient to record; train "
                "with strategy='ddp', or on one device"
            )
        limit = trainer.max_epochs
        self.recorder = Recorder(
            self.watched(chosen(pl_module, self.network)),
            self.store,
            writer=loggers_of(trainer) if self.writer is True else self.writer,
            epochs=None if limit in (None, -1) else max(0, limit - trainer.current_epoch),
            **self.settings,
        )
        self.steps, self.earlier = 0, dict(trainer.callback_metrics)

    def watched(self, network: nn.Module) -> TrainedNetwork:
        """Return a network as a subject, whose weights are those of the optimizer that steps, while one does."""
        subject = torch_network(network)
        return replace(subject, weights=partial(self.stepping_only, subject.weights))

    def stepping_only(self, weights: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the trainable weights, while an optimizer steps only its own."""
        return {name: one for name, one in weights().items() if self.stepping is None or id(one) in self.stepping}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Read the gradients that the optimizer is to use."""
        if self.recorder is None:
            return
        self.stepping = {id(one) for group in optimizer.param_groups for one in group["params"]}
        try:
            # a step of another network's optimizer has none, nor has one whose training_step returned None
            if any(one.grad is not None for one in self.recorder.subject.weights().values()):
                clipped = self.clipped and not pl_module.automatic_optimization
                self.recorder.after_backward(scaler=scaler_of(trainer, optimizer), clipped=clipped)
                self.steps += 1
        finally:
            self.stepping = None

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the epoch."""
        if self.recorder is None:
            return
        now = dict(trainer.callback_metrics)
        # a number that is still the same object was logged in an earlier epoch, such as by a validation every second
        fresh = {name: one for name, one in now.items() if one is not self.earlier.get(name)}
        self.earlier = now
        if not self.steps and self.settings["gradients"] == "running":
            warnings.warn(
                f"no optimizer step had a gradient in epoch {trainer.current_epoch}; not recorded", stacklevel=2
            )
            return
        self.steps = 0
        self.recorder.end_epoch(trainer.current_epoch, **numbers(fresh))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Let go of what is not needed any more."""
        if self.recorder is not None:
            self.recorder.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let go of an epoch that was not ended; the finished ones are on the disk."""
        self.on_train_end(trainer, pl_module)


def chosen(module: nn.Module, network: str | Callable[[Any], nn.Module] | None) -> nn.Module:
    """Return the part of a LightningModule that is to be recorded.

    Raises:
        InvalidRequest: there is no such part.
    """
    if network is None:
        return module
    if isinstance(network, str):
        parts: dict[str, nn.Module] = {path: one for path, one in module.named_modules() if path}
        if network not in parts:
            raise InvalidRequest(f"the module has no part {network!r}; it has {nearest(network, parts)}")
        return parts[network]
    found: nn.Module = network(module)
    if not isinstance(found, nn.Module):
        raise InvalidRequest(f"network= has to return a torch.nn.Module, not a {type(found).__name__}")
    return found


def scaler_of(trainer: Any, optimizer: Any) -> Any:
    """Return the `GradScaler` whose scale is still in the gradients: of an optimizer that takes it out by itself.

    Lightning leaves that to fused optimizers; from all others it has taken it out by now.
    """
    plugin = trainer.precision_plugin if getattr(optimizer, "_step_supports_amp_scaling", False) else None
    return getattr(plugin, "scaler", None)


def loggers_of(trainer: Any) -> list[Any]:
    """Return what the Trainer's TensorBoard and Weights & Biases loggers write with, on the process that writes.

    Raises:
        InvalidRequest: it has no such logger.
    """
    if not trainer.is_global_zero:
        return []
    found = []
    for logger in trainer.loggers:
        try:
            found += [one for one, _ in matched_writers(logger.experiment)]
        except InvalidRequest:
            continue
    if not found:
        there = ", ".join(type(one).__name__ for one in trainer.loggers) or "none"
        raise InvalidRequest(
            f"writer=True needs a TensorBoardLogger or a WandbLogger in the Trainer, which has {there}; "
            "add one, or leave writer out"
        )
    return found


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that are one number each; `epoch` is the entry's own."""
    single = {name: one for name, one in metrics.items() if not isinstance(one, Tensor) or one.numel() == 1}
    return {name: float(one) for name, one in single.items() if name not in ("epoch", "self")}
