"""Watching a Lightning training: `Trainer(callbacks=[LightningRecorder("runs/a")])`.

The order of a step in Lightning 2 (its source, `plugins/precision`): the backward passes of an accumulation, the last
of which averages over the processes of distributed training; the scale of mixed precision is divided out;
`on_before_optimizer_step`, where the gradients are read; they are clipped; the optimizer steps.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor, nn

from phosphene.errors import InvalidRequest, nearest, require_extra
from phosphene.training.adapter import TrainedNetwork, torch_network
from phosphene.training.callbacks.options import RecorderOptions, recorder_arguments
from phosphene.training.history import History, open_history
from phosphene.training.recorder import Recorder
from phosphene.training.writers import matched_writers

PACKAGES = ("lightning.pytorch", "pytorch_lightning")  # one package under two names
SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")  # no process has a whole weight


def callback_class() -> Any:
    """Return Lightning's `Callback`; if both packages are installed, of the one that the user has imported."""
    for name in sorted(PACKAGES, key=lambda name: name not in sys.modules):
        with suppress(ImportError):
            return importlib.import_module(name).Callback
    return require_extra(PACKAGES[0], "lightning").Callback


class LightningRecorder(callback_class()):  # type: ignore[misc]
    """Records a Lightning training, epoch by epoch, and leaves the training unchanged.

    One batch of the record is one step of an optimizer. Its gradient is the one that the optimizer uses, over all
    accumulated batches, the mean over all processes, without the scale of mixed precision, before clipping. The metrics
    of an epoch are those of `trainer.callback_metrics` that were logged in it, validation included; what the module
    logs only in its own `on_train_epoch_end` comes too late. A fit that continues from a checkpoint continues the
    record; epochs that it trains again replace what was recorded of them.

    In manual optimisation each `optimizer.step()` is one batch, of the weights that this optimizer holds.

    Args:
        store: the folder for the record.
        network: what to record of the LightningModule: the path of a module in it, or a function from it to one; by
            default all of it, with the names that it uses.
        clipped: whether a module with manual optimisation has clipped its gradients before `optimizer.step()`, which
            cannot be detected; the record says so.
        options: `layers, gradients, filters, every, data, loss, recipe, writer, cap` of `Recorder`, the first four also
            by position. `writer=True` stands for the TensorBoard and Weights & Biases loggers of the Trainer.

    Raises:
        InvalidRequest, LayerNotFound, ...: at the start of the fit, as for `Recorder`; also if the weights are split
            between processes, or `writer=True` finds no logger to write to.
    """

    def __init__(
        self,
        store: str | Path,
        *positional: Any,
        network: str | Callable[[Any], nn.Module] | None = None,
        clipped: bool = False,
        **options: Unpack[RecorderOptions],
    ) -> None:
        super().__init__()
        self.store, self.network, self.clipped = Path(store), network, clipped
        self.arguments = recorder_arguments(self.store, positional, options)
        self.recorder: Recorder | None = None  # of the current fit, or of the last one
        self.stepping: set[int] | None = None  # identities of the weights of the optimizer that steps now
        self.steps = 0
        self.logged: dict[str, Any] = {}  # the metrics of earlier epochs

    @property
    def history(self) -> History:
        """The record on the disk, also if other processes did the training."""
        return open_history(self.store)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Create or continue the record; the sanity check of the validation is over by now."""
        strategy = type(trainer.strategy).__name__
        if strategy in SHARDED:
            raise InvalidRequest(
                f"{strategy} splits up the weights between processes, so that none has a gradient to record; train "
                "with strategy='ddp', or on one device"
            )
        limit, writer = trainer.max_epochs, self.arguments["writer"]
        self.recorder = Recorder(
            self.with_stepping_weights(recorded_module(pl_module, self.network)),
            epochs=None if limit in (None, -1) else max(0, limit - trainer.current_epoch),
            **self.arguments | {"writer": loggers_of(trainer) if writer is True else writer},
        )
        self.steps, self.logged = 0, dict(trainer.callback_metrics)

    def with_stepping_weights(self, module: nn.Module) -> TrainedNetwork:
        """Return a network whose weights are, while an optimizer steps, only those that it holds."""
        network = torch_network(module)
        return replace(network, weights=partial(self.stepping_weights, network.weights))

    def stepping_weights(self, weights: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the trainable weights, while an optimizer steps only those that it holds."""
        stepping = self.stepping
        return {name: weight for name, weight in weights().items() if stepping is None or id(weight) in stepping}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Read the gradients that the optimizer is about to use."""
        if self.recorder is None:
            return
        self.stepping = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        try:
            # the optimizer of another network has no gradients here, nor has a step whose training_step returned None
            if any(weight.grad is not None for weight in self.recorder.network.weights().values()):
                clipped = self.clipped and not pl_module.automatic_optimization
                self.recorder.after_backward(scaler=scaler_of(trainer, optimizer), clipped=clipped)
                self.steps += 1
        finally:
            self.stepping = None

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Record the epoch."""
        if self.recorder is None:
            return
        metrics = dict(trainer.callback_metrics)
        # a value that is still the same object was logged in an earlier epoch, such as by a validation every second one
        fresh = {name: value for name, value in metrics.items() if value is not self.logged.get(name)}
        self.logged = metrics
        if not self.steps and self.arguments["gradients"] == "running":
            warnings.warn(
                f"no optimizer step had a gradient in epoch {trainer.current_epoch}; not recorded", stacklevel=2
            )
            return
        self.steps = 0
        self.recorder.end_epoch(trainer.current_epoch, **numbers(fresh))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the recorder."""
        if self.recorder is not None:
            self.recorder.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the recorder; finished epochs are on the disk."""
        self.on_train_end(trainer, pl_module)


def recorded_module(module: nn.Module, network: str | Callable[[Any], nn.Module] | None) -> nn.Module:
    """Return the part of a LightningModule that is to be recorded."""
    if network is None:
        return module
    if isinstance(network, str):
        parts: dict[str, nn.Module] = {path: part for path, part in module.named_modules() if path}
        if network not in parts:
            raise InvalidRequest(f"the module has no part {network!r}; it has {nearest(network, parts)}")
        return parts[network]
    part: nn.Module = network(module)
    if not isinstance(part, nn.Module):
        raise InvalidRequest(f"network= has to return a torch.nn.Module, not a {type(part).__name__}")
    return part


def scaler_of(trainer: Any, optimizer: Any) -> Any:
    """Return the `GradScaler` whose scale is still in the gradients: of an optimizer that divides by it itself.

    Lightning leaves that to fused optimizers; for all others it has divided by the scale by now.
    """
    plugin = trainer.precision_plugin if getattr(optimizer, "_step_supports_amp_scaling", False) else None
    return getattr(plugin, "scaler", None)


def loggers_of(trainer: Any) -> list[Any]:
    """Return the writers of the Trainer's TensorBoard and Weights & Biases loggers, on the process that writes."""
    if not trainer.is_global_zero:
        return []
    writers: list[Any] = []
    for logger in trainer.loggers:
        try:
            writers += [writer for writer, _ in matched_writers(logger.experiment)]
        except InvalidRequest:
            continue
    if not writers:
        names = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "none"
        raise InvalidRequest(
            f"writer=True needs a TensorBoardLogger or a WandbLogger in the Trainer, which has {names}; "
            "add one, or leave writer out"
        )
    return writers


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that are one number each, without `epoch`, which the record has anyway."""
    single = {name: value for name, value in metrics.items() if not isinstance(value, Tensor) or value.numel() == 1}
    return {name: float(value) for name, value in single.items() if name not in ("epoch", "self")}
