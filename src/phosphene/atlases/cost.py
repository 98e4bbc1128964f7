"""What an atlas will cost: how many jobs, how long, how many bytes, by a short measurement."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from phosphene.atlases.plan import Atlas, Job
from phosphene.atlases.render_job import render_job
from phosphene.network.model import Model

SAMPLES = 6  # layers that are measured, spread evenly over those that have jobs to do
STEPS = (2, 8)  # of the measured climbs; their difference leaves out what goes before the first step
REPEATS = 2  # of which the faster counts, since nothing makes a climb faster than it is
PICTURES = 2  # in a measured climb on a CPU, where a step takes as long as its pictures together


@dataclass(frozen=True)
class Estimate:
    """What is still to be done for an atlas.

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
    """Return what an atlas costs, of whose jobs those in `done` are there.

    A few steps of a few layers are measured; the others, which lie between them, are taken to cost what lies between.
    """
    todo = [job for job in atlas.jobs if job.digest not in done]
    costs = dict(zip(todo, per_picture(atlas.model, todo), strict=True))
    seconds = float(sum(len(job.channels) * cost[0] for job, cost in costs.items()))
    size = sum(len(job.channels) * cost[1] for job, cost in costs.items())
    return Estimate(len(atlas.jobs), atlas.filters, len(todo), seconds, round(size))


def per_picture(model: Model, jobs: list[Job]) -> list[tuple[float, float]]:
    """Return for each job the seconds and bytes of one picture, measured at some and interpolated between them."""
    if not jobs:
        return []
    last = len(jobs) - 1
    places = sorted({round(last * number / (SAMPLES - 1)) for number in range(SAMPLES)})
    seconds, sizes = zip(*(measured(model, jobs[place]) for place in places), strict=True)
    numbers = range(len(jobs))
    return list(zip(np.interp(numbers, places, seconds), np.interp(numbers, places, sizes), strict=True))


def measured(model: Model, job: Job) -> tuple[float, float]:
    """Return the seconds and bytes of one picture of a job, from two short climbs."""
    channels = job.channels[:PICTURES] if model.like.device.type == "cpu" else job.channels
    _, size = timed(model, replace(job, channels=channels, recipe=job.recipe.at(steps=1)))  # what is done only once
    few, many = (
        min(timed(model, replace(job, channels=channels, recipe=job.recipe.at(steps=steps)))[0] for _ in range(REPEATS))
        for steps in STEPS
    )
    step = max(0.0, many - few) / (STEPS[1] - STEPS[0])
    seconds = few + step * (job.recipe.steps - STEPS[0])
    return seconds / len(channels), size / len(channels)


def timed(model: Model, job: Job) -> tuple[float, int]:
    """Return how many seconds a job takes, and how many bytes it makes."""
    begun = time.perf_counter()
    files, _ = render_job(model, job)
    return time.perf_counter() - begun, sum(map(len, files.values()))
