"""Running an atlas into a store: what is done, what is not done again, and what remains when something goes wrong."""

from __future__ import annotations

import io
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from phosphene import errors
from phosphene.atlases.plan import Job
from phosphene.atlases.run import run
from phosphene.atlases.runners.local import LocalRunner
from phosphene.atlases.runners.pool import Outcome, try_job
from phosphene.atlases.runners.ray import RayRunner
from phosphene.atlases.verdicts import judge
from phosphene.evidence.collect import evidence
from phosphene.network.loading import load
from phosphene.network.model import Model
from phosphene.progress import Bar
from phosphene.storage.store import Store, open_store
from tiny_atlas import NETS, InProcessRunner, contents, tiny, tiny_atlas, tiny_model


def test_all_jobs_are_done_once_and_none_again(tmp_path: Path, bars: list[Bar]) -> None:
    plan = tiny_atlas(tiny_model())
    first, again = InProcessRunner(), InProcessRunner()
    heard: list[tuple[str, int, int]] = []
    summary = run(plan, tmp_path, first, watch=lambda *progress: heard.append(progress))
    assert first.done == list(plan.jobs)
    assert heard == [("pictures", done, 14) for done in (0, 4, 6, 10, 14)]
    assert (bars[0].description, bars[0].unit, bars[0].done, bars[0].total) == (plan.model.name, "pictures", 14, 14)
    assert (summary.jobs, summary.done, summary.rendered, summary.failed) == (4, 4, 4, {})
    assert sum(summary.verdicts.values()) == 14
    before = contents(tmp_path)
    assert sum(name.startswith("jobs/") for name in before) == 14 + 4 * 4
    second = run(plan, tmp_path, again)
    assert again.done == []
    assert (second.done, second.rendered, second.verdicts, second.atlas) == (4, 0, summary.verdicts, summary.atlas)
    assert contents(tmp_path) == before


