"""Filters that a Recorder renders after every epoch."""

from __future__ import annotations

from typing import Any, NamedTuple

from phosphene.errors import Interrupted, InvalidRequest, first_line
from phosphene.network.channel_ranges import parse_channels
from phosphene.network.model import Model
from phosphene.rendering.objectives import channel
from phosphene.rendering.recipes import Recipe, find_recipe
from phosphene.rendering.render import render
from phosphene.rendering.result import Rendered
from phosphene.training.adapter import TrainedNetwork


class EpochFilters(NamedTuple):
    """Filters that are rendered after every epoch, always from the same seed."""

    model: Model
    layer: str
    channels: list[int]
    recipe: Recipe

    @classmethod
    def parse(cls, network: TrainedNetwork, filters: str, recipe: str | Recipe) -> EpochFilters:
        """Return the filters that LAYER:CHANNELS means."""
        if network.model is None:
            raise InvalidRequest("filters are rendered with PyTorch; train on Keras' torch backend, or leave them out")
        path, _, channels = filters.partition(":")
        model = network.model()
        layer = model.find(int(path) if path.isdigit() else path)
        if layer.channels is None or not layer.is_map:
            raise InvalidRequest(f"{path} has no map of channels to render; give a convolution as LAYER:0:8")
        return cls(model, layer.path, parse_channels(channels or "all", layer.channels), find_recipe(recipe))

    @property
    def pixels(self) -> int:
        """The bytes of the pictures before compression."""
        return len(self.channels) * self.model.channels_in * self.recipe.size**2

    def facts(self) -> dict[str, Any]:
        """Return which filters are rendered, and how, as JSON values."""
        return {"layer": self.layer, "channels": self.channels, "recipe": self.recipe.as_dict()}

    def render_all(self) -> tuple[Rendered | None, tuple[str, ...]]:
        """Return the filters as they are now, or None and why they were not rendered."""
        try:
            return render(self.model, channel(self.layer, self.channels), self.recipe, progress=False), ()
        except Interrupted:
            raise
        except Exception as error:  # the training continues whatever it is
            return None, (f"filters were not rendered: {first_line(error)}",)
