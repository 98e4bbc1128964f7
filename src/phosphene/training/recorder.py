"""Watching a network learn: its kernels, gradients and filters, epoch by epoch."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from phosphene.arguments import whole_number
from phosphene.errors import InvalidRequest, LayerNotFound
from phosphene.network.loading.keras import is_keras_model
from phosphene.network.model import Model
from phosphene.rendering.recipes import Recipe, find_recipe
from phosphene.training.adapter import TrainedNetwork, torch_network
from phosphene.training.disk_budget import bytes_per_epoch, check_cap, folder_bytes, in_bytes, record_bytes
from phosphene.training.epoch_filters import EpochFilters
from phosphene.training.epoch_record import EpochRecord, nonfinite_notes, recorded_kernels
from phosphene.training.gradient_statistics import AccumulationTracker, Gradient, RunningGradients, single_batch
from phosphene.training.history import History, resume_or_create
from phosphene.training.keras_adapter import keras_network
from phosphene.training.writers import matched_writers, publish
from phosphene.version import __version__

CAP = 10 * 2**30
GRADIENTS = ("running", "epoch", None)
CLIPPING = {False: "before clipping", True: "after clipping"}


class Recorder:
    """Records a training, epoch by epoch, and leaves the training unchanged.

    Args:
        model: the network in training: a PyTorch module (also compiled, or in data parallelism), a Keras model, or a
            `Model` from `load`, which also knows the preprocessing to render filters with.
        store: the folder for the record. A record of the same network in it is continued.
        layers: glob over the convolutions whose kernels are recorded, by path or kind; `conv*` means all of them.
        gradients: `running`: the mean over the epoch's batches, from the backward passes of the training
            (`after_backward`); `epoch`: of the mean loss over `data`, at the end of each epoch (R2.2a); or None.
        filters: LAYER:CHANNELS, such as `conv1:0:8`: filters to render after each epoch, always from the same seed.
        every: record only the epochs whose number is divisible by this.
        data, loss: for `gradients="epoch"`, see `adapter.total_gradient`.
        recipe: how to render the filters.
        writer: a TensorBoard `SummaryWriter` or a Weights & Biases run, or a list of these, to show each epoch in too.
        epochs: how many are planned, if known, so that the cap can be checked before the training.
        cap: the most bytes that the record may take. Nothing is ever thinned out to fit.

    In distributed training every process makes a Recorder, and that of rank 0 writes.

    Raises:
        LayerNotFound, ChannelNotFound, RecipeNotFound: there is no such layer, channel, or recipe.
        InvalidRequest: an argument is not valid, the record would exceed the cap, or the folder holds something else.
        OutputRefused: the folder cannot be written.

    Example:
        >>> with Recorder(net, "runs/a") as recorder:
        ...     for epoch in range(4):
        ...         for images, classes in loader:
        ...             optimizer.zero_grad()
        ...             cross_entropy(net(images), classes).backward()
        ...             recorder.after_backward()
        ...             optimizer.step()
        ...         recorder.end_epoch(epoch)
    """

    def __init__(
        self,
        model: nn.Module | Model | TrainedNetwork,
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
        epochs: int | None = None,
        cap: int = CAP,
    ) -> None:
        check_types(store=(store, str | Path), layers=(layers, str), filters=(filters, str | None), cap=(cap, int))
        self.network = trained_network(model)
        self.layers = matching_layers(layers, self.network.kinds)
        check_settings(self.network, gradients, data)
        every = whole_number(every, "every", 1)
        matched_writers(writer)
        find_recipe(recipe)
        if epochs is not None:
            whole_number(epochs, "epochs")
        store = Path(store).expanduser()
        self.gradients, self.every, self.data, self.loss, self.writer = gradients, every, data, loss, writer
        self.filters = None if filters is None else EpochFilters.parse(self.network, filters, recipe)
        if gradients == "epoch":
            self.network.total_gradient(data, loss, 1)  # so that what does not work fails before the training
        self.cap = cap
        self.running, self.accumulation, self.clipped = RunningGradients(), AccumulationTracker(), set[bool]()
        self.history: History | None = None
        if is_first_process():
            facts = self.facts()
            kernels = [self.network.kernels[path]() for path in self.layers]
            weights = list(self.network.weights().values()) if gradients else []
            epoch_bytes = bytes_per_epoch(kernels, weights, self.filters.pixels if self.filters else 0)
            check_cap(store, epoch_bytes, -(-(epochs or 1) // every), cap)
            self.history = resume_or_create(store, facts)
            self.used = folder_bytes(self.history.folder)
            self.last = max(self.history.epochs, default=-1)

    def facts(self) -> dict[str, Any]:
        """Return what is recorded, of which network, as JSON values."""
        trainable = self.network.weights()
        return {
            "model": self.network.name,
            "weights": [
                {"name": name, "shape": list(shape), "dtype": dtype, "trained": name in trainable}
                for name, shape, dtype in self.network.weight_specs()
            ],
            "layers": [{"path": path, "kind": self.network.kinds[path]} for path in self.layers],
            "gradients": self.gradients,
            "filters": self.filters and self.filters.facts(),
            "every": self.every,
            "versions": {"phosphene": __version__, "torch": torch.__version__},
        }

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the sums of an epoch that did not end; finished epochs are on the disk already."""
        self.running, self.accumulation = RunningGradients(), AccumulationTracker()

    def after_backward(self, *, scaler: Any = None, clipped: bool = False) -> None:
        """Add the gradients that are in `.grad` now.

        Call it before `optimizer.step()` and `zero_grad()`: after each backward pass, which then counts as one batch,
        even if gradients accumulate over several passes; or once after the last of these, so that the gradient that the
        optimizer uses counts as one batch. In distributed training call it after the average over the processes.

        Args:
            scaler: the `GradScaler`, if there is one; whether its `unscale_` has been called is detected.
            clipped: whether the gradients have been clipped already; the record says so.

        Raises:
            InvalidRequest: there is no gradient, or none since the last call.
        """
        if self.history is None or self.gradients != "running":
            return
        scale = self.network.scale() if self.network.scale else 1.0
        scale *= scale_of(scaler)
        weights = self.network.weights()
        gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        batch = self.accumulation.since_last(gradients)
        if not batch:
            raise InvalidRequest(
                "no weight has a new gradient: call after_backward() after loss.backward(), and before zero_grad()"
            )
        self.running.add(batch, scale)
        self.clipped.add(clipped)

    def end_epoch(self, epoch: int, /, **metrics: float | Tensor) -> None:
        """Record an epoch; if the disk is full the training continues with a warning.

        An epoch that was recorded before is moved to `replaced/` together with all later ones.

        Raises:
            InvalidRequest: the epoch or a metric is not a number, or there was no backward pass.
        """
        epoch = whole_number(epoch, "an epoch")
        numbers = {name: as_number(name, value) for name, value in metrics.items()}
        if self.history is None:
            return
        if epoch % self.every:
            self.running.take()
            self.clipped.clear()
            return
        if self.gradients == "running" and not self.running.batches:
            raise InvalidRequest(
                f"no backward pass was seen in epoch {epoch}: call recorder.after_backward() after each "
                "loss.backward(), or record with gradients=None"
            )
        record = self.epoch_record(epoch, numbers, self.history.facts)
        for note in (*record.notes, *self.write(self.history, record)):
            warnings.warn(note, stacklevel=2)
        if self.writer is not None:
            publish(self.writer, record)

    def epoch_record(self, epoch: int, metrics: Mapping[str, float], facts: Mapping[str, Any]) -> EpochRecord:
        """Return what is to be recorded of an epoch; `facts` are those of the whole record."""
        gradient_facts, gradients = self.take_gradients()
        weights = self.network.weights()
        kernels = {path: self.network.kernels[path]().detach().cpu().clone().contiguous() for path in self.layers}
        filters, notes = self.filters.render_all() if self.filters else (None, ())
        ordered = {name: gradients[name] for name in weights if name in gradients}
        return EpochRecord(
            epoch=epoch,
            metrics=metrics,
            kernels={path: recorded_kernels(path, kernel, facts, epoch) for path, kernel in kernels.items()},
            gradients=ordered,
            weight_norms={name: float(weights[name].detach().norm()) for name in ordered},
            facts=gradient_facts,
            filters=filters,
            notes=(*notes, *nonfinite_notes(epoch, ordered)),
        )

    def take_gradients(self) -> tuple[dict[str, Any], dict[str, Gradient]]:
        """Return how the epoch's gradients were taken, as JSON values, and the gradients by weight; two {} without."""
        if self.gradients == "running":
            read = " and ".join(CLIPPING[clipped] for clipped in sorted(self.clipped))
            self.clipped.clear()
            return {"kind": "running", "read": read, "batches": self.running.batches}, self.running.take()
        if self.gradients == "epoch":
            gradients = self.network.total_gradient(self.data, self.loss)
            facts = {"kind": "epoch", "read": "of the total loss", "batches": 1}
            return facts, {name: single_batch(gradient) for name, gradient in gradients.items()}
        return {}, {}

    def write(self, history: History, record: EpochRecord) -> list[str]:
        """Write an epoch's record, and return warnings: that it does not fit, or replaces an earlier one.

        Whatever happens here, the training continues.
        """
        size = record_bytes(record)
        if self.used + size > self.cap:
            return [
                f"epoch {record.epoch} is not recorded: {in_bytes(size)} more would take the record in "
                f"{history.folder} beyond its cap of {in_bytes(self.cap)}; give a larger cap"
            ]
        notes = []
        try:
            repeated = record.epoch <= self.last or record.epoch in history
            if repeated and (replaced := history.set_aside(record.epoch)):
                notes = [f"epoch {record.epoch} was recorded before; it and all later epochs are now in {replaced}"]
            self.used += history.write(record)
            self.last = record.epoch
        except OSError as error:
            notes += [f"epoch {record.epoch} is not recorded, the training goes on: {error}"]
        return notes


