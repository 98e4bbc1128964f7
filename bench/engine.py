"""Measure the engine: `make bench-engine PHOTOS=folder` (peers set up by `make bench-peers`).

Parts, chosen by `--parts`; on VGG16 with random weights, one filter, batch 1, where nothing else is said:

    steps    milliseconds a step at three layers and two sizes, against R1's plain loop, torch-lucent, tf-keras-vis and
             Keras on TensorFlow inside one `tf.function`; and what share of the machine's limit that is
    limit    the same of phosphene alone
    score    time to the robust score that torch-lucent's default recipe reaches in 256 steps, trained VGG19
    neuron   a step for a neuron against one for a channel's mean, of which the whole picture has to go through
    memory   MB a picture: the slope of the process's peak over the batch
    gpu      all 4,224 filters of VGG16 at 224 px, 512 steps each, and torch-lucent's time for 32 of them, scaled; left
             out where there is no GPU
    growth   time against the number of channels, the size of the picture and the depth of the layer

Every tool has a process of its own. Rounds are interleaved: every tool runs once a round, while the others wait.
Figures are medians over rounds, and ratios medians over rounds of the ratio. The limit is measured in every round too,
by `limit.c`. Its share counts the multiplications and additions that nobody can do without: forward, and backward to
the picture, through the convolutions before the layer, and one channel of the layer itself.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import phosphene as ph
from equal_score import score_part
from rounds import HERE, OURS, PEERS, Bench, Failed, Row, Run, interleaved, over

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # of VGG16's convolutions
CONVOLUTIONS = [
    f"block{block}_conv{number}" for block, row in enumerate(WIDTHS, 1) for number in range(1, len(row) + 1)
]
GROWTH_STEPS = 6
LAYERS = ("block1_conv2", "block3_conv1", "block5_conv3")


def needed(layer: str, size: int) -> float:
    """Return the 1e9 multiplications and additions that a step for one filter cannot do without; see above."""
    block, convolution = int(layer[5]), int(layer[-1])
    total, before = 0.0, 3
    for number, widths in enumerate(WIDTHS, 1):
        pixels = (size >> (number - 1)) ** 2
        for position, width in enumerate(widths, 1):
            last = (number, position) == (block, convolution)
            total += 2 * 2 * pixels * before * 9 * (1 if last else width)  # forward and backward, two a product
            if last:
                return total / 1e9
            before = width
    raise ValueError(layer)


def steps_part(bench: Bench, names: Iterable[str] = (*PEERS, *OURS)) -> list[Row]:
    """Time a step of every tool."""
    rows: list[Row] = []
    print(f"{'size':<6}{'layer':<14}{'tool':<20}{'ms a step':>10}{'/ float32':>11}{'/ bf16':>9}{'of limit':>10}")
    for size in bench.options.sizes:
        for layer in bench.options.layers:
            runs: dict[str, Run] = {}
            for name in names:
                try:  # warms up, and says how many steps fill half a second
                    first = bench.ask(name, layer=layer, size=size)["step"]
                except Failed as error:
                    print(f"{size:<6}{layer:<14}{name:<20} {error}")
                    rows.append({"size": size, "layer": layer, "tool": name, "error": str(error)})
                    continue
                runs[name] = bench.run(name, layer=layer, size=size, steps=min(50, max(5, round(0.5 / first))))
            bench.limits.clear()
            times = interleaved(bench.options.rounds, runs, bench.note_limit)
            for name in runs:
                rows.append(steps_row(size, layer, name, times, bench.limits))
                print(steps_line(rows[-1]), flush=True)
    return rows


def steps_row(size: int, layer: str, name: str, times: dict[str, list[float]], limits: list[Row]) -> Row:
    """Return the figures of one tool at one layer and size."""
    row: Row = {"size": size, "layer": layer, "tool": name, "milliseconds": statistics.median(times[name]) * 1000}
    row["rounds"] = [seconds * 1000 for seconds in times[name]]
    for ours in OURS:
        if ours in times:
            row[f"time / {ours}"] = over(times[name], times[ours])
    format_of = "bf16" if OURS.get(name) == "bf16" else "float32"
    if measured := [limit for limit in limits if limit.get(format_of)]:
        row["GFLOP"] = needed(layer, size)
        row["limit GFLOP/s"] = statistics.median(limit[format_of] for limit in measured)
        row["limit by"] = measured[0][f"{format_of} by"]
        row["share of limit"] = row["GFLOP"] / row["milliseconds"] * 1000 / row["limit GFLOP/s"]
    return row


def steps_line(row: Row) -> str:
    """Return one line of the table."""
    ratios = "".join(f"{row.get(f'time / {ours}', float('nan')):>10.2f}" for ours in OURS)
    start = f"{row['size']:<6}{row['layer']:<14}{row['tool']:<20}{row['milliseconds']:>10.1f} {ratios}"
    return start + f"{row.get('share of limit', float('nan')):>9.2f}"


def limit_part(bench: Bench) -> list[Row]:
    """Time a step of phosphene alone, and compare it with the machine's limit."""
    return steps_part(bench, OURS)


