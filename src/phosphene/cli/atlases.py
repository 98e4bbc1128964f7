"""The commands of an atlas: `atlas` makes one, `report` shows it."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from phosphene.atlases.cost import estimate
from phosphene.atlases.plan import PER_JOB, Atlas
from phosphene.atlases.plan import atlas as plan_atlas
from phosphene.atlases.report import report as report_of
from phosphene.atlases.run import Summary, run
from phosphene.atlases.runners.local import LocalRunner, worker_devices
from phosphene.atlases.runners.pool import Runner
from phosphene.atlases.runners.ray import RayRunner
from phosphene.atlases.verdict_text import verdict_words
from phosphene.cli.options import (
    AsJson,
    BatchSize,
    Facets,
    OpenModel,
    Precision,
    Quiet,
    RecipeName,
    Seed,
    Size,
    Steps,
    batch_size,
    takes_model,
)
from phosphene.cli.output import check_target, report, to_stderr, to_stdout
from phosphene.errors import EntryNotFound, InvalidRequest, Unfinished
from phosphene.rendering.recipes import DEFAULT, find_recipe
from phosphene.storage.atomic import write_file
from phosphene.storage.store import STORE, Store, open_store

RUNNERS = ("local", "ray")
LISTED = 5  # failures that are printed one by one

StoreOption = Annotated[str, typer.Option("--store", metavar="DIR|URL", help="where the atlas is kept")]
RunnerName = Annotated[str, typer.Option(metavar="|".join(RUNNERS), help="where to render")]
RayAddress = Annotated[str | None, typer.Option(metavar="A", help="a running Ray cluster, such as auto or head:6379")]
Workers = Annotated[int | None, typer.Option(metavar="N", help="workers at once; by default one per CPU or GPU")]
PhotoSource = Annotated[
    str | None,
    typer.Option(metavar="DIR|FILE.parquet|package.module:callable", help="photos to compare the pictures with"),
]


@takes_model
def atlas(
    open_model: OpenModel,
    store: StoreOption,
    layers: Annotated[
        str, typer.Option(metavar="GLOB", help="which layers, such as 'block3*'; if some are convolutions, only those")
    ] = "*",
    channels: Annotated[str, typer.Option(metavar="0:64|3,7,11|all", help="which filters of each layer")] = "all",
    recipe: RecipeName = DEFAULT,
    size: Size = None,
    steps: Steps = None,
    seed: Seed = None,
    seeds: Annotated[int, typer.Option(metavar="N", help="pictures per filter; 2 tell whether seeds agree")] = 1,
    facets: Facets = 1,
    opposite: Annotated[bool, typer.Option("--opposite", help="also draw what suppresses each filter most")] = False,
    photos: PhotoSource = None,
    runner: RunnerName = RUNNERS[0],
    ray_address: RayAddress = None,
    workers: Workers = None,
    precision: Precision = "auto",
    batch: BatchSize = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only print what it would cost")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw every filter of many layers into a store; finished jobs are skipped."""
    find_recipe(recipe).with_settings(size, steps, seed)
    chosen = chosen_runner(runner, ray_address, workers)
    per_job = filters_per_job(batch)
    settings = dict[str, Any](size=size, steps=steps, seed=seed, precision=precision, per_job=per_job)
    settings |= {"seeds": seeds, "facets": facets, "opposite": opposite}
    plan = plan_atlas(open_model(), layers, channels, recipe, **settings)
    if dry_run:
        print_cost(plan, store, workers, as_json)
    else:
        run_and_report(plan, store, chosen, photos, quiet, as_json)


def run_and_report(plan: Atlas, store: str, runner: Runner, photos: str | None, quiet: bool, as_json: bool) -> None:
    """Run an atlas and print its summary; end with exit code 1 if it stopped on the way or a job failed."""
    try:
        summary = run(plan, store, runner, photos, progress=not quiet)
    except Unfinished as stopped:
        if as_json and isinstance(stopped.finished, Summary):
            report([], as_json, asdict(stopped.finished))
        to_stderr(str(stopped))
        raise typer.Exit(1) from stopped
    print_summary(summary, quiet, as_json)
    if summary.failed:
        raise typer.Exit(1)


