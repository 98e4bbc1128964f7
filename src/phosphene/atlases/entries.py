"""What an atlas writes beside its jobs: an entry a layer, with its sheet and verdicts, and one of the whole.

An entry is named after what was planned. Where jobs have failed it tells what there is, and is replaced when they are
done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from safetensors.torch import load

from phosphene.atlases.plan import Atlas, Job
from phosphene.atlases.render_job import FIGURES, MEASURES
from phosphene.atlases.verdicts import (
    THRESHOLDS,
    VERDICTS,
    LayerStatistics,
    Measured,
    Verdict,
    need_finite,
    of_own,
    verdicts,
)
from phosphene.errors import LayerRefused, WeightsRefused
from phosphene.evidence.collect import Evidence
from phosphene.images.display import Picture
from phosphene.images.encode import decode_image, png
from phosphene.images.sprites import TILE, SpriteSheet, preview_strip, sprite_sheets
from phosphene.inspection.kernels import kernels
from phosphene.network.layers import Layer
from phosphene.network.model import Model
from phosphene.storage.store import Store, digest_of

ENTRY_VERSION = (
    2  # part of an entry's name: goes up by one when it holds more than before, so that old stores get new ones
)


class SavedPicture(NamedTuple):
    """A picture as it was saved, and what its job says of it."""

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


def layer_facts(layer: Layer) -> dict[str, Any]:
    """Return what is known of a layer, in JSON terms."""
    return {key: value for key, value in asdict(layer).items() if key != "place"}


def write_layer(
    store: Store,
    plan: Atlas,
    layer: Layer,
    there: AbstractSet[str],
    evidence: Evidence | None = None,
) -> None:
    """Write a layer's entry, from those of its jobs that are `there`: its sheets, kernels, and a verdict a filter."""
    jobs = plan.jobs_of(layer)
    pictures = [one for job in jobs if job.digest in there for one in saved(store, job)]
    if not pictures:
        return
    missing = [job.digest for job in plan.jobs if job.layer == layer.path and job.digest not in there]
    channels = [one.entry["channel"] for one in pictures]
    made = list(sprite_sheets([one.image for one in pictures], channels))
    statistics = evidence[layer.path] if evidence else None
    judgements, remark = layer_verdicts(store, plan, layer, there, statistics)
    sights = {"strip": strip_of(pictures, judgements), "kernels": kernels_of(plan.model, layer, channels)}
    extra = {name: one for name, one in sights.items() if one}
    manifest = {
        "model": plan.model.name,
        "fingerprint": jobs[0].fingerprint,
        "layer": layer_facts(layer),
        "jobs": [job.digest for job in plan.jobs if job.layer == layer.path],
        "missing": missing,
        "evidence": evidence.digest if evidence else None,
        "sheets": [one.facts for one in made],
        **{name: one.facts for name, one in extra.items()},
        "pictures": [{"job": one.job, **one.entry} for one in pictures],
        "thresholds": asdict(THRESHOLDS),
        "verdicts": [asdict(one) for one in judgements],
        "remark": remark,
    }
    files = {one.name: one.content for one in (*made, *extra.values())}
    store.put("layers", layer_digest(plan, layer, evidence), files, manifest)


def strip_of(pictures: Sequence[SavedPicture], judgements: Sequence[Verdict]) -> SpriteSheet:
    """Return some of a layer's pictures in a row: of the vivid ones, or of all where none is."""
    vivid = [one for one, judgement in zip(pictures, judgements, strict=False) if judgement.verdict == "vivid"]
    some = vivid or pictures
    return preview_strip([one.image for one in some], [one.entry["channel"] for one in some])


def kernels_of(model: Model, layer: Layer, channels: Sequence[int]) -> SpriteSheet | None:
    """Return the kernels of a layer's filters as `kernels.png` (see `Kernels.pixels`); None where it has none."""
    try:
        found = kernels(model, layer.path)
    except (LayerRefused, WeightsRefused):
        return None
    if len(found) != layer.channels:  # such as of a transposed convolution in groups, whose filters share kernels
        return None
    image, facts = found.pixels(channels)
    told = {"model": model.name, "fingerprint": model.fingerprint, "layer": layer.path, "channels": list(channels)}
    return SpriteSheet("kernels.png", png(image, told), {"file": "kernels.png", **facts})


def saved(store: Store, job: Job) -> Iterator[SavedPicture]:
    """Yield the pictures of a finished job as they lie in the store."""
    manifest = store.manifest("jobs", job.digest)
    for entry in manifest["pictures"]:
        yield SavedPicture(decode_image(store.get("jobs", job.digest, entry["file"], manifest)), job.digest, entry)


def layer_verdicts(
    store: Store, plan: Atlas, layer: Layer, there: AbstractSet[str], statistics: LayerStatistics | None
) -> tuple[tuple[Verdict, ...], str | None]:
    """Return the verdicts on a layer's pictures; where it cannot be judged none, and a sentence that says why."""
    jobs = [job for job in plan.jobs_of(layer) if job.digest in there]
    others = plan.jobs_of(layer, seed=1) if len(plan.recipes) > 1 else ()
    shown = torch.tensor([number for job in jobs for number in job.channels])
    measured = measured_on(store, jobs)
    if others and {job.digest for job in others} <= there:
        order = [number for job in others for number in job.channels]
        again = of_own(measured_on(store, others).plain, torch.tensor(order))
        measured = measured._replace(second=again[[order.index(number) for number in shown.tolist()]])
    dead = [load(store.get("jobs", job.digest, FIGURES))["dead"] for job in jobs]
    try:
        need_finite(layer.path, shown, measured)
    except LayerRefused as error:
        return (), str(error)
    return verdicts(measured, shown, torch.cat(dead), statistics), None


def measured_on(store: Store, jobs: Sequence[Job]) -> Measured:
    """Return what finished jobs measured on their pictures."""
    found = [load(store.get("jobs", job.digest, MEASURES)) for job in jobs]
    plain, moved = (torch.cat([one[name] for one in found]).double() for name in ("plain", "moved"))
    return Measured(plain, moved, None, found[0]["grey"].double())


def write_atlas(store: Store, plan: Atlas, evidence: Evidence | None = None) -> dict[str, int]:
    """Write the entry of the atlas, from those of its layers that there are, and return how many verdicts there are."""
    rows, counts = [], Counter[str]()
    for layer in plan.layers:
        digest = layer_digest(plan, layer, evidence)
        if not store.has("layers", digest):
            continue
        entry = store.manifest("layers", digest)
        of_layer = Counter(one["verdict"] for one in entry["verdicts"])
        counts += of_layer
        rows.append({**layer_facts(layer), "digest": digest, "verdicts": dict(of_layer), "strip": entry["strip"]})
    first, of_all = plan.recipes[0], {name: counts[name] for name in VERDICTS}
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
        "verdicts": of_all,
    }
    store.put("atlases", atlas_digest(plan, evidence), {}, manifest)
    return of_all