def neuron_part(bench: Bench) -> list[Row]:
    """Time a step for a neuron in the middle of a map against one for a channel's mean."""
    rows = []
    print(f"{'size':<6}{'layer':<14}{'tool':<16}{'channel ms':>12}{'neuron ms':>11}{'ratio':>8}")
    for size in bench.options.sizes:
        for layer in bench.options.layers:
            for name in OURS:
                runs = {
                    objective: bench.run(name, layer=layer, size=size, steps=12, objective=objective)
                    for objective in ("channel", "neuron")
                }
                interleaved(1, runs)  # warms up
                times = interleaved(bench.options.rounds, runs)
                whole, cropped = (statistics.median(times[run]) * 1000 for run in runs)
                row = {"size": size, "layer": layer, "tool": name, "channel ms": whole, "neuron ms": cropped}
                rows.append({**row, "ratio": over(times["channel"], times["neuron"])})
                figures = f"{whole:>12.2f}{cropped:>11.2f}{rows[-1]['ratio']:>8.1f}"
                print(f"{size:<6}{layer:<14}{name:<16}{figures}", flush=True)
    return rows


def memory_part(bench: Bench) -> list[Row]:
    """Measure how a process grows with the batch: block3_conv1, 224 px, one round."""
    batches, rows = (1, 4, 8), []
    print(f"{'tool':<20}" + "".join(f"{f'batch {batch}':>10}" for batch in batches) + f"{'MB a picture':>15}")
    for name in (*PEERS, *OURS):
        peaks: list[float] = []
        for batch in batches:
            # the peers make `batch` pictures of one filter, phosphene one of each of so many
            channels = list(range(batch)) if name in OURS else [0]
            try:
                reply = bench.fresh(name, layer="block3_conv1", size=224, steps=3, batch=batch, channels=channels)
            except Failed as error:
                reply = {"memory": float("nan")}
                print(f"{name:<20} {error}")
            peaks.append(reply["memory"])
        slope = (peaks[-1] - peaks[0]) / (batches[-1] - batches[0])
        rows.append({"tool": name, "batches": batches, "MB": peaks, "MB a picture": slope})
        print(f"{name:<20}" + "".join(f"{peak:>10.0f}" for peak in peaks) + f"{slope:>15.1f}", flush=True)
    return rows


def gpu_part(bench: Bench) -> list[Row]:
    """Time every filter of VGG16 on a GPU, 224 px, 512 steps, by the recipe `fourier`."""
    if not torch.cuda.is_available():
        print("no GPU that PyTorch can use: not measured")
        return []
    rows = []
    wish = {"size": 224, "steps": 512, "device": "cuda", "batch": "auto", "recipe": ph.RECIPES["fourier"].to_json()}
    for name in OURS:
        seconds = []
        for layer, width in zip(CONVOLUTIONS, (width for widths in WIDTHS for width in widths), strict=True):
            seconds.append(bench.ask(name, **wish, layer=layer, channels=list(range(width)))["seconds"])
            print(f"{name:<16}{layer:<14}{width:>5} filters{seconds[-1]:>10.1f} s", flush=True)
        rows.append({"tool": name, "seconds": sum(seconds), "by layer": seconds, "gpu": torch.cuda.get_device_name()})
    sample = {"block1_conv2": 1, "block2_conv2": 2, "block3_conv2": 6, "block4_conv2": 11, "block5_conv2": 12}  # 32
    wish = {"size": 224, "steps": 512, "device": "cuda", "recipe": "own"}
    replies = [bench.ask("torch-lucent", **wish, layer=path, channels=list(range(n))) for path, n in sample.items()]
    seconds = [reply["seconds"] for reply in replies]
    rows.append({"tool": "torch-lucent", "seconds": sum(seconds) * 4224 / 32, "by layer": seconds, "scaled": True})
    for row in rows:
        print(f"{row['tool']:<16}{row['seconds']:>10.0f} s in all")
    return rows


