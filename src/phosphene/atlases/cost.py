"""What an atlas will cost: its jobs, seconds and bytes, from a few short renders."""

import time
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from phosphene.atlases.plan import Atlas, Job
from phosphene.atlases.render_job import render_job
from phosphene.network.model import Model

SAMPLES = 6  # jobs that are measured, spread evenly over the unfinished ones
STEPS = (2, 8)  # of the timed renders; their difference leaves out the time before the first step
REPEATS = 2  # of a timed render; the faster one counts, since noise only makes a render slower
PICTURES = 2  # of a timed render on a CPU, where the time of a step is proportional to its pictures


@dataclass(frozen=True)
class Estimate:
    """The cost of the rest of an atlas.

    Attributes:
        jobs, filters: of the whole atlas; `missing`: jobs that are not in the store yet.
        seconds: that one worker needs for these, about.
        bytes: of their pictures, about.
    """

    jobs: int
    filters: int
    missing: int
    seconds: float
    bytes: int


def estimate(atlas: Atlas, done: Collection[str] = ()) -> Estimate:
    """Return the cost of an atlas, without the jobs whose digests are in `done`.

    A few jobs are measured, with a few steps; the cost of the jobs between them is interpolated.
    """
    missing = [job for job in atlas.jobs if job.digest not in done]
    costs = dict(zip(missing, costs_per_picture(atlas.model, missing), strict=True))
    seconds = float(sum(len(job.pictures) * cost[0] for job, cost in costs.items()))
    size = sum(len(job.pictures) * cost[1] for job, cost in costs.items())
    return Estimate(len(atlas.jobs), atlas.filters, len(missing), seconds, round(size))


def costs_per_picture(model: Model, jobs: list[Job]) -> list[tuple[float, float]]:
    """Return for each job the seconds and bytes of one picture, measured for some jobs and interpolated for others."""
    if not jobs:
        return []
    last = len(jobs) - 1
    sampled = sorted({round(last * number / (SAMPLES - 1)) for number in range(SAMPLES)})
    seconds, sizes = zip(*(measure_job(model, jobs[index]) for index in sampled), strict=True)
    indices = range(len(jobs))
    return list(zip(np.interp(indices, sampled, seconds), np.interp(indices, sampled, sizes), strict=True))


def measure_job(model: Model, job: Job) -> tuple[float, float]:
    """Return the seconds and bytes of one picture of a job, from renders of two short lengths."""
    channels = job.channels[:PICTURES] if model.prototype_tensor.device.type == "cpu" else job.channels
    _, size = time_job(
        model, replace(job, channels=channels, recipe=job.recipe.with_settings(steps=1))
    )  # a warm-up as well
    few, many = (
        min(
            time_job(model, replace(job, channels=channels, recipe=job.recipe.with_settings(steps=steps)))[0]
            for _ in range(REPEATS)
        )
        for steps in STEPS
    )
    step = max(0.0, many - few) / (STEPS[1] - STEPS[0])
    seconds = few + step * (job.recipe.steps - STEPS[0])
    count = len(channels) * job.facets
    return seconds / count, size / count


def time_job(model: Model, job: Job) -> tuple[float, int]:
    """Return how many seconds a job takes, and how many bytes its files have."""
    start = time.perf_counter()
    files, _ = render_job(model, job)
    return time.perf_counter() - start, sum(map(len, files.values()))
