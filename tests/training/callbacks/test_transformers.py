"""The callback for Hugging Face's Trainer: its record against plain loops that are written out here."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from phosphene import errors
from phosphene.training.history import open_history

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from phosphene.training.callbacks.transformers import TransformersRecorder, scaler_of  # noqa: E402

SAMPLES, BATCH, EPOCHS, RATE = 12, 3, 2, 0.1


def network(seed: int = 0) -> Any:
    """Return a ResNet of 2 stages with random weights, nothing downloaded."""
    torch.manual_seed(seed)
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(SAMPLES, 3, 16, 16, generator=generator)
    classes = torch.randint(3, (SAMPLES,), generator=generator)
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, classes, strict=True)]


def batches(together: int = 1) -> list[list[dict[str, Tensor]]]:
    """Return the batches of an epoch as the Trainer makes them without shuffling, in groups."""
    cut = [samples()[start : start + BATCH] for start in range(0, SAMPLES, BATCH)]
    stacked = [{name: torch.stack([sample[name] for sample in batch]) for name in batch[0]} for batch in cut]
    return [stacked[start : start + together] for start in range(0, len(stacked), together)]


def trained(folder: Path, recorder: Any = None, model: Any = None, again: Any = None, **options: Any) -> Any:
    """Train with SGD under a Trainer, and return the model; `again` is the checkpoint to go on from."""
    defaults = {
        "num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH,
        "learning_rate": RATE, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential", "report_to": "none", "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "logging_strategy": "epoch", "dataloader_pin_memory": False, "seed": 3,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(output_dir=str(folder / "out"), **(defaults | options))
    model = model or network()
    callbacks = [] if recorder is None else [recorder]
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=samples(), callbacks=callbacks, compute_loss_func=mean_loss
    )
    trainer.train(resume_from_checkpoint=again)
    return model


def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Return this batch's part of the mean loss over all samples of a step, as the Trainer asks for it."""
    loss = nn.functional.cross_entropy(outputs["logits"].float(), labels, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def plain(epochs: int = EPOCHS, together: int = 1, clip: float = 0.0, bf16: bool = False) -> tuple[Any, Any]:
    """Train as the Trainer does, and return the model and for each epoch the gradients that each step used."""
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    record = []
    for _ in range(epochs):
        steps = []
        for group in batches(together):
            for batch in group:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    outputs = model(pixel_values=batch["pixel_values"])
                loss = mean_loss(outputs, batch["labels"], len(group) * BATCH)
                torch.autograd.backward(loss)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            steps.append(
                {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
            )
            optimizer.step()
            optimizer.zero_grad()
        record.append(steps)
    return model, record


def assert_record(folder: Path, expected: list[list[dict[str, Tensor]]], tolerance: float = 1e-6) -> None:
    """Compare a record with the gradients of each step."""
    history = open_history(folder)
    assert history.epochs == list(range(len(expected)))
    for epoch, steps in enumerate(expected):
        gradients, facts = history.gradients(epoch), history.entry(epoch)["gradients"]
        assert facts["batches"] == len(steps)
        assert set(gradients) == set(steps[0])
        for name in steps[0]:
            each = torch.stack([gradient[name] for gradient in steps]).double()
            torch.testing.assert_close(gradients[name].double(), each.mean(0), rtol=0, atol=tolerance)
            norm = float(each.flatten(1).norm(dim=1).mean())
            assert facts["weights"][name]["norm"] == pytest.approx(norm, rel=1e-4, abs=tolerance)


def assert_same_weights(model: nn.Module, expected: nn.Module) -> None:
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True))


