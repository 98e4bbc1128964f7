"""The cap of a record: checked in advance, and never exceeded."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
import torch

from phosphene import errors
from phosphene.training.disk_budget import bytes_per_epoch, in_bytes
from phosphene.training.history import open_history
from phosphene.training.recorder import Recorder
from small_training import network


def test_the_cap_is_checked_in_advance_and_never_exceeded(tmp_path: Path) -> None:
    net = network()
    with pytest.raises(
        errors.InvalidRequest, match=r"500 epochs of up to 38\.3 kB are 19\.2 MB, and the cap is 1\.0 MB"
    ):
        Recorder(net, tmp_path / "a", epochs=500, cap=10**6)
    assert not (tmp_path / "a").exists()
    recorder = Recorder(net, tmp_path / "b", gradients=None, cap=20_000)
    recorder.end_epoch(0)
    with pytest.warns(UserWarning, match=r"epoch \d+ is not recorded: .* beyond its cap of 20.0 kB"):
        collections.deque(map(recorder.end_epoch, range(1, 12)), 0)
    history = open_history(tmp_path / "b")
    assert sum(path.stat().st_size for path in history.folder.rglob("*") if path.is_file()) <= 20_000


def test_bytes_for_a_message() -> None:
    assert [in_bytes(count) for count in (999, 1_000, 45_210_000, 3 * 10**9)] == [
        "999 bytes",
        "1.0 kB",
        "45.2 MB",
        "3.0 GB",
    ]


def test_an_epoch_is_counted_with_the_text_about_its_arrays() -> None:
    arrays = [torch.zeros(10), torch.zeros(5, dtype=torch.float64)]  # 40 bytes each
    assert bytes_per_epoch(arrays, arrays[:1], 0) == 120 + 2_000 + 2 * 200 + 1_500
    assert bytes_per_epoch([], [], 300) == 2_000 + 2 * 300 + 20_000
