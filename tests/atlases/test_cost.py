"""What an atlas will cost."""

from __future__ import annotations

import pytest

from phosphene.atlases.cost import estimate
from phosphene.atlases.plan import Job
from phosphene.atlases.render_job import render_job
from phosphene.network.model import Model
from tiny_atlas import tiny_atlas, tiny_model


def test_seconds_and_bytes_are_those_of_the_jobs_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(model: Model, job: Job) -> tuple[float, int]:
        """It takes 1 s before the first step, and a step 0.5 s a picture at the first layer, 2 s at the second."""
        count = len(job.channels)
        return 1 + job.recipe.steps * count * (0.5 if job.layer == ".0" else 2.0), 100 * count

    monkeypatch.setattr("phosphene.atlases.cost.time_job", timed)
    plan = tiny_atlas(tiny_model(), steps=50)
    whole = estimate(plan)
    # two pictures are measured: (1 s + 50 steps · 2 · 0.5 s) / 2, and (1 s + 50 · 2 · 2) / 2
    assert whole.seconds == pytest.approx(6 * 25.5 + 8 * 100.5)
    assert (whole.jobs, whole.filters, whole.missing, whole.bytes) == (4, 14, 4, 1400)
    rest = estimate(plan, {job.digest for job in plan.jobs[:3]})
    assert (rest.jobs, rest.missing, rest.bytes) == (4, 1, 400)
    assert rest.seconds == pytest.approx(4 * 100.5)
    nothing = estimate(plan, {job.digest for job in plan.jobs})
    assert (nothing.missing, nothing.seconds, nothing.bytes) == (0, 0, 0)


def test_between_the_measured_jobs_lies_what_lies_between(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def fake(model: Model, job: Job) -> tuple[float, float]:
        measured.append(job.channels[0])
        return float(job.channels[0]), 10.0

    monkeypatch.setattr("phosphene.atlases.cost.measure_job", fake)
    monkeypatch.setattr("phosphene.atlases.cost.SAMPLES", 3)
    plan = tiny_atlas(tiny_model(), layers=1, per_job=1)  # eight jobs, of which the 0th, 4th and 7th are measured
    assert estimate(plan).seconds == pytest.approx(0 + 1 + 2 + 3 + 4 + 5 + 6 + 7)
    assert measured == [0, 4, 7]


def test_what_is_measured_is_what_the_work_makes() -> None:
    plan = tiny_atlas(tiny_model(), layers=0, per_job=2)
    cost = estimate(plan)
    made = sum(len(content) for job in plan.jobs for content in render_job(plan.model, job)[0].values())
    assert cost.bytes == pytest.approx(made, rel=0.25)  # pictures after one step, and after three
    assert cost.seconds > 0
