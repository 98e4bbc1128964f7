"""The Lightning callback: its record against plain loops that are written out here."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from phosphene import errors
from phosphene.training.history import open_history

pytest.importorskip("lightning.pytorch")
import lightning.pytorch as lightning

from phosphene.training.callbacks.lightning import LightningRecorder, callback_class, recorded_module

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"
)
SAMPLES, BATCH, EPOCHS, RATE = 12, 3, 2, 0.1
criterion = nn.functional.cross_entropy


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 3, stride=2), nn.Flatten(), nn.Linear(20, 3))


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SAMPLES, 3, 7, 7, generator=generator), torch.randint(3, (SAMPLES,), generator=generator)


def loader(batch: int = BATCH) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*samples()), batch_size=batch)


class Task(lightning.LightningModule):
    """A classification with SGD; `optimizer` are changes to that."""

    def __init__(self, net: nn.Module, **optimizer: Any) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = criterion(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", criterion(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=RATE, **self.optimizer)


def trainer(folder: Path, *callbacks: Any, package: Any = lightning, **options: Any) -> Any:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    defaults = {"max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    return package.Trainer(callbacks=list(callbacks), **(quiet | defaults | options))


def plain(
    net: nn.Module, epochs: int = EPOCHS, together: int = 1, clip: float = 0.0, bf16: bool = False
) -> Iterator[list[dict[str, Tensor]]]:
    """Train as the Task does, and yield for each epoch what gradient each step had before clipping."""
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    for _ in range(epochs):
        steps = []
        for number, (images, classes) in enumerate(loader()):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
                loss = criterion(net(images), classes) / together
            torch.autograd.backward(loss)
            if (number + 1) % together == 0:
                steps.append(
                    {name: weight.grad.clone() for name, weight in net.named_parameters() if weight.grad is not None}
                )
                if clip:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        yield steps


def assert_record(folder: Path, expected: list[list[dict[str, Tensor]]], tolerance: float = 1e-6) -> None:
    """Compare a record with the gradients of each step."""
    history = open_history(folder)
    assert history.epochs == list(range(len(expected)))
    for epoch, steps in enumerate(expected):
        gradients, weights = history.gradients(epoch), history.entry(epoch)["gradients"]["weights"]
        assert history.entry(epoch)["gradients"]["batches"] == len(steps)
        assert set(gradients) == {f"net.{name}" for name in steps[0]}
        for name in steps[0]:
            each = torch.stack([gradient[name] for gradient in steps]).double()
            torch.testing.assert_close(gradients[f"net.{name}"].double(), each.mean(0), rtol=0, atol=tolerance)
            assert weights[f"net.{name}"]["norm"] == pytest.approx(
                float(each.flatten(1).norm(dim=1).mean()), rel=100 * tolerance
            )
            assert weights[f"net.{name}"]["mean_abs"] == pytest.approx(float(each.abs().mean()), rel=100 * tolerance)


def fitted(folder: Path, recorder: Any = None, task: Any = None, **options: Any) -> nn.Module:
    """Train a Task under a Trainer, and return its network."""
    module = task or Task(network())
    callbacks = [] if recorder is None else [recorder]
    trainer(folder, *callbacks, **options).fit(module, loader())
    return module.net


def assert_same_weights(net: nn.Module, expected: nn.Module) -> None:
    assert all(a.equal(b) for a, b in zip(net.state_dict().values(), expected.state_dict().values(), strict=True))


# --- what the gradients are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.05}, {"precision": "bf16-mixed"}], ids=str
)
def test_the_record_is_that_of_a_plain_loop_and_the_training_untouched(tmp_path: Path, options: dict[str, Any]) -> None:
    recorded = fitted(tmp_path, LightningRecorder(tmp_path / "run"), **options)
    together, bf16 = options.get("accumulate_grad_batches", 1), "precision" in options
    net = network()
    expected = list(plain(net, together=together, clip=options.get("gradient_clip_val", 0.0), bf16=bf16))
    assert_record(tmp_path / "run", expected)
    assert open_history(tmp_path / "run").entry(0)["gradients"]["read"] == "before clipping"
    assert_same_weights(recorded, fitted(tmp_path, **options))
    assert_same_weights(recorded, net)
    if "gradient_clip_val" in options:  # it did clip
        assert (
            min(float(torch.cat([gradient.flatten() for gradient in step.values()]).norm()) for step in expected[0])
            > 0.05
        )


@pytest.mark.parametrize("fused", [False, True])
def test_the_scale_of_mixed_precision_is_taken_out(tmp_path: Path, fused: bool) -> None:
    from lightning.pytorch.plugins.precision import MixedPrecision

    def run(*callbacks: Any) -> nn.Module:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        task = Task(network(), fused=fused)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        trainer(tmp_path, *callbacks, plugins=[plugin]).fit(task, loader())
        return task.net

    recorded = run(LightningRecorder(tmp_path / "run"))
    assert_record(tmp_path / "run", list(plain(network())), 2e-3)
    assert_same_weights(recorded, run())


def test_kernels_and_metrics_are_those_at_the_end_of_each_epoch(tmp_path: Path) -> None:
    class Observer(lightning.Callback):
        def __init__(self) -> None:
            self.kernels: list[Tensor] = []
            self.losses: list[float] = []

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.kernels.append(pl_module.net[2].weight.detach().clone())
            self.losses.append(float(trainer.callback_metrics["loss"]))

    observer, recorder = Observer(), LightningRecorder(tmp_path / "run", layers="net.2")
    fit = trainer(tmp_path, recorder, observer, check_val_every_n_epoch=2, num_sanity_val_steps=2, max_epochs=3)
    fit.fit(Task(network()), loader(), loader())
    history = recorder.history
    assert history.layers == history.facts["layers"] or len(history.layers) == 1
    for epoch in range(3):
        assert history.kernels("net.2", epoch).weights.equal(observer.kernels[epoch])
        assert history.metrics(epoch)["loss"] == pytest.approx(observer.losses[epoch], rel=1e-12)
    # validated after the second epoch only; the sanity check before the first is no validation
    assert ["val_loss" in history.metrics(epoch) for epoch in range(3)] == [False, True, False]
    assert history.entry(0)["gradients"]["batches"] == SAMPLES // BATCH


def test_a_part_of_the_module_is_recorded_by_its_own_names(tmp_path: Path) -> None:
    parts: list[Any] = ["net", lambda module: module.net]
    for number, part in enumerate(parts):
        recorder = LightningRecorder(tmp_path / f"run{number}", network=part)
        fitted(tmp_path, recorder, max_epochs=1)
        assert recorder.history.weights == [name for name, _ in network().named_parameters()]
    assert recorded_module(Task(network()), "net.0").weight.shape == (4, 3, 3, 3)
    with pytest.raises(errors.InvalidRequest, match=r"no part 'nett'; it has net\b"):
        recorded_module(Task(network()), "nett")
    with pytest.raises(errors.InvalidRequest, match="not a int"):
        recorded_module(Task(network()), lambda module: 3)  # type: ignore[arg-type, return-value]


def test_the_gradient_of_the_total_loss_is_taken_at_the_end_of_the_epoch(tmp_path: Path) -> None:
    recorder = LightningRecorder(tmp_path / "run", gradients="epoch", network="net", data=samples(), loss=criterion)
    recorded = fitted(tmp_path, recorder)
    assert_same_weights(recorded, fitted(tmp_path))
    images, classes = samples()
    expected = torch.autograd.grad(criterion(recorded(images), classes), list(recorded.parameters()))
    for gradient, expected_gradient in zip(recorder.history.gradients().values(), expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


# --- manual optimisation ----------------------------------------------------------------------------------------------


class Pair(lightning.LightningModule):
    """Two networks, two optimizers: the loss of the second leaves gradients in the first as well."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.maker, self.judge = network(0)[:3], network(1)[3:]

    def training_step(self, batch: Any, index: int) -> None:
        first, second = cast(list[Any], self.optimizers())
        first.zero_grad()
        self.manual_backward(self.maker(batch[0]).square().mean())
        first.step()
        second.zero_grad()
        self.manual_backward(criterion(self.judge(self.maker(batch[0])), batch[1]))
        second.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=RATE) for net in (self.maker, self.judge)]