def filters_per_job(batch: str) -> int:
    """Return how many filters make a job.

    Raises:
        InvalidRequest: the option is neither `auto` nor a number.
    """
    count = PER_JOB if batch == "auto" else batch_size(batch)
    if isinstance(count, str):
        raise InvalidRequest(f"--batch is auto or a whole number of at least 1, not {batch!r}")
    return count


def chosen_runner(name: str, address: str | None, workers: int | None) -> Runner:
    """Return the runner that the options name.

    Raises:
        InvalidRequest: there is no such runner, or the options do not go together.
    """
    if name not in RUNNERS:
        raise InvalidRequest(f"there is no runner {name!r}; choose one of: {', '.join(RUNNERS)}")
    if name == "ray":
        return RayRunner(address, workers)
    if address is not None:
        raise InvalidRequest("--ray-address is for --runner ray; add that, or leave the address out")
    return LocalRunner(workers)


def print_cost(plan: Atlas, store: str, workers: int | None, as_json: bool) -> None:
    """Print what an atlas would cost."""
    cost = estimate(plan, done_in(store))
    count = max(1, min(len(worker_devices(plan.model, workers)), cost.missing))
    seconds = cost.seconds / count
    if as_json:
        report([], as_json, {**asdict(cost), "seconds": seconds, "workers": count})
        return
    done = "" if cost.missing == cost.jobs else f", of which {cost.jobs - cost.missing:,} are done"
    to_stdout(f"{cost.jobs:,} jobs{done}")
    to_stdout(f"{cost.filters:,} filters of {len(plan.layers):,} layers of {plan.model.name}")
    to_stdout(f"about {duration(seconds)} with {count} {'worker' if count == 1 else 'workers'} of this machine")
    to_stdout(f"about {cost.bytes / 1e6:,.1f} MB of pictures")


def done_in(store: str) -> set[str]:
    """Return the digests of the jobs that a store has; none if the store does not exist yet."""
    try:
        Store(store).read(STORE)
    except EntryNotFound:
        return set()
    return open_store(store).done("jobs")


def duration(seconds: float) -> str:
    """Return a time as people say it: "40 s", "12 min", "3 h 20 min".

    >>> duration(12_000)
    '3 h 20 min'
    """
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60:,} h {minutes % 60} min"


def print_summary(summary: Summary, quiet: bool, as_json: bool) -> None:
    """Print the summary of a run, and which jobs failed."""
    store = summary.store.rstrip("/")
    entry = [] if summary.atlas is None else [f"{store}/atlases/{summary.atlas}/manifest.json"]
    report(entry, as_json, asdict(summary))
    for digest, reason in list(summary.failed.items())[:LISTED]:
        to_stderr(f"the job {digest} failed: {reason}")
    if len(summary.failed) > LISTED:
        to_stderr(f"{len(summary.failed):,} jobs failed; each says why in {store}/jobs/…/error.json")
    if not quiet and summary.atlas:
        counts = ", ".join(f"{count:,} {verdict_words(name)}" for name, count in summary.verdicts.items())
        to_stderr(
            f"{summary.done:,} of {summary.jobs:,} jobs are done; {counts}; a page of it: phosphene report {store}"
        )


def report_page(
    store: Annotated[str, typer.Argument(metavar="STORE", help="the folder or URL that an atlas was written to")],
    atlas: Annotated[str | None, typer.Option(metavar="DIGEST", help="which atlas, if the store holds several")] = None,
    out: Annotated[Path, typer.Option(metavar="PATH.html", help="the page; the table goes beside it, as .csv")] = Path(
        "report.html"
    ),
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a page that shows an atlas, and a table of all verdicts."""
    check_target(out, ".html", folders=False)
    table = out.with_suffix(".csv")
    check_target(table, ".csv", folders=False)
    page, rows = report_of(open_store(store), atlas)
    report([write_file(table, rows), write_file(out, page)], as_json, {})
