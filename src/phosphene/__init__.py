"""Phosphene shows what a convolutional network has learned. Public names only; nobody inside imports this file.

import phosphene as ph

model = ph.load("builtin/vgg19")
ph.render(model, ph.channel("block3_conv1", range(64))).grid(columns=8).save("filters.png")
"""

from phosphene import errors
from phosphene.ascent import Frame
from phosphene.errors import PhospheneError
from phosphene.layers import Layer, Layers, ReceptiveField
from phosphene.loaders import load
from phosphene.model import Model, Preprocessing
from phosphene.objectives import (
    Objective,
    channel,
    direction,
    l1,
    l2,
    layer,
    logit,
    neuron,
    total_variation,
)
from phosphene.photo import read
from phosphene.recipes import RECIPES, Recipe
from phosphene.render import dream, render
from phosphene.rendered import Rendered
from phosphene.version import __version__

__all__ = [
    "RECIPES",
    "Frame",
    "Layer",
    "Layers",
    "Model",
    "Objective",
    "PhospheneError",
    "Preprocessing",
    "ReceptiveField",
    "Recipe",
    "Rendered",
    "__version__",
    "channel",
    "direction",
    "dream",
    "errors",
    "l1",
    "l2",
    "layer",
    "load",
    "logit",
    "neuron",
    "read",
    "render",
    "total_variation",
]