def test_each_of_several_optimizers_gives_the_gradients_of_its_own_weights(tmp_path: Path) -> None:
    recorder, only = LightningRecorder(tmp_path / "both"), LightningRecorder(tmp_path / "judge", network="judge")
    for callback in (recorder, only):
        torch.manual_seed(0)
        trainer(tmp_path, callback, max_epochs=1).fit(Pair(), loader())
    pair, makers, judges = Pair(), [], []
    first, second = (torch.optim.SGD(net.parameters(), lr=RATE) for net in (pair.maker, pair.judge))
    for images, classes in loader():
        loss = pair.maker(images).square().mean()
        makers.append(torch.autograd.grad(loss, list(pair.maker.parameters())))
        step(first, pair.maker, makers[-1])
        loss = criterion(pair.judge(pair.maker(images)), classes)
        judges.append(torch.autograd.grad(loss, list(pair.judge.parameters())))
        step(second, pair.judge, judges[-1])
    expected = {f"maker.{name}": mean for name, mean in zip(names(pair.maker), means(makers), strict=True)}
    of_judge = dict(zip(names(pair.judge), means(judges), strict=True))
    expected |= {f"judge.{name}": mean for name, mean in of_judge.items()}
    for history, means_by_name in ((recorder.history, expected), (only.history, of_judge)):
        gradients = history.gradients(0)
        assert set(gradients) == set(means_by_name)
        for name, mean in means_by_name.items():
            torch.testing.assert_close(gradients[name], mean, rtol=1e-5, atol=1e-7)
    assert {weight["batches"] for weight in recorder.history.entry(0)["gradients"]["weights"].values()} == {4}


