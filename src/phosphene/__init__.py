"""Phosphene shows what a convolutional network has learned. Public names only; nobody inside imports this file.

import phosphene as ph

model = ph.load("builtin/vgg19")
ph.render(model, ph.channel("block3_conv1", range(64))).grid(columns=8).save("filters.png")
"""

from phosphene import errors
from phosphene.activations import Activations, activations
from phosphene.ascent import Frame
from phosphene.atlas import Job, atlas
from phosphene.cams import CAMS
from phosphene.curves import curves, verdicts
from phosphene.errors import PhospheneError
from phosphene.explain import explain, explaining
from phosphene.heatmap import Heatmap
from phosphene.history import History, open_history
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
from phosphene.record import Recorder
from phosphene.render import dream, render
from phosphene.rendered import Rendered
from phosphene.runners.local import LocalRunner
from phosphene.runners.ray import RayRunner
from phosphene.running import run
from phosphene.strip import film, save_film, strip
from phosphene.version import __version__

__all__ = [
    "CAMS",
    "RECIPES",
    "Activations",
    "Frame",
    "Heatmap",
    "History",
    "Job",
    "Kernels",
    "Layer",
    "Layers",
    "LocalRunner",
    "Model",
    "Objective",
    "PhospheneError",
    "Preprocessing",
    "RayRunner",
    "ReceptiveField",
    "Recipe",
    "Recorder",
    "Rendered",
    "__version__",
    "activations",
    "atlas",
    "channel",
    "curves",
    "direction",
    "dream",
    "errors",
    "explain",
    "explaining",
    "film",
    "kernels",
    "l1",
    "l2",
    "layer",
    "load",
    "logit",
    "neuron",
    "open_history",
    "read",
    "render",
    "run",
    "save_film",
    "strip",
    "total_variation",
    "verdicts",
]