def test_a_run_shows_a_bar_for_all_jobs_and_none_for_each(tmp_path: Path, shown_bars: list[str]) -> None:
    model = tiny_model()
    photos = [torch.rand(3, 30, 40, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    run(tiny_atlas(model), tmp_path / "shown", InProcessRunner(), photos)
    assert shown_bars == ["evidence", "crops", model.name]
    run(tiny_atlas(model), tmp_path / "silent", InProcessRunner(), photos, progress=False)
    assert shown_bars == ["evidence", "crops", model.name]


def test_only_what_is_missing_is_done(tmp_path: Path) -> None:
    plan = tiny_atlas(tiny_model())
    run(plan, tmp_path, InProcessRunner())
    before = contents(tmp_path)
    (tmp_path / "jobs" / plan.jobs[2].digest / "manifest.json").unlink()
    runner = InProcessRunner()
    assert run(plan, tmp_path, runner).rendered == 1
    assert runner.done == [plan.jobs[2]]
    assert contents(tmp_path) == before


def test_a_larger_atlas_takes_over_the_jobs_of_a_smaller_one(tmp_path: Path) -> None:
    model = tiny_model()
    run(tiny_atlas(model, layers=0), tmp_path, InProcessRunner())
    runner = InProcessRunner()
    summary = run(tiny_atlas(model), tmp_path, runner)
    assert [job.layer for job in runner.done] == [".2", ".2"]
    assert (summary.done, summary.rendered) == (4, 2)


def test_nothing_of_weights_that_differ_by_one_bit_is_served(tmp_path: Path) -> None:
    net = tiny()
    run(tiny_atlas(load(net, input_size=24)), tmp_path, InProcessRunner())
    with torch.no_grad():
        cast(Tensor, net[0].weight).view(torch.int32)[0, 0, 0, 0] ^= 1
    runner = InProcessRunner()
    plan = tiny_atlas(load(net, input_size=24))
    assert run(plan, tmp_path, runner).rendered == 4
    assert runner.done == list(plan.jobs)
    assert len(open_store(tmp_path).done("jobs")) == 8


def test_a_layer_has_its_sheet_and_verdicts(tmp_path: Path) -> None:
    model = tiny_model()
    plan = tiny_atlas(model, layers=1, size=120, seeds=2)
    run(plan, tmp_path / "s", InProcessRunner())
    store = open_store(tmp_path / "s")
    (digest,) = store.done("layers")
    entry = store.manifest("layers", digest)
    (sheet,) = entry["sheets"]
    assert sheet == {"file": "sheet.webp", "tile": [96, 96], "columns": 3, "channels": list(range(8))}
    saved = {}
    for job in plan.jobs:
        for number in job.channels:
            content = store.get("jobs", job.digest, f"filter_{number}.png")
            saved[job.recipe.seed, number] = Image.open(io.BytesIO(content))
    tiles = Image.open(io.BytesIO(store.get("layers", digest, "sheet.webp")))
    assert tiles.size == (288, 288)
    for number in range(8):
        tile = tiles.crop((number % 3 * 96, number // 3 * 96, number % 3 * 96 + 96, number // 3 * 96 + 96))
        expected = saved[0, number].resize((96, 96), Image.Resampling.LANCZOS)
        # WebP at quality 90 halves the resolution of colours, so brightness is compared
        difference = np.abs(np.asarray(tile.convert("L"), float) - np.asarray(expected.convert("L"), float))
        assert difference.mean() < 4, number

    def stacked(seed: int) -> torch.Tensor:
        arrays = [np.array(saved[seed, number]).transpose(2, 0, 1) for number in range(8)]
        return torch.from_numpy(np.stack(arrays))

    dead, plain = (torch.tensor([row[mark] for row in entry["pictures"]]) for mark in ("dead", "plain"))
    expected_verdicts = judge(model, ".2", stacked(0), range(8), dead, None, stacked(1), plain)
    assert [(row["channel"], row["verdict"], row["agreement"], row["score"]) for row in entry["verdicts"]] == [
        (verdict.channel, verdict.verdict, verdict.agreement, verdict.score) for verdict in expected_verdicts
    ]
    assert sum(row["agreement"] is not None for row in entry["verdicts"]) >= 7  # None: below the grey picture
    assert entry["jobs"] == [job.digest for job in plan.jobs]
    assert (entry["layer"]["path"], entry["missing"], entry["evidence"]) == (".2", [], None)


def test_the_atlas_tells_what_it_is_made_of(tmp_path: Path) -> None:
    model = tiny_model()
    plan = tiny_atlas(model)
    summary = run(plan, tmp_path, InProcessRunner())
    store = open_store(tmp_path)
    assert summary.atlas is not None
    entry = store.manifest("atlases", summary.atlas)
    assert (entry["model"], entry["fingerprint"]) == ("Sequential", model.fingerprint)
    assert [(row["path"], row["kind"], row["channels"], row["size"]) for row in entry["layers"]] == [
        (".0", "Conv2d", 6, [24, 24]),
        (".2", "Conv2d", 8, [24, 24]),
    ]
    assert entry["layers"][1]["receptive_field"] == {"size": [5, 5], "stride": [1, 1], "padding": [2, 2]}
    assert {row["digest"] for row in entry["layers"]} == store.done("layers")
    assert entry["recipe"] == {**json.loads(plan.recipes[0].to_json()), "digest": plan.recipes[0].digest}
    assert (entry["verdicts"], entry["missing"], entry["seeds"]) == (summary.verdicts, [], [0])


def test_photos_are_looked_at_once_and_at_the_size_of_the_pictures(tmp_path: Path) -> None:
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    photos = [torch.rand(3, 30, 40, generator=generator) for _ in range(12)]
    plan = tiny_atlas(model)
    heard: list[tuple[str, int, int]] = []
    summary = run(plan, tmp_path, InProcessRunner(), photos, watch=lambda *progress: heard.append(progress))
    assert [progress for progress in heard if progress[0] == "photos"][-1] == ("photos", 12, 12)
    store = open_store(tmp_path)
    expected = evidence(model, photos, [".0", ".2"], size=16)
    assert store.done("evidence") == {expected.digest}
    assert summary.atlas is not None
    for row in store.manifest("atlases", summary.atlas)["layers"]:
        entry = store.manifest("layers", row["digest"])
        assert entry["evidence"] == expected.digest
        statistics = expected[row["path"]]
        for verdict in entry["verdicts"]:
            mean, most = (float(values[verdict["channel"]]) for values in (statistics.mean, statistics.maximum))
            above = verdict["excitation"] * (most - mean)
            assert above == pytest.approx(verdict["score"] - mean, abs=1e-5)  # the score is told with 5 digits
    before = contents(tmp_path)
    run(plan, tmp_path, InProcessRunner(), photos)
    assert contents(tmp_path) == before


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_job_that_fails_is_recorded_and_tried_again(tmp_path: Path) -> None:
    plan = tiny_atlas(tiny_model())
    bad = plan.jobs[3].digest
    summary = run(plan, tmp_path / "s", InProcessRunner(bad))
    store = open_store(tmp_path / "s")
    assert (summary.failed, summary.done, store.failures("jobs")) == ({bad: "it failed"}, 3, {bad: "it failed"})
    layers = {
        entry["layer"]["path"]: entry for entry in (store.manifest("layers", digest) for digest in store.done("layers"))
    }
    assert (layers[".0"]["missing"], layers[".2"]["missing"]) == ([], [bad])
    assert [row["channel"] for row in layers[".2"]["pictures"]] == [0, 1, 2, 3]
    mended = InProcessRunner()
    after = run(plan, tmp_path / "s", mended)
    assert (mended.done, after.failed, after.done, store.failures("jobs")) == ([plan.jobs[3]], {}, 4, {})
    run(plan, tmp_path / "whole", InProcessRunner())
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_a_layer_that_overflows_spoils_no_other(tmp_path: Path) -> None:
    net = tiny()
    with torch.no_grad():
        cast(Tensor, net[0].bias).add_(100)  # so that the second layer sees large numbers
        cast(Tensor, net[2].weight)[5].fill_(3e38)
    plan = tiny_atlas(load(net, input_size=24))
    summary = run(plan, tmp_path, InProcessRunner())
    assert list(summary.failed) == [plan.jobs[3].digest]
    assert "filter_5 at '.2' became NaN or infinite" in summary.failed[plan.jobs[3].digest]


def test_nothing_but_failures(tmp_path: Path) -> None:
    plan = tiny_atlas(tiny_model())
    summary = run(plan, tmp_path, InProcessRunner(*(job.digest for job in plan.jobs)))
    assert (summary.done, summary.atlas, len(summary.failed)) == (0, None, 4)
    assert open_store(tmp_path).done("layers") == set()


class Full(Store):
    """A store whose disk is full after so many entries."""

    def __init__(self, url: Path, room: int) -> None:
        super().__init__(str(url))
        object.__setattr__(self, "left", room)

    def put(self, kind: str, digest: str, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> None:
        left: int = self.left  # type: ignore[attr-defined]
        if left == 0:
            raise errors.OutputRefused("the place is full")
        object.__setattr__(self, "left", left - 1)
        super().put(kind, digest, files, manifest)


@pytest.mark.parametrize("room", range(6))
def test_a_store_that_fails_stops_the_run_and_keeps_what_it_has(tmp_path: Path, room: int) -> None:
    plan = tiny_atlas(tiny_model())
    run(plan, tmp_path / "whole", InProcessRunner())
    open_store(tmp_path / "s", create=True)
    runner = InProcessRunner()
    with pytest.raises(errors.Unfinished) as caught:
        run(plan, Full(tmp_path / "s", room), runner)
    jobs = {0: 0, 1: 1, 2: 2, 3: 2, 4: 3, 5: 4}[room]  # the third entry is the first layer's
    assert str(caught.value) == f"the place is full ({jobs} of 4 jobs are done)"
    assert caught.value.finished.done == jobs  # type: ignore[attr-defined]
    assert runner.closed
    again = InProcessRunner()
    run(plan, tmp_path / "s", again)
    assert len(again.done) == 4 - jobs
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_ctrl_c_ends_the_runner_and_keeps_what_is_done(tmp_path: Path) -> None:
    class Stopped(InProcessRunner):
        def run(self, model: Model, jobs: Iterable[Job]) -> Generator[Outcome, None, None]:
            for number, outcome in enumerate(super().run(model, jobs)):
                if number == 2:
                    raise KeyboardInterrupt
                yield outcome

    plan = tiny_atlas(tiny_model())
    with pytest.raises(errors.Interrupted) as caught:
        run(plan, tmp_path / "s", Stopped())
    assert str(caught.value) == "stopped; 2 of 4 jobs are done and kept, run the same again to go on"
    assert run(plan, tmp_path / "s", InProcessRunner()).rendered == 2


@pytest.mark.parametrize("bad", ["a file", "other files"])
def test_what_is_no_store_is_refused_before_anything_is_rendered(tmp_path: Path, bad: str) -> None:
    place = tmp_path / "s"
    if bad == "a file":
        place.write_text("")
    else:
        place.mkdir()
        (place / "diary.txt").touch()
    runner = InProcessRunner()
    with pytest.raises((errors.StoreRefused, errors.OutputRefused)):
        run(tiny_atlas(tiny_model()), place, runner)
    assert runner.done == []


# --- two drivers ------------------------------------------------------------------------------------------------------


def test_what_another_driver_has_done_is_not_begun(tmp_path: Path) -> None:
    model = tiny_model()
    plan = tiny_atlas(model, per_job=1)
    other_store = open_store(tmp_path / "s", create=True)
    done_by_other = set(plan.jobs[1::2])

    class Meanwhile(InProcessRunner):
        def run(self, model: Model, jobs: Iterable[Job]) -> Generator[Outcome, None, None]:
            for job in done_by_other:  # after this driver has seen what there is
                other_store.put("jobs", job.digest, *work_of(model, job))
            yield from super().run(model, jobs)

    runner = Meanwhile()
    summary = run(plan, tmp_path / "s", runner)
    assert set(runner.done) == set(plan.jobs) - done_by_other
    assert len(runner.done) == len(set(runner.done))
    assert (summary.done, summary.rendered) == (14, 7)
    run(plan, tmp_path / "whole", InProcessRunner())
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def work_of(model: Model, job: Job) -> tuple[dict[str, bytes], dict[str, Any]]:
    outcome = try_job(model, job)
    return dict(outcome.files), dict(outcome.manifest)


def test_a_driver_that_meets_another_goes_on_elsewhere(tmp_path: Path) -> None:
    model = tiny_model()
    plan = tiny_atlas(model, per_job=1)
    behind: list[Job] = []

    class Shadowed(InProcessRunner):
        """Whatever this driver does first, the other has done by then."""

        def run(self, model: Model, jobs: Iterable[Job]) -> Generator[Outcome, None, None]:
            for outcome in super().run(model, jobs):
                if len(behind) < 2:
                    behind.append(outcome.job)
                    other_store.put("jobs", outcome.job.digest, outcome.files, outcome.manifest)
                yield outcome

    orders = set()
    for number in range(6):
        behind.clear()
        runner = Shadowed()
        store = tmp_path / f"s{number}"
        other_store = open_store(store, create=True)
        assert run(plan, store, runner).rendered == 12
        assert set(runner.done) == set(plan.jobs)
        orders.add(tuple(job.digest for job in runner.done))
    assert len(orders) > 1  # where it goes on is left to chance


# --- kill -9 ----------------------------------------------------------------------------------------------------------


COMMAND = (sys.executable, "-m", "phosphene", "atlas", "nets_kill:tiny", "--quiet", "--size", "48", "--steps", "20")


def driver(folder: Path, store: str) -> subprocess.Popen[bytes]:
    """Start the command line in a folder."""
    options = ("--batch", "1", "--workers", "2", "--precision", "fp32", "--store", store)
    return subprocess.Popen([*COMMAND, *options], cwd=folder, stdout=subprocess.DEVNULL)


def finished(folder: Path) -> dict[str, tuple[int, int]]:
    """Return of the finished entries which file the manifest is, and from when."""
    return {
        str(manifest): (manifest.stat().st_ino, manifest.stat().st_mtime_ns)
        for manifest in folder.glob("jobs/*/manifest.json")
    }


@pytest.mark.slow
def test_a_driver_may_be_killed_at_any_moment(tmp_path: Path) -> None:
    (tmp_path / "nets_kill.py").write_text(NETS)
    assert driver(tmp_path, "whole").wait() == 0
    chance = random.Random(0)
    seen: dict[str, tuple[int, int]] = {}
    for _ in range(5):
        process = driver(tmp_path, "s")
        enough = len(seen) + chance.randrange(3)
        while len(finished(tmp_path / "s")) < enough and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = finished(tmp_path / "s")
        assert seen.items() <= now.items()  # nothing that had its manifest was written again
        seen = now
    assert driver(tmp_path, "s").wait() == 0
    assert seen.items() <= finished(tmp_path / "s").items()
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_two_drivers_share_the_work(tmp_path: Path) -> None:
    (tmp_path / "nets_kill.py").write_text(NETS)
    both = [driver(tmp_path, "s") for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert driver(tmp_path, "whole").wait() == 0
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_ctrl_c_leaves_no_worker_behind(tmp_path: Path) -> None:
    (tmp_path / "nets_kill.py").write_text(NETS)
    process = driver(tmp_path, "s")
    while not finished(tmp_path / "s"):
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    process.send_signal(signal.SIGINT)
    assert process.wait() == 1
    assert not any(Path("/proc", child).exists() for child in children)


@pytest.mark.slow
def test_ray_fills_a_store_with_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    generator = torch.Generator().manual_seed(0)
    photos = [torch.rand(3, 30, 40, generator=generator) for _ in range(40)]
    plan = tiny_atlas(tiny_model(), seeds=2)
    for name, runner in (("local", LocalRunner(2)), ("ray", RayRunner(workers=2))):
        assert run(plan, tmp_path / name, runner, photos).done == 8
    assert contents(tmp_path / "local") == contents(tmp_path / "ray")


def test_photos_that_are_not_there_are_refused_before_a_store_is_made(tmp_path: Path) -> None:
    with pytest.raises(errors.PhotoRefused, match="there is no"):
        run(tiny_atlas(tiny_model()), tmp_path / "store", InProcessRunner(), tmp_path / "nowhere")
    assert not (tmp_path / "store").exists()
