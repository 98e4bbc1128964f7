"""Files appear whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from phosphene.errors import OutputRefused
from phosphene.storage.atomic import check_writable, temporary_name, write_file, write_manifest


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_file_is_written_into_folders_made_for_it(tmp_path: Path) -> None:
    path = tmp_path / "a/b/c.bin"
    assert write_file(path, b"\x00\xff") == path
    assert path.read_bytes() == b"\x00\xff"
    write_file(path, b"other")
    assert path.read_bytes() == b"other"
    assert everything(tmp_path) == ["a", "a/b", "a/b/c.bin"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    path = write_file(tmp_path / "c.bin", b"old")

    def fail(*_: Any) -> None:
        assert temporary_name(path).exists()
        assert path.read_bytes() == b"old"
        raise error

    monkeypatch.setattr(os, call, fail)
    expected = OutputRefused if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        write_file(path, b"new")
    assert expected is KeyboardInterrupt or str(caught.value) == (
        f"{path} cannot be written: No space left on device; give another place"
    )
    assert path.read_bytes() == b"old"
    assert everything(tmp_path) == ["c.bin"]


def test_a_place_that_takes_no_file_is_refused_before_and_during_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = everything(tmp_path)
    places = {
        tmp_path / "file/below.png": "Not a directory",
        tmp_path / "file/below/deeper.png": "Not a directory",
        tmp_path / "dangling/below.png": "No such file or directory",
        tmp_path / "folder": "is a folder",
        tmp_path / ("n" * 300): "File name too long",
        tmp_path / ("n" * 250): "File name too long",  # fits, but its temporary name would not
        Path("/proc/phosphene/grid.png"): "No such file or directory",
        tmp_path / "null\0byte": "null",
    }
    for place, reason in places.items():
        with pytest.raises(OutputRefused, match=reason):
            check_writable(place, folder=False)
        with pytest.raises(OutputRefused, match="cannot be written"):
            write_file(place, b"")
        assert everything(tmp_path) == before


def test_a_place_that_takes_no_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    places = {
        tmp_path / "file": "is a file, so no folder can be made there; give another place",
        tmp_path / "file/below": "Not a directory",
        tmp_path / "dangling": "No such file or directory",
        Path("/proc/phosphene"): "cannot be written",
    }
    for place, reason in places.items():
        with pytest.raises(OutputRefused, match=reason):
            check_writable(place, folder=True)
    assert everything(tmp_path) == ["dangling", "file"]


@pytest.mark.parametrize("folder", [True, False])
def test_a_place_that_will_do_is_left_as_it_was(tmp_path: Path, folder: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    write_file(tmp_path / "there.png", b"old")
    before = everything(tmp_path)
    check_writable(tmp_path / "there" if folder else tmp_path / "there.png", folder)
    check_writable(tmp_path / "not/yet/there", folder)
    monkeypatch.chdir(tmp_path)
    check_writable(Path("relative"), folder)
    check_writable(Path("not/yet"), folder)
    assert everything(tmp_path) == before
    assert (tmp_path / "there.png").read_bytes() == b"old"


def test_a_manifest_is_json_with_its_keys_in_order(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "manifest.json", {"b": [1, 0.5], "a": "Katze 🐈 ü"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "Katze 🐈 ü",\n  "b": [\n    1,\n    0.5\n  ]\n}\n'
    assert json.loads(path.read_bytes()) == {"a": "Katze 🐈 ü", "b": [1, 0.5]}
