"""Watching a training by Hugging Face's `Trainer`: `Trainer(..., callbacks=[TransformersRecorder("runs/a")])`.

When the Trainer calls what (its source, `trainer.py`): the backward passes of an accumulation, in distributed training
with the mean over the processes in the last of them; then, where `max_grad_norm` is above 0, which it is by default,
Accelerate takes out the scale of mixed precision and clips; then `on_pre_optimizer_step`, where the gradients are read;
then the optimizer steps. No callback comes before the clipping. The numbers of an epoch are logged, and it is
evaluated, only after `on_epoch_end`.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from phosphene.errors import InvalidRequest, require_extra
from phosphene.rendering.recipes import Recipe
from phosphene.training.history import History, open_history
from phosphene.training.recorder import CAP, Recorder

LAST = "train_runtime"  # what only the log of the whole training has


def callback_class() -> Any:
    """Return the `TrainerCallback` of transformers.

    Raises:
        ExtraMissing: it is not installed.
    """
    return require_extra("transformers", "transformers").TrainerCallback


class TransformersRecorder(callback_class()):  # type: ignore[misc]
    """Records a training by Hugging Face's `Trainer`, epoch by epoch, and leaves the training as it is.

    One batch of the record is one step of the optimizer: its gradient is the one that the optimizer is to use, over all
    batches that were accumulated, the mean over all processes, without the scale of mixed precision. It has been
    clipped by then where `max_grad_norm` is above 0, as it is by default: the record says which. Give `max_grad_norm=0`
    to record gradients that are not clipped. Where a gradient is not finite, clipping spreads that to all weights.

    The metrics of an epoch are the last of each that was logged in it, the evaluation after it included. So an entry is
    written once these are there: when a checkpoint was saved, the next epoch begins, or the training ends. A training
    that goes on from a checkpoint goes on with the record; epochs that it trains again replace what was recorded.

    Args:
        store, layers, gradients, filters, every, data, loss, recipe, writer, cap: as for `Recorder`. `data` for
            `gradients="epoch"` may be batches as the model takes them, mappings with `labels`; then no loss is needed.
        network: which part of the model to record, a function from it to a module; by default all of it.

    Attributes:
        recorder: the Recorder of the training that goes on, or of the last one.

    Raises:
        InvalidRequest, LayerNotFound, ...: at the start of the training, as for `Recorder`; also where the weights are
            split up between processes.
    """

    def __init__(
        self,
        store: str | Path,
        layers: str = "conv*",
        gradients: str | None = "running",
        filters: str | None = None,
        every: int = 1,
        *,
        network: Callable[[Any], nn.Module] | None = None,
        data: Any = None,
        loss: Any = None,
        recipe: str | Recipe = "fast",
        writer: Any = None,
        cap: int = CAP,
    ) -> None:
        super().__init__()
        self.store, self.network = Path(store), network
        self.settings: dict[str, Any] = {
            "layers": layers, "gradients": gradients, "filters": filters, "every": every,
            "data": data, "loss": loss, "recipe": recipe, "writer": writer, "cap": cap,
        }  # fmt: skip
        self.recorder: Recorder | None = None
        self.steps = 0
        self.ended: int | None = None  # the epoch whose numbers are still to come
        self.numbers: dict[str, float] = {}

    @property
    def history(self) -> History:
        """The record as it lies on the disk, also where other processes did the training."""
        return open_history(self.store)

    def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Begin, or go on with, the record."""
        model = known["model"]
        if sharded(args, model):
            raise InvalidRequest(
                "DeepSpeed, FSDP and tensor parallelism split up the weights between processes, so that none has a "
                "gradient to record; train in data parallelism (torchrun), or on one device"
            )
        count = state.num_train_epochs
        self.recorder = Recorder(
            model if self.network is None else self.network(model),
            self.store,
            epochs=max(0, count - int(state.epoch or 0)) if 0 < count < sys.maxsize else None,
            **self.settings,
        )
        self.steps, self.ended, self.numbers = 0, None, {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Read the gradients that the optimizer is to use."""
        if self.recorder is not None:
            clipped = args.max_grad_norm is not None and args.max_grad_norm > 0
            self.recorder.after_backward(scaler=scaler_of(known.get("optimizer")), clipped=clipped)
            self.steps += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **known: Any) -> None:
        """Keep the numbers; after the log of the whole training the best weights may be loaded, so the epoch ends."""
        if LAST in (logs or {}):
            self.write()
            return
        found = {name: one for name, one in (logs or {}).items() if isinstance(one, int | float)}
        self.numbers |= {name: float(one) for name, one in found.items() if name not in ("epoch", "self")}

    def on_epoch_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Note that the epoch is over; `state.epoch` counts what part of the epochs is done."""
        if self.steps or self.settings["gradients"] != "running":
            self.ended = max(0, math.ceil(state.epoch or 0) - 1)
        elif self.recorder is not None:
            warnings.warn("no optimizer step was made in an epoch; it is not recorded", stacklevel=2)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Write the epoch before this one."""
        self.write()

    def on_save(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Write the epoch that ended, so that the record is not behind the checkpoint."""
        self.write()

    def on_train_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Write the last epoch, and let go of what is not needed any more."""
        self.write()
        if self.recorder is not None:
            self.recorder.close()

    def write(self) -> None:
        """Write the entry of the epoch that ended, if one waits for that."""
        if self.recorder is not None and self.ended is not None:
            epoch, numbers = self.ended, self.numbers
            self.steps, self.ended, self.numbers = 0, None, {}
            self.recorder.end_epoch(epoch, **numbers)


def sharded(args: Any, model: nn.Module) -> bool:
    """Return whether no process has a whole weight."""
    if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
        return True
    return any(type(one).__name__ == "DTensor" or type(one.data).__name__ == "DTensor" for one in model.parameters())


def scaler_of(optimizer: Any) -> Any:
    """Return the `GradScaler` whose scale is still in the gradients; None where there is none, or it was taken out.

    Before transformers 5.23 it is left in where nothing is clipped. Whether `unscale_` was called is known to the
    scaler only, and it tells nobody.
    """
    scaler = getattr(optimizer, "scaler", None)
    states = getattr(scaler, "_per_optimizer_states", {})
    stage = states.get(id(getattr(optimizer, "optimizer", optimizer)), {}).get("stage")
    return None if getattr(stage, "name", "") == "UNSCALED" else scaler
