"""A visitor's request for a render, and what is sent back: frames while it forms, and the finished picture."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from phosphene.arguments import whole_number
from phosphene.errors import InvalidRequest, LayerRefused
from phosphene.images import display, encode, grid
from phosphene.network.layers import file_prefix
from phosphene.network.model import Model
from phosphene.rendering.gradient_ascent import Frame
from phosphene.rendering.objectives import channel
from phosphene.rendering.recipes import RECIPES, Recipe, find_recipe
from phosphene.rendering.render import render
from phosphene.web.shell_commands import filters_command
from phosphene.web.views.filter import is_named_recipe

SIDES, STEPS, SEEDS = (16, 512), (1, 2048), (0, 2**31 - 1)
MAX_WORK = 512**3  # pixels times steps of a render
FRAME_SIDE, QUALITY = 256, 80  # longer side of a frame in px, and its WebP quality


@dataclass(frozen=True)
class RenderRequest:
    """A filter to render; a setting that is None is taken from the atlas."""

    layer: str
    channel: int
    recipe: str | None = None
    size: int | None = None
    steps: int | None = None
    seed: int | None = None

    @classmethod
    def from_json(cls, data: Any) -> RenderRequest:
        """Return the request in a JSON value.

        Raises:
            InvalidRequest: the value is no request, or a setting is out of range.
        """
        if not isinstance(data, dict) or not {"layer", "channel"} <= data.keys() <= set(cls.__dataclass_fields__):
            raise InvalidRequest("a render request needs layer and channel, and may have recipe, size, steps and seed")
        if not isinstance(data["layer"], str) or not isinstance(data.get("recipe") or "", str):
            raise InvalidRequest("the layer and the recipe of a render are names")
        limits = {"channel": (0, 10**6), "size": SIDES, "steps": STEPS, "seed": SEEDS}
        for name, (lowest, highest) in limits.items():
            value = data.get(name, lowest)
            if value is None and name != "channel":
                continue
            whole_number(value, name, lowest, highest)
        return cls(**data)

    def settings(self, atlas: Mapping[str, Any]) -> tuple[Recipe, int | None]:
        """Return the recipe, with steps and seed, and the size, None for the recipe's or the network's input size.

        Raises:
            RecipeNotFound: there is no such recipe.
            InvalidRequest: it is so much work that other visitors would wait too long.
        """
        default = atlas_recipe(atlas)
        is_default = self.recipe in (None, default.name)
        recipe = (default if is_default else find_recipe(str(self.recipe))).with_settings(
            steps=self.steps, seed=self.seed
        )
        size = self.size or (atlas["size"] if is_default else None)
        if sum(side**2 for side in recipe.with_settings(size).sizes) * recipe.steps > MAX_WORK:
            raise InvalidRequest("that is more work than a server does while others wait; take fewer steps or pixels")
        return recipe, size


def atlas_recipe(atlas: Mapping[str, Any]) -> Recipe:
    """Return the recipe of an atlas."""
    return Recipe.from_json(json.dumps({name: value for name, value in atlas["recipe"].items() if name != "digest"}))


def recipe_choices(atlas: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipes to choose from, with their settings and the limits of these, in JSON terms."""
    default = atlas_recipe(atlas)
    recipes = {**RECIPES, default.name: default}
    settings = {
        name: {"size": recipe.size, "steps": recipe.steps, "seed": recipe.seed} for name, recipe in recipes.items()
    }
    if atlas["size"]:
        settings[default.name]["size"] = atlas["size"]
    return {"own": default.name, "recipes": settings, "sides": SIDES, "steps": STEPS, "seeds": SEEDS}


def channel_count(model: Model, path: str) -> int:
    """Return how many filters a layer has.

    Raises:
        LayerNotFound: there is no such layer. LayerRefused: it has no filters.
    """
    layer = model.find(path)
    if not layer.is_map or not layer.channels:
        raise LayerRefused(f"{path} is a {layer.kind} and returns no map of channels; choose a convolution")
    return int(layer.channels)


def render_response(
    model: Model, atlas: Mapping[str, Any], request: RenderRequest, watch: Callable[[Frame, str], None]
) -> dict[str, Any]:
    """Render what is requested and return the facts of `done`; `watch` gets each frame and its display rule."""
    recipe, size = request.settings(atlas)
    objective = channel(request.layer, [request.channel])

    def on_frame(frame: Frame) -> None:
        watch(frame, recipe.display)

    rendered = render(model, objective, recipe, size=size, batch=1, watch=on_frame, progress=False)
    return {
        "score": finite_or_none(float(rendered.scores[0])),
        "start_score": finite_or_none(float(rendered.start_scores[0])),
        "dead": bool(rendered.dead[0]),
        "plain": bool(rendered.plain[0]),
        "image": data_uri("image/png", encode.png(rendered.pictures[0], rendered.metadata(0))),
        "command": command(model, request, recipe, size, rendered.spec["precision"]),
    }


def frame_event(frame: Frame, display_rule: str) -> dict[str, Any]:
    """Return the facts of a frame, with a small picture of its first image."""
    picture = grid.picture(display.to_bytes(display.DISPLAYS[display_rule](frame.image[:1]))[0])
    picture.thumbnail((FRAME_SIDE, FRAME_SIDE), Image.Resampling.BICUBIC)
    image = data_uri("image/webp", encode.webp(picture.convert("RGB"), QUALITY, effort=0))
    score = finite_or_none(float(frame.scores[0]))
    return {"step": frame.step, "steps": frame.steps, "score": score, "image": image}


def command(model: Model, request: RenderRequest, recipe: Recipe, size: int | None, precision: str) -> str:
    """Return the command that renders a picture again, empty if its recipe has no name there."""
    if not is_named_recipe(recipe.name, recipe.steps, recipe.seed, recipe.digest):
        return ""
    options = {"channels": request.channel, "recipe": recipe.name, "size": size, "steps": recipe.steps}
    options |= {"seed": recipe.seed, "precision": precision}
    options |= {"out": f"{file_prefix([request.layer])}_filter_{request.channel}"}
    return filters_command(model.name, model.options, request.layer, options)


def data_uri(media_type: str, content: bytes) -> str:
    """Return bytes as a data: URI."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def finite_or_none(number: float) -> float | None:
    """Return a number as JSON can hold it, None for NaN and infinity."""
    return number if math.isfinite(number) else None
