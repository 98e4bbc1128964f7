"""Watching a training by Hugging Face's `Trainer`: `Trainer(..., callbacks=[TransformersRecorder("runs/a")])`.

The order of a step in the Trainer (its source, `trainer.py`): the backward passes of an accumulation, the last of which
averages over the processes of distributed training; if `max_grad_norm` is above 0, as it is by default, Accelerate
divides out the scale of mixed precision and clips; `on_pre_optimizer_step`, where the gradients are read; the optimizer
steps. No callback comes before the clipping. An epoch's metrics are logged, and it is evaluated, after `on_epoch_end`.
"""

import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from phosphene.errors import InvalidRequest, require_extra
from phosphene.training.callbacks.options import RecorderOptions, recorder_arguments
from phosphene.training.history import History, open_history
from phosphene.training.recorder import Recorder

LAST = "train_runtime"  # only the log of the whole training has it


def callback_class() -> Any:
    """Return the `TrainerCallback` of transformers."""
    return require_extra("transformers", "transformers").TrainerCallback


class TransformersRecorder(callback_class()):  # type: ignore[misc]
    """Records a training by Hugging Face's `Trainer`, epoch by epoch, and leaves the training unchanged.

    One batch of the record is one step of the optimizer. Its gradient is the one that the optimizer uses, over all
    accumulated batches, the mean over all processes, without the scale of mixed precision. It is clipped already if
    `max_grad_norm` is above 0, as it is by default; the record says whether it is. Give `max_grad_norm=0` to record
    unclipped gradients. If a gradient is not finite, clipping spreads that to all weights.

    An epoch's metrics are the last values that were logged in it under each name, including the evaluation after it.
    So an epoch is recorded once these exist: when a checkpoint was saved, the next epoch begins, or the training ends.
    A training that continues from a checkpoint continues the record; epochs that it trains again replace what was
    recorded.

    Args:
        store: the folder for the record.
        network: which part of the model to record, a function from it to a module; by default all of it.
        options: `layers, gradients, filters, every, data, loss, recipe, writer, cap` of `Recorder`, the first four also
            by position. `data` for `gradients="epoch"` may be batches as the model takes them, mappings with `labels`;
            then no loss is needed.

    Raises:
        InvalidRequest, LayerNotFound, ...: at the start of the training, as for `Recorder`; also if the weights are
            split between processes.
    """

    def __init__(
        self,
        store: str | Path,
        *positional: Any,
        network: Callable[[Any], nn.Module] | None = None,
        **options: Unpack[RecorderOptions],
    ) -> None:
        super().__init__()
        self.store, self.network = Path(store), network
        self.arguments = recorder_arguments(self.store, positional, options)
        self.recorder: Recorder | None = None  # of the current training, or of the last one
        self.steps = 0
        self.ended: int | None = None  # the epoch that ended and whose metrics are not complete
        self.metrics: dict[str, float] = {}

    @property
    def history(self) -> History:
        """The record on the disk, also if other processes did the training."""
        return open_history(self.store)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Create or continue the record."""
        model = kwargs["model"]
        if is_sharded(args, model):
            raise InvalidRequest(
                "DeepSpeed, FSDP and tensor parallelism split up the weights between processes, so that none has a "
                "gradient to record; train in data parallelism (torchrun), or on one device"
            )
        count = state.num_train_epochs
        self.recorder = Recorder(
            model if self.network is None else self.network(model),
            epochs=max(0, count - int(state.epoch or 0)) if 0 < count < sys.maxsize else None,
            **self.arguments,
        )
        self.steps, self.ended, self.metrics = 0, None, {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the gradients that the optimizer is about to use."""
        if self.recorder is not None:
            clipped = args.max_grad_norm is not None and args.max_grad_norm > 0
            self.recorder.after_backward(scaler=scaler_of(kwargs.get("optimizer")), clipped=clipped)
            self.steps += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the metrics; record the epoch at the log of the whole training, before the best weights are loaded."""
        if LAST in (logs or {}):
            self.write()
            return
        numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        self.metrics |= {name: float(value) for name, value in numbers.items() if name not in ("epoch", "self")}

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that the epoch is over; `state.epoch` is the fractional number of epochs that are done."""
        if self.steps or self.arguments["gradients"] != "running":
            self.ended = max(0, math.ceil(state.epoch or 0) - 1)
        elif self.recorder is not None:
            warnings.warn("no optimizer step was made in an epoch; it is not recorded", stacklevel=2)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the epoch before this one."""
        self.write()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the epoch that ended, so that the record is not behind the checkpoint."""
        self.write()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the last epoch, and close the recorder."""
        self.write()
        if self.recorder is not None:
            self.recorder.close()

    def write(self) -> None:
        """Record the epoch that ended, if it is not recorded yet."""
        if self.recorder is not None and self.ended is not None:
            epoch, metrics = self.ended, self.metrics
            self.steps, self.ended, self.metrics = 0, None, {}
            self.recorder.end_epoch(epoch, **metrics)


def is_sharded(args: Any, model: nn.Module) -> bool:
    """Return whether the weights are split between processes."""
    if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
        return True
    return any("DTensor" in (type(weight).__name__, type(weight.data).__name__) for weight in model.parameters())


def scaler_of(optimizer: Any) -> Any:
    """Return the `GradScaler` whose scale is still in the gradients; None if there is none, or they were unscaled.

    Before transformers 5.23 they are not unscaled if nothing is clipped. Whether `unscale_` was called is only in the
    scaler's private state.
    """
    scaler = getattr(optimizer, "scaler", None)
    states = getattr(scaler, "_per_optimizer_states", {})
    stage = states.get(id(getattr(optimizer, "optimizer", optimizer)), {}).get("stage")
    return None if getattr(stage, "name", "") == "UNSCALED" else scaler