def trained_network(model: Any) -> TrainedNetwork:
    """Return a model of either framework as a network in training."""
    if isinstance(model, TrainedNetwork):
        return model
    if is_keras_model(model):
        return keras_network(model)
    if isinstance(model, nn.Module | Model):
        return torch_network(model)
    raise InvalidRequest(f"a Recorder watches a torch.nn.Module or a Keras model, not a {type(model).__name__}")


def matching_layers(pattern: str, kinds: Mapping[str, str]) -> list[str]:
    """Return the paths of the convolutions that match a glob; `conv*` matches all of them, whatever their names."""
    aliases = {path: (path, path.lstrip("."), kind, kind.lower(), "convolution") for path, kind in kinds.items()}
    paths = [path for path, names in aliases.items() if any(fnmatch.fnmatchcase(name, pattern) for name in names)]
    if not paths and kinds:
        raise LayerNotFound(f"no convolution matches {pattern!r}; there are: {', '.join(kinds)}")
    return paths


def check_settings(network: TrainedNetwork, gradients: str | None, data: Any) -> None:
    """Refuse settings with which the network cannot be recorded."""
    if any(type(weight).__name__ == "DTensor" for weight in network.weights().values()):
        raise InvalidRequest(
            "the weights are split up between processes (FSDP, tensor parallelism), so that none has a gradient to "
            "record; train in data parallelism (DDP), or on one device"
        )
    if gradients not in GRADIENTS:
        raise InvalidRequest(f"gradients is 'running', 'epoch' or None, not {gradients!r}")
    if gradients == "epoch" and data is None:
        raise InvalidRequest("gradients='epoch' needs data=, over which the total loss is taken, and loss=")
    if gradients == "running" and not network.has_grad:
        raise InvalidRequest(
            "gradients='running' reads what backward passes leave in .grad, which this backend does not have; give "
            "gradients='epoch' with data=, or gradients=None"
        )
    if gradients == "running" and not network.weights():
        raise InvalidRequest("no weight of the network is trained; unfreeze some, or record with gradients=None")


