"""Watching a Keras network learn: a callback for `fit`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from phosphene.errors import InvalidRequest, require_extra
from phosphene.training.callbacks.options import RecorderOptions, recorder_arguments
from phosphene.training.history import History
from phosphene.training.keras_adapter import keras_network, loss_scale
from phosphene.training.keras_variables import backend_of, restoring_global_seed
from phosphene.training.recorder import Recorder

keras = require_extra("keras", "keras")


class KerasRecorder(keras.callbacks.Callback):  # type: ignore[misc, name-defined]
    """Records a training with `fit`, epoch by epoch, and leaves the training unchanged.

    On the torch backend `gradients="running"` reads what each training step leaves in `.grad`: the gradient of one
    batch, before clipping, without the loss scale. On the other backends `gradients="epoch"` takes the gradient of the
    total loss over `data` after each epoch, by the backend's own means. `fit(initial_epoch=…)` continues a record.

    Keras numbers what has no name: if a process makes a network twice, the second one has another name, and so have its
    layers and weights. Give names if a record is to be continued.

    Args:
        store: the folder for the record.
        options: `layers, gradients, filters, every, data, loss, recipe, writer, cap` of `Recorder`, the first four also
            by position. `loss` is by default the compiled one; for it and `data` see `keras_gradients.total_gradient`.

    Attributes:
        recorder: the `Recorder` of the current training, None before its first epoch and after the last.
        history: the record, None before the first epoch of a training and in processes that write none.

    Raises:
        InvalidRequest: `gradients="running"` on a backend that leaves no gradients; at the start of the training, as
            for `Recorder`.

    Example:
        >>> network.fit(images, classes, epochs=4, callbacks=[KerasRecorder("runs/a")])
    """

    def __init__(self, store: str | Path, *positional: Any, **options: Unpack[RecorderOptions]) -> None:
        super().__init__()
        self.arguments = recorder_arguments(store, positional, options)
        self.running = self.arguments["gradients"] == "running"
        if self.running and backend_of() != "torch":
            raise InvalidRequest(
                f"gradients='running' cannot be read on Keras' {backend_of()} backend, which shows no callback the "
                "gradients of a training step; give gradients='epoch' with data=, or gradients=None"
            )
        self.recorder: Recorder | None = None
        self.history: History | None = None
        self.scale = 1.0

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Close the recorder of an earlier training, which may have been interrupted."""
        self.on_train_end()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Make the recorder in the first epoch, whose number says how many remain."""
        if self.recorder is not None:
            return
        network = keras_network(self.model)
        if network.scale is not None:
            network = replace(network, scale=lambda: self.scale)
        last = (self.params or {}).get("epochs")
        remaining = None if last is None else max(0, last - epoch)
        with restoring_global_seed():  # finding the layer of the filters runs the network
            self.recorder = Recorder(network, epochs=remaining, **self.arguments)
        self.history = self.recorder.history

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Remember the loss scale of this step, which Keras may have changed by its end."""
        if self.running:
            self.scale = loss_scale(self.model)

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Read the gradients, which stay in `.grad` until the next step; Keras clips copies of them."""
        if self.running and self.recorder is not None:
            self.recorder.after_backward()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Record the epoch, with everything that Keras logs as metrics."""
        if self.recorder is None:
            return
        with restoring_global_seed():  # rendering filters runs it, too
            self.recorder.end_epoch(epoch, **dict(logs or {}))

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Close the recorder and keep its `history`."""
        if self.recorder is not None:
            self.recorder.close()
            self.recorder = None
