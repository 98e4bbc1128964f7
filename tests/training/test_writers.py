"""Writers: what TensorBoard and Weights & Biases hold afterwards is read back and compared with what went in."""

from __future__ import annotations

import io
import json
import logging
import math
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from phosphene import errors
from phosphene.inspection.kernels import Kernels
from phosphene.rendering.result import Rendered
from phosphene.training import writers
from phosphene.training.epoch_record import EpochRecord
from phosphene.training.gradient_statistics import Gradient, single_batch

# |g|: 0.75 is in [2^-1, 2^0), 0.25 and -0.375 in [2^-2, 2^-1), 3 in [2^1, 2^2); [2^0, 2^1) stays empty; two zeros
GRADIENT = torch.tensor([[0.75, 0.25, -0.375], [3.0, 0.0, 0.0]])
EDGES, COUNTS = [-2.0, -1.0, 0.0, 1.0, 2.0], [2, 1, 0, 1]


def kernels_of(seed: int) -> Kernels:
    weights = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    return Kernels(weights, {"model": "net", "layer": "conv1", "colours": None})


def rendered(seed: int) -> Rendered:
    images = torch.rand(2, 3, 9, 11, generator=torch.Generator().manual_seed(seed))
    zeros = torch.zeros(2)
    spec = {"layers": ["conv1"], "recipe": {"name": "fast", "display": "clip", "seed": 0}}
    return Rendered(images, zeros, zeros, zeros[None], zeros.bool(), zeros.bool(), ("filter_0", "filter_5"), spec)


def epoch_record(epoch: int, gradient: Tensor = GRADIENT, **changes: Any) -> EpochRecord:
    fields: dict[str, Any] = {
        "metrics": {"loss": 0.5 / (epoch + 1), "accuracy": 0.25 * epoch},
        "kernels": {"conv1": kernels_of(epoch)},
        "gradients": {"conv1.weight": single_batch(gradient)},
        "weight_norms": {"conv1.weight": 1.0},
        "facts": {"kind": "running"},
    }
    return EpochRecord(epoch=epoch, **(fields | changes))