def growth_part(bench: Bench) -> list[Row]:
    """Time against channels (64 px, block4_conv1), size (block3_conv1) and depth (224 px)."""
    points: list[tuple[str, int | str, Row]] = [
        *(
            ("channels", count, {"layer": "block4_conv1", "size": 64, "channels": list(range(count)), "batch": "auto"})
            for count in (1, 4, 16, 64, 256, 512)
        ),
        *(("size", size, {"layer": "block3_conv1", "size": size}) for size in (64, 96, 128, 192, 256, 384, 512)),
        *(("depth", layer, {"layer": layer}) for layer in CONVOLUTIONS),
    ]
    rows: list[Row] = []
    name = "ours float32"
    print(f"{'against':<10}{'at':<14}{'s a call':>10}{'ms a filter and step':>22}{'ms a GFLOP':>12}")
    for against, at, wish in points:
        bench.ask(name, **{**wish, "channels": [0]}, steps=2)  # warms up
        repeats = 1 if len(wish.get("channels", [])) > 16 else min(3, bench.options.rounds)
        replies = [bench.ask(name, **wish, steps=GROWTH_STEPS) for _ in range(repeats)]
        seconds, step = (statistics.median(reply[figure] for reply in replies) for figure in ("seconds", "step"))
        # of many filters the whole call counts; of one the step alone
        each = seconds / (GROWTH_STEPS * len(wish["channels"])) if against == "channels" else step
        work = needed(wish["layer"], wish.get("size", 224))
        row = {"against": against, "at": at, "seconds": seconds, "ms": each * 1000, "ms a GFLOP": each * 1000 / work}
        rows.append(row)
        print(f"{against:<10}{at:<14}{seconds:>10.2f}{row['ms']:>22.2f}{row['ms a GFLOP']:>12.2f}", flush=True)
    return rows


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "steps": steps_part,
    "limit": limit_part,
    "score": score_part,
    "neuron": neuron_part,
    "memory": memory_part,
    "growth": growth_part,
    "gpu": gpu_part,
}


def parsed() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [part for part in PARTS if part != "limit"]
    parser.add_argument("--parts", type=lambda text: text.split(","), default=default, help="such as steps,growth")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 128])
    parser.add_argument("--layers", nargs="+", default=list(LAYERS))
    parser.add_argument("--photos", type=Path, default=Path("photos"), help="a folder of JPEG photos, for score")
    parser.add_argument("--score-layers", nargs="+", default=["block3_conv1", "block5_conv1"])
    parser.add_argument("--score-size", type=int, default=128)
    parser.add_argument("--filters", type=int, default=8, help="of score")
    parser.add_argument("--most-steps", type=int, default=256, help="of score, after which a recipe is given up")
    recipes = ["fourier", "fast", "max-step", "multi-scale", "rms"]
    parser.add_argument("--recipes", nargs="+", default=recipes, help="names, or files that hold a recipe's JSON")
    python = HERE.parent / ".venv-peers/tensorflow/bin/python"
    parser.add_argument("--tensorflow", type=Path, default=python, help="the Python that TensorFlow is installed for")
    parser.add_argument("--out", type=Path, default=HERE / "results/engine.json")
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return options


def processor() -> str:
    """Return what the processor calls itself."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Print the tables and write them to bench/results/engine.json, beside the parts of it that were not asked for."""
    options = parsed()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"machine": platform.machine(), "processor": processor(), "threads": options.threads}
    versions = {"torch": torch.__version__, "phosphene": ph.__version__, "peers": peers()}
    for part in options.parts:
        print(f"\n{part}: {(PARTS[part].__doc__ or '').splitlines()[0]}")
        with ExitStack() as stack:
            rows = PARTS[part](Bench(options, stack))
        results[part] = {**machine, **versions, "rounds": options.rounds, "rows": rows}
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(options.out)


def peers() -> list[str]:
    """Return the packages that are compared with, and their versions, as the lists of them say."""
    lists = [HERE / name for name in ("peers.txt", "engine-peers.txt")]
    lines = [line for path in lists for line in path.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


if __name__ == "__main__":
    main()
