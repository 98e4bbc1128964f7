"""The record on the disk: it is continued, refused to other networks, and survives a full disk, damage and a kill."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from phosphene import errors
from phosphene.storage import atomic
from phosphene.training.history import open_history
from phosphene.training.recorder import Recorder
from small_training import network, train

SUPPORT = Path(__file__).parents[1] / "support"


def test_a_run_is_continued_and_epochs_that_are_replaced_are_set_aside(tmp_path: Path) -> None:
    net = network()
    with Recorder(net, tmp_path, gradients=None) as recorder:
        for epoch in range(4):
            recorder.end_epoch(epoch, number=epoch)
    with Recorder(net, tmp_path, gradients=None) as recorder:
        recorder.end_epoch(4, number=4)
        assert open_history(tmp_path).epochs == [0, 1, 2, 3, 4]
    with Recorder(net, tmp_path, gradients=None) as recorder:
        with pytest.warns(UserWarning, match="epoch 2 was recorded before; it and all later epochs are now in"):
            recorder.end_epoch(2, number=20)
        recorder.end_epoch(3, number=30)
    history = open_history(tmp_path)
    assert [history.metrics(epoch)["number"] for epoch in history.epochs] == [0, 1, 20, 30]
    manifests = [
        json.loads((folder / "manifest.json").read_text()) for folder in sorted((tmp_path / "replaced/0").iterdir())
    ]
    assert [manifest["metrics"]["number"] for manifest in manifests] == [2, 3, 4]


def test_the_folder_of_another_network_is_refused(tmp_path: Path) -> None:
    net = network()
    Recorder(net, tmp_path)
    changed = network()
    changed[4] = nn.Conv2d(4, 6, 5, padding=2).double()
    with pytest.raises(errors.InvalidRequest, match=r"another network's: it has 4.weight \[6, 4, 3, 3\] float64 where"):
        Recorder(changed, tmp_path)
    with pytest.raises(errors.InvalidRequest, match="was made with gradients='running', not None"):
        Recorder(net, tmp_path, gradients=None)
    (tmp_path / "x").mkdir()
    atomic.write_manifest(tmp_path / "x/manifest.json", {"pictures": []})
    with pytest.raises(errors.InvalidRequest, match="holds other results"):
        Recorder(net, tmp_path / "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.OutputRefused, match="is a file"):
        Recorder(net, tmp_path / "file")
    with pytest.raises(errors.ModelNotFound, match="no record of a training"):
        open_history(tmp_path / "x")


def test_a_full_disk_is_a_warning_and_the_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    recorder = Recorder(net, tmp_path)
    train(net, recorder, epochs=1)
    open_file = type(tmp_path).open

    def full(path: Path, mode: str = "r", *more: Any, **options: Any) -> Any:
        if "gradients" in path.name and "w" in mode:
            raise OSError(28, "No space left on device")
        return open_file(path, mode, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "open", full)
        with pytest.warns(
            UserWarning, match="epoch 1 is not recorded, the training goes on: .*No space left on device"
        ):
            train(net, recorder, epochs=1, first=1)
    assert open_history(tmp_path).epochs == [0]
    assert not (tmp_path / "epochs/000001").exists()
    train(net, recorder, epochs=1, first=2)
    assert open_history(tmp_path).epochs == [0, 2]


def test_an_epoch_without_its_manifest_does_not_count_and_is_written_over(tmp_path: Path) -> None:
    net = network()
    recorder = Recorder(net, tmp_path, gradients=None)
    recorder.end_epoch(0)
    begun = tmp_path / "epochs/000001"
    begun.mkdir()
    (begun / "kernels.safetensors").write_bytes(b"cut sh")
    assert open_history(tmp_path).epochs == [0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Recorder(net, tmp_path, gradients=None).end_epoch(1)
    assert open_history(tmp_path).kernels(".0", 1).weights.equal(net.state_dict()["0.weight"])


def test_a_training_that_is_killed_leaves_all_finished_epochs_readable(tmp_path: Path) -> None:
    code = (
        "import sys, small_training as t; net = t.network(); recorder = t.Recorder(net, sys.argv[1])\n"
        "t.train(net, recorder, epochs=10_000)"
    )
    moments = {tmp_path / str(moment): moment for moment in (0.0, 0.004)}
    children = [
        subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=SUPPORT) for folder in moments
    ]  # which start at the same time
    for child, (folder, moment) in zip(children, moments.items(), strict=True):
        while not (folder / "epochs/000003/manifest.json").exists():
            assert child.poll() is None
            time.sleep(0.001)
        time.sleep(moment)
        child.kill()
        child.wait()
        history = open_history(folder)
        assert history.epochs == list(range(len(history.epochs)))
        assert [len(gradients) for gradients in history.record()] == [16] * len(history.epochs)
        assert all(bool(history.kernels(".8", epoch).weights.isfinite().all()) for epoch in history.epochs)
        count, net = len(history.epochs), network()
        train(net, Recorder(net, folder), epochs=1, first=count)
        assert history.epochs == list(range(count + 1))


def test_two_recorders_of_one_folder_or_a_deleted_folder_lose_nothing(tmp_path: Path) -> None:
    first, second = (Recorder(network(), tmp_path, gradients=None) for _ in range(2))
    first.end_epoch(0, number=1)
    with pytest.warns(UserWarning, match="epoch 0 was recorded before"):
        second.end_epoch(0, number=2)
    assert open_history(tmp_path).metrics(0) == {"number": 2}
    assert (tmp_path / "replaced/0/000000/manifest.json").exists()
    shutil.rmtree(tmp_path)
    first.end_epoch(1, number=3)
    assert open_history(tmp_path).metrics() == {"number": 3}


def test_a_damaged_epoch_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    recorder = Recorder(network(), tmp_path, gradients=None)
    recorder.end_epoch(0)
    recorder.end_epoch(1)
    history = open_history(tmp_path)
    (history.epoch_folder(1) / "kernels.safetensors").write_bytes(b"abc")
    with pytest.raises(errors.WeightsRefused, match=r"000001/kernels.safetensors is damaged .* delete .*000001 to"):
        history.kernels(".0")
    (history.epoch_folder(1) / "manifest.json").write_text("{")
    with pytest.raises(errors.WeightsRefused, match=r"000001/manifest.json is damaged"):
        history.entry()
    assert history.kernels(".0", 0).weights.shape == (4, 3, 3, 3)


def test_the_record_names_what_it_has(tmp_path: Path) -> None:
    recorder = Recorder(network(), tmp_path, gradients=None)
    history = open_history(tmp_path)
    with pytest.raises(errors.InvalidRequest, match="holds no finished epoch yet"):
        history.kernels(".0")
    recorder.end_epoch(3)
    with pytest.raises(errors.InvalidRequest, match="holds no epoch 2; it has 3"):
        history.kernels(".0", 2)
    with pytest.raises(
        errors.LayerNotFound, match=r"no kernels of 'conv' are recorded; the nearest are: \.0, \.4, \.8"
    ):
        history.kernels("conv")
    assert history.kernels(1).spec["layer"] == ".4"
