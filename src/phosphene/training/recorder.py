"""Watching a network learn: its kernels, gradients and filters, epoch by epoch."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from phosphene.arguments import whole_number
from phosphene.errors import Interrupted, InvalidRequest, LayerNotFound, first_line
from phosphene.network.channel_ranges import parse_channels
from phosphene.network.loading.keras import is_keras_model
from phosphene.network.model import Model
from phosphene.rendering.objectives import channel
from phosphene.rendering.recipes import Recipe, find_recipe
from phosphene.rendering.render import render
from phosphene.rendering.result import Rendered
from phosphene.training.adapter import TrainedNetwork, torch_network
from phosphene.training.disk_budget import bytes_of, bytes_per_epoch, check_cap, in_bytes
from phosphene.training.gradient_statistics import Gradient, RunningGradients, SinceLast, single_batch
from phosphene.training.history import EpochRecord, History, kernels_of, resume_or_create, size_of
from phosphene.training.keras_adapter import keras_network
from phosphene.training.writers import matched_writers, publish
from phosphene.version import __version__

CAP = 10 * 2**30
KINDS = ("running", "epoch", None)
CLIPPING = {False: "before clipping", True: "after clipping"}


class Recorder:
    """Records a training, epoch by epoch, and leaves the training as it is.

    Args:
        model: the network that is trained: a PyTorch module (also compiled, or in data parallelism), a Keras model, or
            a `Model` from `load`, which also knows the preprocessing to render filters with.
        store: the folder for the record. A record of the same network that is there is gone on with.
        layers: glob over the convolutions whose kernels are kept, by path or kind; `conv*` means all of them.
        gradients: `running`: the mean over the epoch's batches, from the backward passes that the training does
            (`after_backward`); `epoch`: of the mean loss over `data`, at the end of each epoch (R2.2a); or None.
        filters: LAYER:CHANNELS, such as `conv1:0:8`: filters to render after each epoch, from the same seed.
        every: record the epochs whose number is divisible by this.
        data, loss: for `gradients="epoch"`, see `subject.total_gradient`.
        recipe: to render filters by.
        writer: a TensorBoard `SummaryWriter` or a Weights & Biases run, or a list of such, that gets everything too.
        epochs: how many are to come, where known, so that the cap can be looked at in advance.
        cap: bytes that the record may take. Nothing is ever thinned out to fit.

    In distributed training all processes make one, and that of rank 0 writes.

    Raises:
        LayerNotFound, ChannelNotFound, RecipeNotFound: there is no such layer, channel, or recipe.
        InvalidRequest: an argument is none, the record would outgrow the cap, or the folder holds another's.
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
        check_kinds(store=(store, str | Path), layers=(layers, str), filters=(filters, str | None), cap=(cap, int))
        self.subject = as_subject(model)
        self.layers = matching(layers, self.subject.kinds)
        check(self.subject, gradients, data, every)
        matched_writers(writer)
        find_recipe(recipe)
        if epochs is not None:
            whole_number(epochs, "epochs")
        store = Path(store).expanduser()
        self.kind, self.every, self.data, self.loss, self.writer = gradients, every, data, loss, writer
        self.film = None if filters is None else epoch_filters_of(self.subject, filters, recipe)
        if gradients == "epoch":
            self.subject.total_gradient(data, loss, 1)  # what does not work is better known before the training
        self.cap = cap
        self.running, self.since_last, self.clipped = RunningGradients(), SinceLast(), set[bool]()
        self.history: History | None = None
        if is_first_process():
            facts = self.facts()
            kernels = [self.subject.kernels[path]() for path in self.layers]
            weights = list(self.subject.weights().values()) if self.kind else []
            each = bytes_per_epoch(kernels, weights, self.film.pixels if self.film else 0)
            check_cap(store, each, -(-(epochs or 1) // self.every), cap)
            self.history = resume_or_create(store, facts)
            self.used = size_of(self.history.folder)
            self.last = max(self.history.epochs, default=-1)

    def facts(self) -> dict[str, Any]:
        """Return what is recorded, of which network, in JSON terms."""
        trained = self.subject.weights()
        return {
            "model": self.subject.name,
            "weights": [
                {"name": name, "shape": list(shape), "dtype": dtype, "trained": name in trained}
                for name, shape, dtype in self.subject.described()
            ],
            "layers": [{"path": path, "kind": self.subject.kinds[path]} for path in self.layers],
            "gradients": self.kind,
            "filters": self.film and self.film.facts(),
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
        """Let go of the sums of an epoch that was not ended; what is recorded is on the disk already."""
        self.running, self.since_last = RunningGradients(), SinceLast()

    def after_backward(self, *, scaler: Any = None, clipped: bool = False) -> None:
        """Take in the gradients as they stand in `.grad`.

        To be called before `optimizer.step()` and `zero_grad()`: after each backward pass, which is then one batch,
        also where gradients accumulate over several; or once after the last of these, so that what the optimizer is to
        use is one batch. In distributed training that is after the gradients were averaged over the processes.

        Args:
            scaler: the `GradScaler`, where there is one; whether its `unscale_` has been called is seen.
            clipped: whether the gradients have been clipped before this call, which is noted in the record.

        Raises:
            InvalidRequest: there is no gradient, or none since the last call.
        """
        if self.history is None or self.kind != "running":
            return
        scale = self.subject.scale() if self.subject.scale else 1.0
        scale *= scale_of(scaler)
        found = {name: one.grad for name, one in self.subject.weights().items() if one.grad is not None}
        batch = self.since_last.batch(found)
        if not batch:
            raise InvalidRequest(
                "no weight has a new gradient: call after_backward() after loss.backward(), and before zero_grad()"
            )
        self.running.add(batch, scale)
        self.clipped.add(clipped)

    def end_epoch(self, epoch: int, /, **metrics: float | Tensor) -> None:
        """Write the entry of an epoch; where the disk is full the training goes on with a warning.

        An epoch that was recorded before is moved to `replaced/` together with all later ones.

        Raises:
            InvalidRequest: the number is none, a metric is no number, or no backward pass was seen.
        """
        epoch = whole_number(epoch, "an epoch")
        numbers = {name: as_number(name, one) for name, one in metrics.items()}
        if self.history is None:
            return
        if epoch % self.every:
            self.running.take()
            self.clipped.clear()
            return
        if self.kind == "running" and not self.running.batches:
            raise InvalidRequest(
                f"no backward pass was seen in epoch {epoch}: call recorder.after_backward() after each "
                "loss.backward(), or record with gradients=None"
            )
        entry = self.entry(epoch, numbers, self.history.facts)
        for note in (*entry.notes, *self.keep(self.history, entry)):
            warnings.warn(note, stacklevel=2)
        if self.writer is not None:
            publish(self.writer, entry)

    def entry(self, epoch: int, metrics: Mapping[str, float], described: Mapping[str, Any]) -> EpochRecord:
        """Return what is to be recorded of an epoch of what the record describes."""
        facts: dict[str, Any] = {}
        if self.kind == "running":
            read = " and ".join(CLIPPING[one] for one in sorted(self.clipped))
            facts = {"kind": "running", "read": read, "batches": self.running.batches}
            found = self.running.take()
            self.clipped.clear()
        elif self.kind == "epoch":
            facts = {"kind": "epoch", "read": "of the total loss", "batches": 1}
            found = {name: single_batch(one) for name, one in self.subject.total_gradient(self.data, self.loss).items()}
        else:
            found = {}
        weights = self.subject.weights()
        kernels = {path: self.subject.kernels[path]().detach().cpu().clone().contiguous() for path in self.layers}
        filters, notes = self.film.rendered() if self.film else (None, ())
        ordered = {name: found[name] for name in weights if name in found}
        return EpochRecord(
            epoch=epoch,
            metrics=metrics,
            kernels={path: kernels_of(path, one, described, epoch) for path, one in kernels.items()},
            gradients=ordered,
            weight_norms={name: float(weights[name].detach().norm()) for name in ordered},
            facts=facts,
            filters=filters,
            notes=(*notes, *not_finite(epoch, ordered)),
        )

    def keep(self, history: History, entry: EpochRecord) -> list[str]:
        """Write an entry, and return what the user should know: that it does not fit the cap or the disk, or replaces.

        Whatever happens here, the training goes on.
        """
        size = bytes_of(entry)
        if self.used + size > self.cap:
            return [
                f"epoch {entry.epoch} is not recorded: {in_bytes(size)} more would take the record in "
                f"{history.folder} beyond its cap of {in_bytes(self.cap)}; give a larger cap"
            ]
        notes = []
        try:
            known = entry.epoch <= self.last or entry.epoch in history
            if known and (aside := history.set_aside(entry.epoch)):
                notes = [f"epoch {entry.epoch} was recorded before; it and what came after it is now in {aside}"]
            self.used += history.write(entry)
            self.last = entry.epoch
        except OSError as error:
            notes += [f"epoch {entry.epoch} is not recorded, the training goes on: {error}"]
        return notes


class EpochFilters(NamedTuple):
    """Filters that are rendered after every epoch, from the same seed."""

    model: Model
    layer: str
    channels: list[int]
    recipe: Recipe

    @property
    def pixels(self) -> int:
        """How many bytes the pictures have before they are packed."""
        return len(self.channels) * self.model.channels_in * self.recipe.size**2

    def facts(self) -> dict[str, Any]:
        """Return which filters, in JSON terms."""
        return {"layer": self.layer, "channels": self.channels, "recipe": self.recipe.as_dict()}

    def rendered(self) -> tuple[Rendered | None, tuple[str, ...]]:
        """Return the filters as they are now, or what kept them from being rendered."""
        try:
            return render(self.model, channel(self.layer, self.channels), self.recipe), ()
        except Interrupted:
            raise
        except Exception as error:  # whatever it is, the training goes on
            return None, (f"filters were not rendered: {first_line(error)}",)


def as_subject(model: Any) -> TrainedNetwork:
    """Return what is recorded, whichever framework it is of.

    Raises:
        InvalidRequest: it is no network.
    """
    if isinstance(model, TrainedNetwork):
        return model
    if is_keras_model(model):
        return keras_network(model)
    if isinstance(model, nn.Module | Model):
        return torch_network(model)
    raise InvalidRequest(f"a Recorder watches a torch.nn.Module or a Keras model, not a {type(model).__name__}")


def matching(pattern: str, kinds: Mapping[str, str]) -> list[str]:
    """Return the paths of the convolutions that a glob means; `conv*` means all, whatever they are called.

    Raises:
        LayerNotFound: none; the message lists what there is.
    """
    names = {path: (path, path.lstrip("."), kind, kind.lower(), "convolution") for path, kind in kinds.items()}
    found = [path for path, all_names in names.items() if any(fnmatch.fnmatchcase(one, pattern) for one in all_names)]
    if not found and kinds:
        raise LayerNotFound(f"no convolution matches {pattern!r}; there are: {', '.join(kinds)}")
    return found


def check(subject: TrainedNetwork, gradients: str | None, data: Any, every: int) -> None:
    """Refuse settings that cannot be recorded."""
    if any(type(one).__name__ == "DTensor" for one in subject.weights().values()):
        raise InvalidRequest(
            "the weights are split up between processes (FSDP, tensor parallelism), so that none has a gradient to "
            "record; train in data parallelism (DDP), or on one device"
        )
    if gradients not in KINDS:
        raise InvalidRequest(f"gradients is 'running', 'epoch' or None, not {gradients!r}")
    if gradients == "epoch" and data is None:
        raise InvalidRequest("gradients='epoch' needs data=, over which the total loss is taken, and loss=")
    if gradients == "running" and not subject.has_grad:
        raise InvalidRequest(
            "gradients='running' reads what backward passes leave in .grad, which this backend has not; give "
            "gradients='epoch' with data=, or gradients=None"
        )
    whole_number(every, "every", 1)
    if gradients == "running" and not subject.weights():
        raise InvalidRequest("no weight of the network is trained; unfreeze some, or record with gradients=None")


def check_kinds(**given: tuple[Any, Any]) -> None:
    """Refuse arguments of another kind than they have to be."""
    for name, (value, kind) in given.items():
        if not isinstance(value, kind):
            what = getattr(kind, "__name__", str(kind))
            raise InvalidRequest(f"{name} is of the kind {what}, not {value!r}")


def scale_of(scaler: Any) -> float:
    """Return what a `GradScaler` has multiplied the gradients with; 1 where its `unscale_` took that out again."""
    if scaler is None:
        return 1.0
    if not hasattr(scaler, "get_scale"):
        raise InvalidRequest(f"scaler is a torch.amp.GradScaler, not a {type(scaler).__name__}")
    stages = [one.get("stage") for one in getattr(scaler, "_per_optimizer_states", {}).values()]
    taken_out = bool(stages) and all(getattr(one, "name", "") == "UNSCALED" for one in stages)
    return 1.0 if taken_out else float(scaler.get_scale())


def epoch_filters_of(subject: TrainedNetwork, filters: str, recipe: str | Recipe) -> EpochFilters:
    """Return the filters that LAYER:CHANNELS means.

    Raises:
        LayerNotFound, ChannelNotFound, InvalidRequest: there are none such.
    """
    if subject.model is None:
        raise InvalidRequest("filters are rendered with PyTorch; train on Keras' torch backend, or leave filters out")
    layer, _, channels = filters.partition(":")
    model = subject.model()
    found = model.find(int(layer) if layer.isdigit() else layer)
    if found.channels is None or not found.is_map:
        raise InvalidRequest(f"{layer} has no map of channels to render; give a convolution as LAYER:0:8")
    return EpochFilters(model, found.path, parse_channels(channels or "all", found.channels), find_recipe(recipe))


def is_first_process() -> bool:
    """Return whether this is the process of a distributed training that writes, or the only one."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def as_number(name: str, value: Any) -> float:
    """Return a metric as a number.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        return float(value.detach()) if isinstance(value, Tensor) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InvalidRequest(f"a metric is one number, and {name} is {value!r}") from error


def not_finite(epoch: int, gradients: Mapping[str, Gradient]) -> list[str]:
    """Return in words which gradients of an epoch were NaN or infinite."""
    bad = [(name, one) for name, one in gradients.items() if one.nonfinite]
    return [
        f"epoch {epoch}: the gradient of {name} was NaN or infinite in {one.nonfinite} of {one.batches} batches, "
        f"first in batch {one.first_nonfinite}"
        for name, one in bad[:3]
    ] + [f"epoch {epoch}: so were those of {len(bad) - 3} more weights"] * (len(bad) > 3)
