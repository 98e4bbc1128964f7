"""Phosphene shows what a convolutional network has learned. Public names only; nobody inside imports this file.

import phosphene as ph

model = ph.load("builtin/vgg19")
ph.render(model, ph.channel("block3_conv1", range(64))).grid(columns=8).save("filters.png")
"""

from phosphene import errors
from phosphene.atlases.plan import Job, atlas
from phosphene.atlases.run import run
from phosphene.atlases.runners.local import LocalRunner
from phosphene.atlases.runners.ray import RayRunner
from phosphene.errors import PhospheneError
from phosphene.images.photo import read
from phosphene.inspection.activations import Activations, activations
from phosphene.inspection.attribution_methods import CAMS
from phosphene.inspection.explain import explain, explaining
from phosphene.inspection.heatmap import Heatmap
from phosphene.inspection.kernels import Kernels, kernels
from phosphene.network.layers import Layer, Layers, ReceptiveField
from phosphene.network.loading import load
from phosphene.network.model import Model
from phosphene.network.preprocessing import Preprocessing
from phosphene.rendering.gradient_ascent import Frame
from phosphene.rendering.objectives import Objective, channel, direction, l1, l2, layer, logit, neuron, total_variation
from phosphene.rendering.recipes import RECIPES, Recipe
from phosphene.rendering.render import dream, render
from phosphene.rendering.result import Rendered
from phosphene.training.film_strip import film, save_film, strip
from phosphene.training.gradient_norms import curves, verdicts
from phosphene.training.history import History, open_history
from phosphene.training.recorder import Recorder
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
