"""Phosphene shows what a convolutional network has learned. Public names only; nobody inside imports this file.

import phosphene as ph

model = ph.load("builtin/vgg19")
ph.render(model, ph.channel("block3_conv1", range(64))).grid(columns=8).save("filters.png")
"""

from phosphene import errors
from phosphene.activations import Activations, activations
from phosphene.ascent import Frame
from phosphene.cams import CAMS
from phosphene.errors import PhospheneError
from phosphene.explain import explain, explaining
from phosphene.heatmap import Heatmap
from phosphene.kernels import Kernels, kernels
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
    "CAMS",
    "RECIPES",
    "Activations",
    "Frame",
    "Heatmap",
    "Kernels",
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
    "activations",
    "channel",
    "direction",
    "dream",
    "errors",
    "explain",
    "explaining",
    "kernels",
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
