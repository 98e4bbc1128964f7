"""What the command line prints, and where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phosphene.cli.output import check_target, is_folder_name, report, to_stderr, to_stdout
from phosphene.errors import InvalidRequest, OutputRefused


def test_results_go_to_stdout_and_remarks_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    to_stdout(Path("a.png"))
    to_stderr("a remark")
    assert capsys.readouterr() == ("a.png\n", "phosphene: a remark\n")


def test_a_report_is_a_path_a_line_or_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    report([Path("a.png"), "b.png"], False, {"seed": 3})
    assert capsys.readouterr().out == "a.png\nb.png\n"
    report([Path("a.png")], True, {"seed": 3})
    assert json.loads(capsys.readouterr().out) == {"files": ["a.png"], "seed": 3}


def test_targets_are_checked_by_their_ending_and_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not is_folder_name(tmp_path / "a.png")
    assert is_folder_name(tmp_path / "a")
    assert is_folder_name(tmp_path)
    check_target(tmp_path / "new/a.PNG", ".png")
    check_target(tmp_path / "new", ".png")
    with pytest.raises(InvalidRequest, match=r"does not end in \.png; give a \.png file or a folder$"):
        check_target(tmp_path / "a.tif", ".png")
    with pytest.raises(InvalidRequest, match=r"does not end in \.gif; give a \.gif file$"):
        check_target(tmp_path / "new", ".gif", folders=False)
    with pytest.raises(OutputRefused):
        check_target(tmp_path / "file/a.png", ".png")