def names(net: nn.Module) -> list[str]:
    return [name for name, _ in net.named_parameters()]


def means(steps: list[Any]) -> list[Tensor]:
    return [torch.stack(gradients).mean(0) for gradients in zip(*steps, strict=True)]


def step(optimizer: Any, net: nn.Module, gradients: Any) -> None:
    for weight, gradient in zip(net.parameters(), gradients, strict=True):
        weight.grad = gradient
    optimizer.step()


def test_a_step_without_a_loss_is_no_batch(tmp_path: Path) -> None:
    class Skipping(Task):
        def training_step(self, batch: Any, index: int) -> Any:
            return None if index == 1 or self.current_epoch == 1 else super().training_step(batch, index)

    recorder = LightningRecorder(tmp_path / "run")
    with pytest.warns(UserWarning, match="no optimizer step had a gradient in epoch 1; not recorded"):
        fitted(tmp_path, recorder, Skipping(network()), max_epochs=3)
    assert recorder.history.epochs == [0, 2]
    assert recorder.history.entry(0)["gradients"]["batches"] == 3


# --- going on, loggers, refusals --------------------------------------------------------------------------------------


def test_a_fit_from_a_checkpoint_goes_on_with_the_record(tmp_path: Path) -> None:
    first = trainer(tmp_path, LightningRecorder(tmp_path / "run"), max_epochs=1)
    first.fit(Task(network()), loader())
    first.save_checkpoint(tmp_path / "one.ckpt")
    recorder = LightningRecorder(tmp_path / "run")
    again = trainer(tmp_path, recorder, max_epochs=3)
    again.fit(Task(network(5)), loader(), ckpt_path=tmp_path / "one.ckpt", weights_only=False)
    assert_record(tmp_path / "run", list(plain(network(), epochs=3)))