def pixels(encoded: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def as_shown(picture: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(picture.convert("RGB"))


class Spy:
    """A run of Weights & Biases that only remembers; like the true one it throws away rows that lie before its step."""

    def __init__(self, step: int = 0) -> None:
        self.step = step
        self.rows: dict[int, dict[str, Any]] = {}
        self.axes: dict[str, str | None] = {}
        self.lost: list[int] = []

    def log(self, row: dict[str, Any], step: int | None = None) -> None:
        position = self.step if step is None else step
        if position < self.step:
            self.lost.append(position)
            return
        self.rows.setdefault(position, {}).update(row)
        self.step = position + (step is None)

    def define_metric(self, name: str, step_metric: str | None = None, hidden: bool = False) -> None:
        self.axes[name] = step_metric


# --- TensorBoard ------------------------------------------------------------------------------------------------------


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Any]:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    writer = tensorboard.SummaryWriter(tmp_path / "board")
    yield writer
    writer.close()


def read_back(writer: Any) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer.close()
    return EventAccumulator(
        writer.log_dir, size_guidance=dict.fromkeys(("scalars", "images", "histograms"), 0)
    ).Reload()


def test_the_event_file_holds_the_numbers_and_the_pictures_to_the_pixel(board: Any) -> None:
    records = [epoch_record(epoch, filters=rendered(epoch)) for epoch in (0, 3)]
    for record in records:
        writers.publish(board, record)
    events = read_back(board)
    expected = {
        "epoch_metrics/loss": [0.5, 0.125],
        "epoch_metrics/accuracy": [0.0, 0.75],
        "gradient_norm/conv1.weight": [math.sqrt(0.75**2 + 0.25**2 + 0.375**2 + 9)] * 2,
        "gradient_mean_abs/conv1.weight": [(0.75 + 0.25 + 0.375 + 3) / 6] * 2,
        "gradient_zeros/conv1.weight": [2 / 6] * 2,
    }
    assert set(events.Tags()["scalars"]) == set(expected)
    for name, numbers in expected.items():
        assert [scalar.step for scalar in events.Scalars(name)] == [0, 3]
        assert [scalar.value for scalar in events.Scalars(name)] == pytest.approx(numbers, rel=1e-6)
    for number, record in enumerate(records):
        assert record.filters is not None
        pictures = {"kernels/conv1": record.kernels["conv1"].grid()} | {
            f"filters/{name}": picture
            for name, picture in zip(record.filters.names, record.filters.pictures, strict=True)
        }
        assert set(events.Tags()["images"]) == set(pictures)
        for name, picture in pictures.items():
            image = events.Images(name)[number]
            assert image.step == record.epoch
            assert np.array_equal(pixels(image.encoded_image_string), as_shown(picture))


def test_the_histogram_s_bins_are_the_powers_of_two(board: Any) -> None:
    writers.publish(board, epoch_record(0))
    (event,) = read_back(board).Histograms("gradient_log2/conv1.weight")
    histogram = event.histogram_value
    assert list(histogram.bucket_limit) == EDGES[1:]
    assert list(histogram.bucket) == COUNTS
    assert (histogram.min, histogram.max, histogram.num) == (-2, 2, 4)
    assert histogram.sum == 2 * -1.5 - 0.5 + 1.5
    assert histogram.sum_squares == 2 * 2.25 + 0.25 + 2.25


def test_tensorboard_itself_draws_each_bar_between_its_two_edges(board: Any) -> None:
    writers.publish(board, epoch_record(0))
    from tensorboard import data_compat
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.util import tensor_util

    board.close()
    (file,) = Path(board.log_dir).iterdir()
    values = [value for event in LegacyEventFileLoader(str(file)).Load() for value in event.summary.value]
    (histogram,) = [data_compat.migrate_value(value) for value in values if value.tag.startswith("gradient_log2/")]
    bars = tensor_util.make_ndarray(histogram.tensor)
    assert bars.tolist() == [list(bar) for bar in zip(EDGES[:-1], EDGES[1:], COUNTS, strict=True)]


def test_what_is_not_finite_is_a_number_of_its_own_and_notes_are_shown(board: Any) -> None:
    gradient = torch.tensor([1.0, math.nan, math.inf, 0.0])
    note = "the gradient of conv1.weight held NaN"
    writers.publish(board, epoch_record(2, gradient, notes=(note,)))
    writers.publish(board, epoch_record(3, torch.zeros(4)))
    events = read_back(board)
    assert [scalar.value for scalar in events.Scalars("gradient_nonfinite_batches/conv1.weight")] == [1]
    assert math.isnan(events.Scalars("gradient_norm/conv1.weight")[0].value)
    assert [scalar.value for scalar in events.Scalars("gradient_zeros/conv1.weight")] == [0.25, 1.0]
    (event,) = events.Histograms("gradient_log2/conv1.weight")  # none of the epoch that had zeros only
    assert (list(event.histogram_value.bucket), event.histogram_value.min) == ([1.0], 0)
    (text,) = events.Tensors("notes/text_summary")
    assert text.tensor_proto.string_val[0].decode() == note


def test_every_entry_lies_in_the_bin_that_the_logarithm_names() -> None:
    gradient = torch.randn(5000, generator=torch.Generator().manual_seed(0)).exp() * 1e-4
    bins = writers.log_bins(single_batch(gradient))
    assert bins is not None
    counts, edges = bins
    assert np.array_equal(counts, np.histogram(np.log2(gradient.double().numpy()), edges)[0])
    assert counts.sum() == 5000
    assert counts[0] > 0 < counts[-1]


# --- Weights & Biases -------------------------------------------------------------------------------------------------


def test_a_run_gets_the_same_in_one_row_over_the_epoch() -> None:
    pytest.importorskip("wandb")
    run, record = Spy(), epoch_record(4, filters=rendered(0), notes=("a note",))
    writers.publish(run, record)
    (row,) = run.rows.values()
    assert list(run.rows) == [4]
    assert row[writers.EPOCH] == 4
    assert {name: row[name] for name, _ in writers.scalars(record)} == dict(writers.scalars(record))
    histogram = row["gradient_log2/conv1.weight"]
    assert (histogram.histogram, histogram.bins) == (COUNTS, EDGES)
    assert record.filters is not None
    for name, picture in (
        ("kernels/conv1", record.kernels["conv1"].grid()),
        ("filters/filter_5", record.filters.pictures[1]),
    ):
        assert np.array_equal(as_shown(row[name].image), as_shown(picture))
    assert row["notes"] == "a note"
    assert {name.split("/")[0] for name in row if "/" in name} <= {name.split("/")[0] for name in run.axes}
    assert {axis for name, axis in run.axes.items() if "/" in name} == {writers.EPOCH}


def test_rows_are_neither_lost_nor_mixed_whatever_else_is_logged() -> None:
    pytest.importorskip("wandb")
    alone, after, steps = Spy(), Spy(), Spy()
    for epoch in range(3):
        writers.publish(alone, epoch_record(epoch))
        writers.publish(after, epoch_record(epoch))
        after.log({"own": epoch}, step=epoch)  # of the user, later for the same step
        if epoch == 0:
            steps.log({"own": 1}, step=500)  # of the user, seldom
        writers.publish(steps, epoch_record(epoch))
    assert [list(run.rows) for run in (alone, after, steps)] == [[0, 1, 2], [0, 1, 2], [500, 501, 502]]
    assert not alone.lost + after.lost + steps.lost
    assert [row["own"] for row in after.rows.values()] == [0, 1, 2]
    assert [row[writers.EPOCH] for row in steps.rows.values()] == [0, 1, 2]


def test_a_true_run_offline_keeps_it_in_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "DATA_DIR": tmp_path, "CACHE_DIR": tmp_path}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    records = [epoch_record(epoch) for epoch in range(2)]
    options = {"console": "off", "x_disable_stats": True, "x_disable_machine_info": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        run = wandb.init(mode="offline", dir=tmp_path, project="test", settings=wandb.Settings(**options))
        for record in records:
            writers.publish(run, record)
        folder = Path(run.dir)
        run.finish()
        wandb.teardown()  # else its own process may still be writing the file
    rows = history_of(next(folder.parent.glob("*.wandb")))
    assert [row["_step"] for row in rows] == [0, 1]
    for row, record in zip(rows, records, strict=True):
        for name, number in writers.scalars(record):
            assert row[name] == pytest.approx(number, rel=1e-12)
        histogram = row["gradient_log2/conv1.weight"]
        assert (histogram["values"], histogram["bins"]) == (COUNTS, EDGES)
        encoded = (folder / row["kernels/conv1"]["path"]).read_bytes()
        assert np.array_equal(pixels(encoded), as_shown(record.kernels["conv1"].grid()))


def history_of(path: Path) -> list[dict[str, Any]]:
    """Return the rows in the file of an offline run, which is a log of LevelDB's kind behind a header of 7 bytes.

    Its blocks have 32,768 bytes; in them lie pieces: checksum (4), length (2), kind (1: whole, 2: first, 3: middle,
    4: last), and so many bytes.
    """
    from wandb.proto import wandb_internal_pb2

    wandb_proto: Any = wandb_internal_pb2
    content, position, record, rows = path.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            message = wandb_proto.Record()
            message.ParseFromString(record)
            record = b""
            row: dict[str, Any] = {}
            for item in message.history.item:
                *outer, name = item.nested_key or [item.key]
                (row.setdefault(outer[0], {}) if outer else row)[name] = json.loads(item.value_json)
            rows += [row] if row else []
    return rows


# --- any --------------------------------------------------------------------------------------------------------------


def test_several_writers_each_get_all_and_one_that_fails_does_not_disturb(board: Any) -> None:
    pytest.importorskip("wandb")

    class Broken(Spy):
        calls = 0

        def log(self, row: dict[str, Any], step: int | None = None) -> None:
            self.calls += 1
            raise ConnectionError("the line is down")

    broken, run = Broken(), Spy()
    targets, warning = [broken, board, run], r"Broken could not show epoch 0 \(ConnectionError: the line is down\)"
    with pytest.warns(UserWarning, match=warning):
        writers.publish(targets, epoch_record(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epoch in (1, 2):
            writers.publish(targets, epoch_record(epoch))
    assert broken.calls == 3
    assert list(run.rows) == [0, 1, 2]
    assert [scalar.step for scalar in read_back(board).Scalars("epoch_metrics/loss")] == [0, 1, 2]


@pytest.mark.parametrize("wrong", ["runs/a", logging.getLogger("a"), object(), [object()]])
def test_anything_else_is_refused_and_both_named(wrong: Any) -> None:
    with pytest.raises(errors.InvalidRequest, match=r"SummaryWriter.*wandb\.init.*not a"):
        writers.publish(wrong, epoch_record(0))


def test_the_package_without_a_run_is_refused() -> None:
    wandb = pytest.importorskip("wandb")
    with pytest.raises(errors.InvalidRequest, match="the module wandb, which has no active run"):
        writers.matched_writers(wandb)


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(errors.ExtraMissing, match=r"pip install 'phosphene\[wandb\]'"):
        writers.matched_writers(Spy())


def test_no_writer_is_none() -> None:
    assert writers.matched_writers(None) == writers.matched_writers([]) == []
    writers.publish(None, epoch_record(0))


def test_an_epoch_without_gradients_shows_the_rest(board: Any) -> None:
    writers.publish(board, epoch_record(1, gradients=dict[str, Gradient]()))
    tags = read_back(board).Tags()
    assert tags["scalars"] == ["epoch_metrics/loss", "epoch_metrics/accuracy"]
    assert (tags["images"], tags["histograms"]) == (["kernels/conv1"], [])
