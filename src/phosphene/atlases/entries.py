"""The entries that an atlas writes beside its jobs: one for each layer, with sheets and verdicts, and one of itself.

The name of an entry follows from the plan. If jobs have failed, the entry holds the rest of the layer, and is replaced
once they are done.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from safetensors.torch import load

from phosphene.atlases.plan import Atlas, Job
from phosphene.atlases.render_job import MEASURES_FILE, SCORES_FILE
from phosphene.atlases.verdicts import (
    THRESHOLDS,
    VERDICTS,
    LayerStatistics,
    Measurements,
    Verdict,
    check_finite,
    pick_channels,
    verdicts,
)
from phosphene.errors import LayerRefused, WeightsRefused
from phosphene.evidence.statistics import Evidence
from phosphene.images.display import Picture
from phosphene.images.encode import decode_image, png
from phosphene.images.sprites import TILE, SpriteSheet, preview_strip, sprite_sheets
from phosphene.inspection.kernels import kernels
from phosphene.network.layers import Layer
from phosphene.network.model import Model
from phosphene.storage.store import Store, digest_of

# part of an entry's name: goes up by one when entries hold more than before, so that old stores get new ones
ENTRY_VERSION = 2


class SavedPicture(NamedTuple):
    """A picture as it was saved, the digest of its job, and its row in the job's manifest."""

    image: Picture
    job: str
    entry: Mapping[str, Any]


def layer_digest(plan: Atlas, layer: Layer, evidence: Evidence | None) -> str:
    """Return the name of a layer's entry."""
    jobs = [job.digest for job in plan.jobs if job.layer == layer.path]
    photos = evidence.digest if evidence else None
    limits = asdict(THRESHOLDS)
    return digest_of({"jobs": jobs, "evidence": photos, "tile": TILE, "thresholds": limits, "holds": ENTRY_VERSION})


def atlas_digest(plan: Atlas, evidence: Evidence | None) -> str:
    """Return the name of an atlas' entry."""
    return digest_of({"layers": [layer_digest(plan, layer, evidence) for layer in plan.layers]})


def write_layer(
    store: Store,
    plan: Atlas,
    layer: Layer,
    done: AbstractSet[str],
    evidence: Evidence | None = None,
) -> None:
    """Write a layer's entry from its finished jobs, whose digests are in `done`: sheets, kernels and verdicts."""
    jobs = plan.jobs_of(layer)
    pictures = [picture for job in jobs if job.digest in done for picture in saved_pictures(store, job)]
    if not pictures:
        return
    digests = [job.digest for job in plan.jobs if job.layer == layer.path]
    channels, opposites = [picture.entry["channel"] for picture in pictures], opposites_of(store, plan, layer, done)
    sheets = list(sprite_sheets([picture.image for picture in pictures], channels))
    statistics = evidence[layer.path] if evidence else None
    judged, remark = layer_verdicts(store, plan, layer, done, statistics)
    optional = {"strip": strip_of(pictures, judged), "kernels": kernels_of(plan.model, layer, channels)}
    extra = {name: sheet for name, sheet in optional.items() if sheet}
    manifest = {
        "model": plan.model.name,
        "fingerprint": jobs[0].fingerprint,
        "layer": layer.to_json(),
        "jobs": digests,
        "missing": [digest for digest in digests if digest not in done],
        "evidence": evidence.digest if evidence else None,
        "sheets": [sheet.facts for sheet in sheets],
        **{name: sheet.facts for name, sheet in extra.items()},
        "pictures": [{"job": job, **entry, **opposites.get(entry["channel"], {})} for _, job, entry in pictures],
        "thresholds": asdict(THRESHOLDS),
        "verdicts": [asdict(verdict) for verdict in judged],
        "remark": remark,
    }
    files = {sheet.name: sheet.content for sheet in (*sheets, *extra.values())}
    store.put("layers", layer_digest(plan, layer, evidence), files, manifest)


def opposites_of(store: Store, plan: Atlas, layer: Layer, done: AbstractSet[str]) -> dict[int, dict[str, Any]]:
    """Return by channel what a filter's row says about its opposite, under `opposite`: the picture's own row."""
    return {
        row["channel"]: {"opposite": {"job": job.digest, **row}}
        for job in plan.jobs_of(layer, opposite=True)
        if job.digest in done
        for row in store.manifest("jobs", job.digest)["pictures"]
    }


