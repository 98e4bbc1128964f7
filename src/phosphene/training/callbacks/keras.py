"""Watching a Keras network learn: a callback for `fit`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from phosphene.errors import InvalidRequest, require_extra
from phosphene.rendering.recipes import Recipe
from phosphene.training.history import History
from phosphene.training.keras_adapter import backend_of, keras_network, loss_scale, seeds_kept
from phosphene.training.recorder import CAP, Recorder

keras = require_extra("keras", "keras")


class KerasRecorder(keras.callbacks.Callback):  # type: ignore[misc, name-defined]
    """Records a training with `fit`, epoch by epoch, and leaves the training as it is.

    On the torch backend `gradients="running"` reads what each training step leaves in `.grad`: of one batch, before
    clipping, as if the loss were not scaled. On the others `gradients="epoch"` takes the gradient of the total loss
    over `data` after each epoch, through the backend's own tape. `fit(initial_epoch=…)` goes on with a record.

    Keras numbers what is given no name: a network that is made twice in one process is called differently the second
    time, layers and weights too. Give names where a record is to be gone on with.

    Args:
        store, layers, gradients, filters, every, recipe, writer, cap: as of `Recorder`.
        data, loss: for `gradients="epoch"`, see `subject_keras.total_gradient`; by default the compiled loss.

    Attributes:
        recorder: the `Recorder` of the training that runs, None before its first epoch and after the last.
        history: the record, None before the first epoch of a training and in processes that write none.

    Raises:
        InvalidRequest: an argument is none, or `gradients="running"` on a backend that leaves no gradients.

    Example:
        >>> network.fit(images, classes, epochs=4, callbacks=[KerasRecorder("runs/a")])
    """

    def __init__(
        self,
        store: str | Path,
        layers: str = "conv*",
        gradients: str | None = "running",
        filters: str | None = None,
        every: int = 1,
        *,
        data: Any = None,
        loss: Any = None,
        recipe: str | Recipe = "fast",
        writer: Any = None,
        cap: int = CAP,
    ) -> None:
        super().__init__()
        if gradients == "running" and backend_of() != "torch":
            raise InvalidRequest(
                f"gradients='running' cannot be read on Keras' {backend_of()} backend, which shows no callback the "
                "gradients of a training step; give gradients='epoch' with data=, or gradients=None"
            )
        self.store = store
        self.settings = {
            "layers": layers,
            "gradients": gradients,
            "filters": filters,
            "every": every,
            "data": data,
            "loss": loss,
            "recipe": recipe,
            "writer": writer,
            "cap": cap,
        }
        self.running = gradients == "running"
        self.recorder: Recorder | None = None
        self.history: History | None = None
        self.scale = 1.0

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Let go of a training before, which may have been interrupted."""
        self.on_train_end()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Make the recorder in the first epoch: from its number follows how many are to come."""
        if self.recorder is not None:
            return
        subject = keras_network(self.model)
        if subject.scale is not None:
            subject = replace(subject, scale=lambda: self.scale)
        last = (self.params or {}).get("epochs")
        coming = None if last is None else max(0, last - epoch)
        with seeds_kept():  # looking for the filters runs the network
            self.recorder = Recorder(subject, self.store, epochs=coming, **self.settings)
        self.history = self.recorder.history

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Note by what the loss of this step is scaled: at its end Keras may have changed that already."""
        if self.running:
            self.scale = loss_scale(self.model)

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Take in the gradients, which stay in `.grad` until the next step; Keras clips copies of them."""
        if self.running and self.recorder is not None:
            self.recorder.after_backward()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Write the entry of the epoch, with all that Keras logs as metrics."""
        if self.recorder is None:
            return
        with seeds_kept():  # rendering filters does, too
            self.recorder.end_epoch(epoch, **dict(logs or {}))

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Close the recorder; `history` stays."""
        if self.recorder is not None:
            self.recorder.close()
            self.recorder = None
