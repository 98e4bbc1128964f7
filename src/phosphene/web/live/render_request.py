"""What a visitor wishes to have rendered, and what there is to show of it, as it forms and when it is finished."""

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
from phosphene.web.views.filter import goes_by_name

SIDES, STEPS, SEEDS = (16, 512), (1, 2048), (0, 2**31 - 1)
WORK = 512**3  # pixels times steps of a render
SHOWN, QUALITY = 256, 80  # pixels of a frame's longer side


@dataclass(frozen=True)
class RenderRequest:
    """A filter that is to be rendered; what is None is as in the atlas."""

    layer: str
    channel: int
    recipe: str | None = None
    size: int | None = None
    steps: int | None = None
    seed: int | None = None

    @classmethod
    def of(cls, given: Any) -> RenderRequest:
        """Return the wish that JSON holds.

        Raises:
            InvalidRequest: it holds none, or one that is too much.
        """
        if not isinstance(given, dict) or not {"layer", "channel"} <= given.keys() <= set(cls.__dataclass_fields__):
            raise InvalidRequest(
                "a render is asked for with layer and channel, and where wished recipe, size, steps and seed"
            )
        if not isinstance(given["layer"], str) or not isinstance(given.get("recipe") or "", str):
            raise InvalidRequest("the layer and the recipe of a render are names")
        limits = {"channel": (0, 10**6), "size": SIDES, "steps": STEPS, "seed": SEEDS}
        for name, (least, most) in limits.items():
            number = given.get(name, least)
            if number is None and name != "channel":
                continue
            whole_number(number, name, least, most)
        return cls(**given)

    def settings(self, atlas: Mapping[str, Any]) -> tuple[Recipe, int | None]:
        """Return the recipe, with steps and seed, and the size, None for the recipe's or what the network takes.

        Raises:
            RecipeNotFound: there is no such recipe.
            InvalidRequest: it is so much work that others would wait too long.
        """
        recipe = recipe_of(atlas)
        own = self.recipe in (None, recipe.name)
        chosen = (recipe if own else find_recipe(str(self.recipe))).at(steps=self.steps, seed=self.seed)
        size = self.size or (atlas["size"] if own else None)
        if sum(side**2 for side in chosen.at(size).sizes) * chosen.steps > WORK:
            raise InvalidRequest("that is more work than a server does while others wait; take fewer steps or pixels")
        return chosen, size


def recipe_of(atlas: Mapping[str, Any]) -> Recipe:
    """Return the recipe of an atlas."""
    return Recipe.from_json(json.dumps({name: one for name, one in atlas["recipe"].items() if name != "digest"}))


def recipes_for(atlas: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipes to choose from and what is set unless one says otherwise, in JSON terms."""
    own = recipe_of(atlas)
    every = {**RECIPES, own.name: own}
    shown = {name: {"size": one.size, "steps": one.steps, "seed": one.seed} for name, one in every.items()}
    if atlas["size"]:
        shown[own.name]["size"] = atlas["size"]
    return {"own": own.name, "recipes": shown, "sides": SIDES, "steps": STEPS, "seeds": SEEDS}


def channels_of(model: Model, path: str) -> int:
    """Return how many filters a layer has.

    Raises:
        LayerNotFound: there is no such layer. LayerRefused: it has no filters.
    """
    layer = model.find(path)
    if not layer.is_map or not layer.channels:
        raise LayerRefused(f"{path} is a {layer.kind} and returns no map of channels; choose a convolution")
    return int(layer.channels)


def render_response(
    model: Model, atlas: Mapping[str, Any], wish: RenderRequest, watch: Callable[[Frame, str], None]
) -> dict[str, Any]:
    """Render what is wished for, and return what there is to tell of it; `watch` gets each frame and how to show it."""
    recipe, size = wish.settings(atlas)
    objective = channel(wish.layer, [wish.channel])
    rendered = render(model, objective, recipe, size=size, batch=1, watch=lambda one: watch(one, recipe.display))
    return {
        "score": finite(float(rendered.scores[0])),
        "start_score": finite(float(rendered.start_scores[0])),
        "dead": bool(rendered.dead[0]),
        "image": data_uri("image/png", encode.png(rendered.pictures[0], rendered.metadata(0))),
        "command": command(model, wish, recipe, size, rendered.spec["precision"]),
    }


def frame_event(frame: Frame, display_rule: str) -> dict[str, Any]:
    """Return what there is to tell of a frame; its picture is small, by a display rule."""
    shown = grid.picture(display.to_bytes(display.DISPLAYS[display_rule](frame.image[:1]))[0])
    shown.thumbnail((SHOWN, SHOWN), Image.Resampling.BICUBIC)
    image = data_uri("image/webp", encode.webp(shown.convert("RGB"), QUALITY, effort=0))
    return {"step": frame.step, "steps": frame.steps, "score": finite(float(frame.scores[0])), "image": image}


def command(model: Model, wish: RenderRequest, recipe: Recipe, size: int | None, precision: str) -> str:
    """Return the command that makes a picture again, empty where its recipe goes by no name."""
    if not goes_by_name(recipe.name, recipe.steps, recipe.seed, recipe.digest):
        return ""
    options = {"channels": wish.channel, "recipe": recipe.name, "size": size, "steps": recipe.steps}
    options |= {"seed": recipe.seed, "precision": precision}
    options |= {"out": f"{file_prefix([wish.layer])}_filter_{wish.channel}.png"}
    return filters_command(model.name, model.options, wish.layer, options)


def data_uri(media_type: str, content: bytes) -> str:
    """Return bytes as an address that a page may show."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def finite(number: float) -> float | None:
    """Return a number as JSON can hold it, None for NaN and infinity."""
    return number if math.isfinite(number) else None
