"""The commands `atlas` and `report`."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cli_runner import Run, command_line
from phosphene.cli.atlases import duration
from phosphene.storage.store import open_store
from tiny_atlas import NETS, contents

OPTIONS = ("--size", "16", "--steps", "3", "--batch", "4", "--precision", "fp32", "--workers", "0")
OVERFLOWS = (
    NETS
    + """
def overflows():
    net = tiny()
    with torch.no_grad():
        net[0].bias.add_(100)
        net[2].weight[5].fill_(3e38)
    return net
"""
)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    return command_line(monkeypatch, capsys, tmp_path, OVERFLOWS, "nets_atlas")


def test_an_atlas_is_made_and_gone_on_with(run: Run, tmp_path: Path, shown_bars: list[str]) -> None:
    first = run("atlas", "nets_atlas:tiny", "--store", "s", "--layers", ".0", *OPTIONS)
    assert (first.code, first.out.count("\n")) == (0, 1)
    assert Path(first.out.strip()).is_file()
    assert "2 of 2 jobs are done; " in first.err
    assert "a page of it: phosphene report s" in first.err
    again = run("atlas", "nets_atlas:tiny", "--store", "s", *OPTIONS, "--json", "--quiet")
    assert shown_bars == ["nets_atlas:tiny"]  # of the first alone: the second is quiet
    printed = json.loads(again.out)
    assert (printed["jobs"], printed["done"], printed["rendered"], printed["failed"]) == (4, 4, 2, {})
    assert printed["files"] == [f"s/atlases/{printed['atlas']}/manifest.json"]
    assert (again.code, again.err, sum(printed["verdicts"].values())) == (0, "", 14)
    before = contents(tmp_path / "s")
    assert json.loads(run("atlas", "nets_atlas:tiny", "--store", "s", *OPTIONS, "--json").out)["rendered"] == 0
    assert contents(tmp_path / "s") == before


def test_a_dry_run_says_what_it_would_cost_and_leaves_nothing(run: Run, tmp_path: Path) -> None:
    ran = run("atlas", "nets_atlas:tiny", "--store", "s", *OPTIONS, "--dry-run")
    lines = ran.out.splitlines()
    assert (ran.code, lines[:2]) == (0, ["4 jobs", "14 filters of 2 layers of nets_atlas:tiny"])
    assert lines[2].endswith(" s with 1 worker of this machine")
    assert lines[3].endswith(" MB of pictures")
    assert not (tmp_path / "s").exists()
    run("atlas", "nets_atlas:tiny", "--store", "s", "--layers", ".0", *OPTIONS)
    cost = json.loads(run("atlas", "nets_atlas:tiny", "--store", "s", *OPTIONS, "--dry-run", "--json").out)
    assert (cost["jobs"], cost["filters"], cost["missing"], cost["workers"]) == (4, 14, 2, 1)
    assert cost["bytes"] > 0
    partly = run("atlas", "nets_atlas:tiny", "--store", "s", *OPTIONS, "--dry-run").out
    assert partly.startswith("4 jobs, of which 2 are done\n")


def test_a_failing_job_ends_in_exit_code_1(run: Run) -> None:
    ran = run("atlas", "nets_atlas:overflows", "--store", "s", *OPTIONS)
    assert ran.code == 1
    assert Path(ran.out.strip()).is_file()  # of what there is
    (digest,) = open_store("s").failures("jobs")
    assert f"the job {digest} failed: the score of filter_5 at '.2' became NaN or infinite" in ran.err
    assert "3 of 4 jobs are done" in ran.err


def test_a_store_that_fails_on_the_way_ends_in_exit_code_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    put = open_store("s", create=True).filesystem.__class__.write

    def full(self: Any, name: str, content: bytes) -> None:
        if name.endswith("filter_4.png"):
            raise OSError(28, "No space left on device")
        put(self, name, content)

    monkeypatch.setattr(open_store("s").filesystem.__class__, "write", full)
    ran = run("atlas", "nets_atlas:tiny", "--store", "s", *OPTIONS, "--quiet")
    assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)
    assert "No space left on device" in ran.err
    assert ran.err.endswith("(1 of 4 jobs are done)\n")
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--runner", "slurm"], "there is no runner 'slurm'; choose one of: local, ray"),
        (["--ray-address", "auto"], "--ray-address is for --runner ray; add that, or leave the address out"),
        (["--workers", "-2"], "workers is a whole number of at least 0, not -2"),
        (["--batch", "many"], "--batch is auto or a whole number of at least 1, not 'many'"),
        (["--seeds", "0"], "seeds is a whole number of at least 1, not 0"),
        (["--layers", "block9*"], "no layer matches 'block9*'; the nearest are: .0, .1, .2, .3"),
        (["--channels", "ten"], "channels are given as 0:64, 3,7,11 or all, not 'ten'"),
        (["--recipe", "oil"], "there is no recipe 'oil'"),
        (["--photos", "nowhere"], "nowhere"),
        (["--store", "nets_atlas.py"], "nets_atlas.py"),
    ],
)
def test_a_wrong_request_ends_in_exit_code_2(run: Run, options: list[str], text: str) -> None:
    ran = run("atlas", "nets_atlas:tiny", "--store", "s", *OPTIONS, "--quiet", *options)
    assert (ran.code, ran.out) == (2, "")
    assert text in ran.err
    assert ran.err.count("\n") == 1


def test_a_store_is_needed(run: Run) -> None:
    ran = run("atlas", "nets_atlas:tiny")
    assert (ran.code, ran.out) == (2, "")
    assert "--store" in ran.err


def test_the_report_is_a_page_and_a_table(run: Run, tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (20, 20), (80 * number, 10, 40)).save(tmp_path / f"photo_{number}.png")
    run("atlas", "nets_atlas:tiny", "--store", "s", *OPTIONS, "--photos", ".")
    ran = run("report", "s", "--out", "page.html")
    assert (ran.code, ran.out.splitlines()) == (0, ["page.csv", "page.html"])
    assert "nets_atlas:tiny" in (tmp_path / "page.html").read_text()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "page.csv").read_text())))
    assert [(row["layer"], row["channel"]) for row in rows] == [
        *((".0", str(channel)) for channel in range(6)),
        *((".2", str(channel)) for channel in range(8)),
    ]
    assert all(float(row["excitation"]) == float(row["excitation"]) for row in rows if row["excitation"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere"], "nowhere is no store; give the one that an atlas was written to"),
        (["s", "--out", "page.pdf"], "page.pdf does not end in .html"),
    ],
)
def test_a_report_that_cannot_be_made(run: Run, arguments: list[str], text: str) -> None:
    ran = run("report", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert text in ran.err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (89, "89 s"), (95, "2 min"), (5370, "1 h 30 min"), (12_000, "3 h 20 min"), (4e6, "1,111 h 7 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