# --- what the gradients are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.1}, {"bf16": True}], ids=str
)
def test_the_record_is_that_of_a_plain_loop_and_the_training_untouched(tmp_path: Path, options: dict[str, Any]) -> None:
    recorded = trained(tmp_path, TransformersRecorder(tmp_path / "run"), **options)
    clip = options.get("max_grad_norm", 0.0)
    model, expected = plain(
        together=options.get("gradient_accumulation_steps", 1), clip=clip, bf16=options.get("bf16", False)
    )
    assert_record(tmp_path / "run", expected, 1e-3 if "bf16" in options else 1e-6)
    read = open_history(tmp_path / "run").entry(0)["gradients"]["read"]
    assert read == ("after clipping" if clip else "before clipping")
    if clip:  # it did clip: every step that the record is made of has the norm that was allowed
        norms = [torch.cat([gradient.flatten() for gradient in step.values()]).norm() for step in expected[0]]
        assert [float(norm) for norm in norms] == pytest.approx([clip] * len(norms), rel=1e-3)
    assert_same_weights(recorded, trained(tmp_path, **options))
    if "bf16" not in options:
        for weight, expected_weight in zip(recorded.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(weight, expected_weight, rtol=0, atol=1e-5)


def test_the_scale_of_mixed_precision_is_taken_out_where_it_is_still_in() -> None:
    weight = nn.Parameter(torch.ones(2))
    inner = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    outer = SimpleNamespace(optimizer=inner, scaler=scaler)  # as Accelerate wraps it
    torch.autograd.backward(scaler.scale((weight * torch.tensor([1.0, 3.0])).sum()))
    assert scaler_of(outer) is scaler
    scaler.unscale_(inner)
    assert scaler_of(outer) is None
    scaler.step(inner)
    scaler.update()
    assert scaler_of(outer) is scaler
    assert scaler_of(inner) is scaler_of(None) is scaler_of(SimpleNamespace(optimizer=inner, scaler=None)) is None


# --- the epochs -------------------------------------------------------------------------------------------------------


class Observer(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Keeps the kernels at the end of each epoch."""

    def __init__(self) -> None:
        self.kernels: list[Tensor] = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kernels.append(kwargs["model"].resnet.embedder.embedder.convolution.weight.detach().clone())


def test_the_numbers_of_an_epoch_are_its_own_although_they_come_after_its_end(tmp_path: Path) -> None:
    recorder, model, observer = TransformersRecorder(tmp_path / "run"), network(), Observer()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), num_train_epochs=3, per_device_train_batch_size=BATCH, learning_rate=RATE,
        optim="sgd", report_to="none", save_strategy="epoch", use_cpu=True, disable_tqdm=True, logging_strategy="epoch",
        eval_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="worst", greater_is_better=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=samples(), eval_dataset=samples(), callbacks=[recorder, observer],
        compute_metrics=lambda predictions: {"worst": -len(observer.kernels)},  # the first is best
    )  # fmt: skip
    trainer.train()
    logs = trainer.state.log_history
    history = recorder.history
    assert history.epochs == [0, 1, 2]
    layer = "resnet.embedder.embedder.convolution"
    for epoch in range(3):
        metrics = history.metrics(epoch)
        for name in ("loss", "eval_loss"):
            (expected,) = [log[name] for log in logs if name in log and log["epoch"] == epoch + 1]
            assert metrics[name] == pytest.approx(expected)
        assert metrics["eval_worst"] == -(epoch + 1)
        assert "train_runtime" not in metrics
        assert history.kernels(layer, epoch).weights.equal(observer.kernels[epoch])
    assert model.resnet.embedder.embedder.convolution.weight.equal(observer.kernels[0])  # the best was loaded


def test_a_training_that_ends_within_an_epoch_is_recorded_up_to_there(tmp_path: Path) -> None:
    recorder = TransformersRecorder(tmp_path / "run", every=1)
    trained(tmp_path, recorder, max_steps=6)
    assert recorder.history.epochs == [0, 1]
    assert [recorder.history.entry(epoch)["gradients"]["batches"] for epoch in (0, 1)] == [4, 2]


def test_a_training_from_a_checkpoint_goes_on_with_the_record(tmp_path: Path) -> None:
    trained(tmp_path, TransformersRecorder(tmp_path / "run"), num_train_epochs=1, save_strategy="epoch")
    (checkpoint,) = (tmp_path / "out").iterdir()
    trained(tmp_path, TransformersRecorder(tmp_path / "run"), network(9), str(checkpoint), num_train_epochs=3)
    assert_record(tmp_path / "run", plain(epochs=3)[1])


def test_the_gradient_of_the_total_loss_needs_batches_only(tmp_path: Path) -> None:
    data = [batch for (batch,) in batches()]
    recorder = TransformersRecorder(tmp_path / "run", gradients="epoch", data=data)
    model = trained(tmp_path, recorder)
    assert_same_weights(model, trained(tmp_path))
    model.eval()
    loss = torch.stack([model(**batch).loss for batch in data]).mean()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for gradient, expected_gradient in zip(recorder.history.gradients().values(), expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_a_part_of_the_model_is_recorded_and_shown(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tensorboard.SummaryWriter(tmp_path / "board") as writer:
        recorder = TransformersRecorder(
            tmp_path / "run", "*stages.0*", network=lambda model: model.resnet, writer=writer, every=2
        )
        trained(tmp_path, recorder, num_train_epochs=3)
    assert recorder.history.epochs == [0, 2]
    assert all(path.startswith("encoder.stages.0.") for path in recorder.history.layers)
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    name = recorder.history.weights[0]
    assert name == "embedder.embedder.convolution.weight"
    for event, epoch in zip(events.Scalars(f"gradient_norm/{name}"), (0, 2), strict=True):
        norm = recorder.history.entry(epoch)["gradients"]["weights"][name]["norm"]
        assert (event.step, event.value) == (epoch, pytest.approx(norm, rel=1e-6))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_recorded_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model = network()
    before = [value.clone() for value in model.state_dict().values()]
    with pytest.raises(errors.LayerNotFound, match=r"resnet\.embedder\.embedder\.convolution"):
        trained(tmp_path, TransformersRecorder(tmp_path / "run", layers="block*"), model)
    with pytest.raises(errors.InvalidRequest, match=r"2 epochs of .* and the cap is 3\.0 kB"):
        trained(tmp_path, TransformersRecorder(tmp_path / "run", cap=3000), model)
    split, recorder = SimpleNamespace(fsdp=["full_shard"]), TransformersRecorder(tmp_path / "run")
    with pytest.raises(errors.InvalidRequest, match="split up the weights between processes"):
        recorder.on_train_begin(split, None, None, model=model)
    assert all(old.equal(new) for old, new in zip(before, model.state_dict().values(), strict=True))


def test_the_store_may_be_any_path_like_object(tmp_path: Path) -> None:
    class Folder:
        def __fspath__(self) -> str:
            return str(tmp_path / "run")

    folder = cast(Path, Folder())
    assert TransformersRecorder(folder).arguments["store"] == tmp_path / "run"


def test_missing_transformers_are_named_with_the_line_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from phosphene.training.callbacks.transformers import callback_class

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(errors.ExtraMissing, match=r"pip install 'phosphene\[transformers\]'"):
        callback_class()
