"""The public names, for type checkers, and for `__init__.py`, which loads each at its first use."""

from . import errors
from .atlases.plan import Job, atlas
from .atlases.run import run
from .atlases.runners.local import LocalRunner
from .atlases.runners.ray import RayRunner
from .errors import PhospheneError
from .images.photo import read
from .inspection.activations import Activations, activations
from .inspection.attribution_methods import CAMS
from .inspection.explain import explain, explaining
from .inspection.heatmap import Heatmap
from .inspection.kernels import Kernels, kernels
from .network.layers import Layer, Layers, ReceptiveField
from .network.loading import load
from .network.model import Model
from .network.preprocessing import Preprocessing
from .rendering.accentuation import accentuate, dream
from .rendering.gradient_ascent import Frame
from .rendering.objectives import Objective, channel, direction, l1, l2, layer, logit, neuron, total_variation
from .rendering.recipes import RECIPES, Recipe
from .rendering.render import render
from .rendering.result import Rendered
from .training.film_strip import film, save_film, strip
from .training.gradient_plot import curves
from .training.gradient_verdicts import verdicts
from .training.history import History, open_history
from .training.recorder import Recorder
from .version import __version__

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
    "accentuate",
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