def strip_of(pictures: Sequence[SavedPicture], judged: Sequence[Verdict]) -> SpriteSheet:
    """Return a strip of a layer's vivid pictures, or of all if none is vivid."""
    vivid = [picture for picture, verdict in zip(pictures, judged, strict=False) if verdict.verdict == "vivid"]
    chosen = vivid or pictures
    return preview_strip([picture.image for picture in chosen], [picture.entry["channel"] for picture in chosen])


def kernels_of(model: Model, layer: Layer, channels: Sequence[int]) -> SpriteSheet | None:
    """Return the kernels of a layer's filters as `kernels.png` (see `Kernels.pixels`), None if it has none."""
    try:
        weights = kernels(model, layer.path)
    except (LayerRefused, WeightsRefused):
        return None
    if len(weights) != layer.channels:  # such as of a transposed convolution in groups, whose filters share kernels
        return None
    image, facts = weights.pixels(channels)
    about = {"model": model.name, "fingerprint": model.fingerprint, "layer": layer.path, "channels": list(channels)}
    return SpriteSheet("kernels.png", png(image, about), {"file": "kernels.png", **facts})


def saved_pictures(store: Store, job: Job) -> Iterator[SavedPicture]:
    """Yield the pictures of a finished job from the store."""
    manifest = store.manifest("jobs", job.digest)
    for entry in manifest["pictures"]:
        yield SavedPicture(decode_image(store.get("jobs", job.digest, entry["file"], manifest)), job.digest, entry)


def layer_verdicts(
    store: Store, plan: Atlas, layer: Layer, done: AbstractSet[str], photos: LayerStatistics | None
) -> tuple[tuple[Verdict, ...], str | None]:
    """Return the verdicts on a layer's pictures; if it cannot be judged, none and a sentence that says why."""
    jobs = [job for job in plan.jobs_of(layer) if job.digest in done]
    second_jobs = plan.jobs_of(layer, seed=1) if len(plan.recipes) > 1 else ()
    channels = torch.tensor([channel for job in jobs for channel in job.channels])
    measurements = saved_measurements(store, jobs)
    if second_jobs and {job.digest for job in second_jobs} <= done:
        order = [channel for job in second_jobs for channel in job.channels]
        scores = pick_channels(saved_measurements(store, second_jobs).plain, torch.tensor(order))
        second = scores[[order.index(channel) for channel in channels.tolist()]]
        measurements = measurements._replace(second_seed=second)
    files = [load(store.get("jobs", job.digest, SCORES_FILE)) for job in jobs]
    dead = torch.cat([tensors["dead"] for tensors in files])
    plain = torch.cat([tensors.get("plain", torch.zeros_like(tensors["dead"])) for tensors in files])  # of older jobs
    try:
        check_finite(layer.path, channels, measurements)
    except LayerRefused as error:
        return (), str(error)
    return verdicts(measurements, channels, dead, plain, photos), None


def saved_measurements(store: Store, jobs: Sequence[Job]) -> Measurements:
    """Return the measurements of finished jobs from the store."""
    files = [load(store.get("jobs", job.digest, MEASURES_FILE)) for job in jobs]
    plain, moved = (torch.cat([tensors[name] for tensors in files]).double() for name in ("plain", "moved"))
    return Measurements(plain, moved, None, files[0]["grey"].double())


def write_atlas(store: Store, plan: Atlas, evidence: Evidence | None = None) -> dict[str, int]:
    """Write the entry of the atlas from the entries of its layers, and return how many pictures have each verdict."""
    rows, counts = [], Counter[str]()
    for layer in plan.layers:
        digest = layer_digest(plan, layer, evidence)
        if not store.has("layers", digest):
            continue
        entry = store.manifest("layers", digest)
        of_layer = Counter(verdict["verdict"] for verdict in entry["verdicts"])
        counts += of_layer
        rows.append({**layer.to_json(), "digest": digest, "verdicts": dict(of_layer), "strip": entry["strip"]})
    first, totals = plan.recipes[0], {name: counts[name] for name in VERDICTS}
    manifest = {
        **plan.model.origin,
        "layers": rows,
        "missing": [layer.path for layer in plan.layers if layer.path not in {row["path"] for row in rows}],
        "recipe": {**first.as_dict(), "digest": first.digest},
        "input_size": list(plan.model.input_size),
        "size": plan.size,
        "precision": plan.jobs[0].precision,
        "seeds": [recipe.seed for recipe in plan.recipes],
        "filters": plan.filters,
        "evidence": evidence.digest if evidence else None,
        "verdicts": totals,
    }
    store.put("atlases", atlas_digest(plan, evidence), {}, manifest)
    return totals