def test_the_trainer_s_loggers_get_everything(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoardLogger(tmp_path)
    recorder = LightningRecorder(tmp_path / "run", writer=True)
    fitted(tmp_path, recorder, logger=[CSVLogger(tmp_path), board])
    board.experiment.close()
    events = EventAccumulator(board.log_dir).Reload()
    for epoch in range(EPOCHS):
        weights = recorder.history.entry(epoch)["gradients"]["weights"]
        for name, weight in weights.items():
            assert events.Scalars(f"gradient_norm/{name}")[epoch].value == pytest.approx(weight["norm"], rel=1e-6)
    assert [image.step for image in events.Images("kernels/net.0")] == [0, 1]
    with pytest.raises(errors.InvalidRequest, match="has CSVLogger; add one"):
        fitted(tmp_path, LightningRecorder(tmp_path / "other", writer=True), logger=CSVLogger(tmp_path))


def test_what_cannot_be_recorded_is_refused_before_the_first_step(tmp_path: Path) -> None:
    task = Task(network())
    before = [value.clone() for value in task.net.state_dict().values()]
    with pytest.raises(errors.LayerNotFound, match=r"net\.0, net\.2"):
        fitted(tmp_path, LightningRecorder(tmp_path / "run", layers="block*"), task)
    with pytest.raises(errors.InvalidRequest, match=r"2 epochs of .* and the cap is 5\.0 kB"):
        fitted(tmp_path, LightningRecorder(tmp_path / "run", cap=5000), task)
    assert all(old.equal(new) for old, new in zip(before, task.net.state_dict().values(), strict=True))
    fit = SimpleNamespace(strategy=type("FSDPStrategy", (), {})())
    with pytest.raises(errors.InvalidRequest, match="FSDPStrategy splits up the weights"):
        LightningRecorder(tmp_path / "run").on_train_start(fit, task)


def test_the_package_that_can_be_imported_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)  # such as with a folder `lightning` in the way
    other = SimpleNamespace(Callback=object)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", other)
    assert callback_class() is object
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with pytest.raises(errors.ExtraMissing, match=r"pip install 'phosphene\[lightning\]'"):
        callback_class()


def test_the_store_may_be_any_path_like_object(tmp_path: Path) -> None:
    class Folder:
        def __fspath__(self) -> str:
            return str(tmp_path / "run")

    folder = cast(Path, Folder())
    assert LightningRecorder(folder).arguments["store"] == tmp_path / "run"


@pytest.mark.slow
def test_it_works_under_the_other_name_of_lightning(tmp_path: Path) -> None:
    other = importlib.import_module("pytorch_lightning")

    class Other(other.LightningModule):  # type: ignore[misc, name-defined]
        __init__, training_step = Task.__init__, Task.training_step
        configure_optimizers = Task.configure_optimizers

    task = Other.__new__(Other)
    other.LightningModule.__init__(task)
    task.net, task.optimizer = network(), {}
    trainer(tmp_path, LightningRecorder(tmp_path / "run"), package=other).fit(task, loader())
    assert_record(tmp_path / "run", list(plain(network())))


# --- two processes ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("views", [False, True])
def test_two_processes_write_one_record_of_the_averaged_gradient(tmp_path: Path, views: bool) -> None:
    from lightning.pytorch.strategies import DDPStrategy

    strategy = DDPStrategy(process_group_backend="gloo", start_method="spawn", gradient_as_bucket_view=views)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.delenv("PL_GLOBAL_SEED", raising=False)
        warnings.simplefilter("ignore")
        fitted(tmp_path, LightningRecorder(tmp_path / "run"), devices=2, strategy=strategy)
    net, expected = network(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    images, classes = samples()
    for epoch in range(EPOCHS):
        steps, orders = [], []
        for rank in range(2):  # Lightning shuffles here, whatever the loader does
            sampler: DistributedSampler[Any] = DistributedSampler(TensorDataset(images), num_replicas=2, rank=rank)
            sampler.set_epoch(epoch)
            orders.append(list(sampler))
        for start in range(0, SAMPLES // 2, BATCH):
            each = []
            for order in orders:
                rows = order[start : start + BATCH]
                each.append(torch.autograd.grad(criterion(net(images[rows]), classes[rows]), list(net.parameters())))
            steps.append(dict(zip(names(net), means(each), strict=True)))
            step(optimizer, net, steps[-1].values())
        expected.append(steps)
    assert_record(tmp_path / "run", expected)
    files = [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert files.count("gradients.safetensors") == EPOCHS
    assert not [name for name in files if name.endswith(".part")]
