"""The part `score` of `engine.py`: how long each recipe takes to a picture that is as good.

As good means the same robust score, see `pictures.py`: E of the saved picture, the mean over small random moves, and of
that the median over filters. The target is what torch-lucent's default recipe reaches in 256 steps.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import phosphene as ph
from phosphene.rendering.transforms import RandomDraws, resample
from pictures import DRAWS, Excitation, channel_means, read_squares
from rounds import OURS, Bench, Row, Run, interleaved, over

PHOTOS = 300  # of the folder, evenly spread
LUCENT_STEPS = 256


@dataclass
class Judge:
    """Who gives pictures their robust score: E of `pictures.py`, the mean over small random moves."""

    model: ph.Model
    layer: str
    photos: Excitation
    channels: list[int]

    def score(self, pictures: Tensor) -> float:
        """Return the median over filters of the robust E of pictures (n, c, h, w) uint8."""
        picture, draws = pictures.double() / 255, RandomDraws(range(len(self.channels)))
        excitations = []
        for _ in range(DRAWS):
            shift, turn, scale = draws.uniform(-4, 4, (2,)), draws.uniform(-5, 5), draws.uniform(0.95, 1.05)
            moved = resample(picture, shift, turn, scale).float()
            means = channel_means(self.model, [self.layer], moved)[self.layer]
            excitations.append(self.photos.of(means).gather(1, torch.tensor(self.channels)[:, None])[:, 0])
        return float(torch.stack(excitations).mean(0).median())


def score_part(bench: Bench) -> list[Row]:
    """Time every recipe to the score that torch-lucent's default recipe reaches."""
    options, model, rows = bench.options, ph.load("builtin/vgg19"), []
    if not options.photos.is_dir():
        print(f"there is no folder of photos {options.photos}: give one with --photos (make … PHOTOS=folder)")
        return []
    squares = read_squares(options.photos, options.score_size)
    squares = squares[:: max(1, len(squares) // PHOTOS)]
    for layer in options.score_layers:
        means = channel_means(model, [layer], squares)[layer]
        count = means.shape[1]
        channels = [index * count // options.filters for index in range(options.filters)]
        judge = Judge(model, layer, Excitation(means), channels)
        rows += scores_at(bench, judge)
    return rows


def scores_at(bench: Bench, judge: Judge) -> list[Row]:
    """Return and print a row a recipe for one layer."""
    options = bench.options
    common = {"layer": judge.layer, "size": options.score_size, "network": "vgg19"}
    lucent = {**common, "recipe": "own", "steps": LUCENT_STEPS, "channels": judge.channels}
    target = pictured(bench, judge, "torch-lucent", lucent)
    head = f"{'layer':<14}{'recipe':<14}{'tool':<16}{'steps':>7}{'robust E':>10}{'s a filter':>12}"
    print(f"{head}{'lucent / it':>13}")
    lucent_step = {**lucent, "steps": 6, "channels": judge.channels[:1]}
    pace = bench.run("torch-lucent", **lucent_step)
    runs: dict[str, Run] = {"torch-lucent": lambda: pace() * LUCENT_STEPS * options.filters}
    rows: dict[str, Row] = {
        "torch-lucent": {"recipe": "lucent", "tool": "torch-lucent", "steps": LUCENT_STEPS, "robust E": target}
    }
    for name in options.recipes:
        recipe = ph.RECIPES[name] if name in ph.RECIPES else ph.Recipe.from_json(Path(name).read_text())
        for ours in OURS:
            if ours == "ours bf16" and recipe.name in ("max-step", "multi-scale", "rms"):
                continue  # the older systems are taken as they were
            wish = {**common, "recipe": recipe.to_json(), "channels": judge.channels, "batch": "auto"}
            steps, reached = fewest_steps(bench, judge, ours, wish, target, options.most_steps // len(recipe.sizes))
            key = f"{recipe.name} {ours}"
            rows[key] = {"recipe": recipe.name, "tool": ours, "steps": steps * len(recipe.sizes), "robust E": reached}
            runs[key] = bench.run(ours, "seconds", **{**wish, "steps": steps})
    times = interleaved(min(3, options.rounds), runs)
    for key, row in rows.items():
        row.update(layer=judge.layer, size=options.score_size, filters=options.filters)
        row["reaches"] = row["robust E"] >= target
        row["seconds"] = statistics.median(times[key]) / options.filters
        row["lucent / it"] = over(times["torch-lucent"], times[key])
        ratio = f"{row['lucent / it']:>13.1f}" if row["reaches"] else f"{'not reached':>13}"
        start = f"{row['layer']:<14}{row['recipe']:<14}{row['tool']:<16}{row['steps']:>7}{row['robust E']:>10.2f}"
        print(f"{start}{row['seconds']:>12.2f}{ratio}", flush=True)
    return list(rows.values())


def pictured(bench: Bench, judge: Judge, name: str, wish: Row) -> float:
    """Have a tool make pictures and return their score."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/pictures.npy"
        bench.ask(name, **wish, save=path)
        return judge.score(torch.from_numpy(np.load(path)))


def fewest_steps(bench: Bench, judge: Judge, name: str, wish: Row, target: float, most: int) -> tuple[int, float]:
    """Return the fewest steps a scale, to about an eighth, with which a recipe reaches a score, and what it reaches.

    A recipe plans its steps, so that each number of steps is a climb of its own. Where `most` steps do not reach the
    score, these are returned.
    """
    reached: dict[int, float] = {}
    low, high = 0, min(4, most)
    while True:
        reached[high] = pictured(bench, judge, name, {**wish, "steps": high})
        if reached[high] >= target or high == most:
            break
        low, high = high, min(2 * high, most)
    if reached[high] < target:
        return high, reached[high]
    while high - low > max(1, high // 8):
        middle = (low + high) // 2
        reached[middle] = pictured(bench, judge, name, {**wish, "steps": middle})
        low, high = (low, middle) if reached[middle] >= target else (middle, high)
    return high, reached[high]