def check_types(**arguments: tuple[Any, Any]) -> None:
    """Refuse arguments, each given as (value, type), that are of another type."""
    for name, (value, expected) in arguments.items():
        if not isinstance(value, expected):
            raise InvalidRequest(f"{name} is of type {getattr(expected, '__name__', expected)}, not {value!r}")


def scale_of(scaler: Any) -> float:
    """Return what a `GradScaler` has multiplied the gradients with; 1 if its `unscale_` has already divided by it."""
    if scaler is None:
        return 1.0
    if not hasattr(scaler, "get_scale"):
        raise InvalidRequest(f"scaler is a torch.amp.GradScaler, not a {type(scaler).__name__}")
    stages = [state.get("stage") for state in getattr(scaler, "_per_optimizer_states", {}).values()]
    unscaled = bool(stages) and all(getattr(stage, "name", "") == "UNSCALED" for stage in stages)
    return 1.0 if unscaled else float(scaler.get_scale())


def is_first_process() -> bool:
    """Return whether this process writes: the only one, or that of rank 0 in distributed training."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def as_number(name: str, value: Any) -> float:
    """Return a metric as a number."""
    try:
        return float(value.detach()) if isinstance(value, Tensor) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InvalidRequest(f"a metric is one number, and {name} is {value!r}") from error
