"""Recipes: named, frozen sets of settings, names and numbers only, that make one kind of picture.

A recipe round-trips through JSON, and its digest identifies it. The options of its parts are tuples of (name, value)
pairs, so that recipes can be hashed and compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from phosphene.errors import InvalidRequest, RecipeNotFound, nearest
from phosphene.images.display import DISPLAYS
from phosphene.rendering.parameterizations import PARAMETERIZATIONS
from phosphene.rendering.step_rules import STEP_RULES
from phosphene.rendering.transforms import TRANSFORMS

Choice = tuple[str, tuple[tuple[str, Any], ...]]


def choice(name: str, **options: Any) -> Choice:
    """Return a part of a recipe: its name and its options."""
    return name, tuple(sorted(options.items()))


def check_options(registry: Mapping[str, Callable[..., Any]], part: Choice, *arguments: str) -> None:
    """Refuse options that a part does not have, and a part that lacks one; `arguments` are passed to it elsewhere."""
    name, options = part
    signature = inspect.signature(registry[name])
    try:
        signature.bind(*arguments, **dict(options))
    except TypeError as error:
        names = [parameter for parameter in signature.parameters if parameter not in arguments]
        raise InvalidRequest(f"the part {name!r} of a recipe: {error}; its options are {', '.join(names)}") from error


@dataclass(frozen=True)
class Recipe:
    """How a picture is made.

    `sizes` are the sides of the picture in pixels, scale by scale (one entry: a single scale), `steps` the number of
    steps at each. `display` maps the result to 0..1: `clip`; `stretch` from its minimum..maximum; `standardise`
    (subtract mean, divide by standard deviation + 1e-5, × 0.1, + 0.5, clip; R4.2). `blur` is the side of the box filter
    that R3 may use after each enlargement. `weight_decay` times the tensor is subtracted from every gradient.
    `cooldown` is the share of the last steps at each scale over which updates shrink evenly to nothing. With
    `receptive_fields` above 0, a picture whose size nobody asked for is so many receptive fields of its layer wide, at
    least `SMALLEST` px and at most the last of `sizes`.
    """

    name: str
    source: str
    sizes: tuple[int, ...]
    steps: int
    parameterization: Choice
    step_rule: Choice
    transforms: tuple[Choice, ...] = ()
    display: str = "clip"
    blur: int = 0
    weight_decay: float = 0.0
    cooldown: float = 0.0
    receptive_fields: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = (*self.sizes, self.steps, self.blur, self.seed)
        if any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
            raise InvalidRequest(f"sizes, steps, blur and seed of a recipe are whole numbers, not {numbers}")
        if not self.sizes or min(self.sizes) < 1 or self.steps < 1:
            raise InvalidRequest(f"a recipe needs sizes and steps of at least 1, not {self.sizes} and {self.steps}")
        if self.seed < 0 or self.blur < 0:
            raise InvalidRequest(f"seed and blur are at least 0, not {self.seed} and {self.blur}")
        if self.blur // 2 >= min(self.sizes):
            raise InvalidRequest(f"a blur of {self.blur} px is too wide for a picture of {min(self.sizes)} px")
        if not 0 <= self.cooldown <= 1:
            raise InvalidRequest(f"the cooldown of a recipe is a share of its steps, 0 to 1, not {self.cooldown}")
        if not 0 <= self.receptive_fields < math.inf:
            raise InvalidRequest(f"receptive_fields of a recipe is a number of at least 0, not {self.receptive_fields}")
        parts: tuple[tuple[str, Any], ...] = (
            (self.parameterization[0], PARAMETERIZATIONS),
            (self.step_rule[0], STEP_RULES),
            (self.display, DISPLAYS),
            *((transform[0], TRANSFORMS) for transform in self.transforms),
        )
        for name, registry in parts:
            if name not in registry:
                raise InvalidRequest(f"a recipe has no part {name!r}; there are {', '.join(registry)}")
        check_options(PARAMETERIZATIONS, self.parameterization, "shape", "start", "like")
        check_options(STEP_RULES, self.step_rule)
        for transform in self.transforms:
            check_options(TRANSFORMS, transform)

    @property
    def size(self) -> int:
        """The side of the finished picture in pixels."""
        return self.sizes[-1]

    def with_settings(self, size: int | None = None, steps: int | None = None, seed: int | None = None) -> Recipe:
        """Return this recipe with another final size (all scales in proportion), number of steps, or seed."""
        sizes = self.sizes
        if size is not None and size != self.size:
            if size < 1:
                raise InvalidRequest(f"a picture is at least 1 px wide, not {size}")
            sizes = tuple(max(1, round(side * size / self.size)) for side in self.sizes)
        return dataclasses.replace(
            self,
            sizes=sizes,
            steps=self.steps if steps is None else steps,
            seed=self.seed if seed is None else seed,
        )

    def size_for(self, receptive_field: int | None) -> int:
        """Return the side of a picture of a layer that sees so many pixels; None: the whole image, or unknown."""
        if not self.receptive_fields or receptive_field is None:
            return self.size
        side = math.ceil(self.receptive_fields * receptive_field / STRIDE) * STRIDE
        return min(self.size, max(SMALLEST, side))

    def cooldown_factor(self, step: int) -> float:
        """Return the factor of a step's update, counted from 0 at each scale: 1 until the cooldown."""
        return min(1.0, (self.steps - step) / (self.cooldown * self.steps)) if self.cooldown else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values; without `receptive_fields` if it is 0, as earlier versions had none."""
        fields = dataclasses.asdict(self)
        if not self.receptive_fields:
            del fields["receptive_fields"]
        return fields

    def to_json(self) -> str:
        """Return the recipe as one line of JSON."""
        return json.dumps(self.as_dict(), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Return the recipe that `to_json` wrote.

        Raises:
            InvalidRequest: the text is no recipe.
        """
        try:
            fields = json.loads(text)
            fields["sizes"] = tuple(fields["sizes"])
            for name in ("parameterization", "step_rule"):
                fields[name] = frozen(fields[name])
            fields["transforms"] = tuple(frozen(transform) for transform in fields["transforms"])
            return cls(**fields)
        except (json.JSONDecodeError, TypeError, KeyError, ValueError) as error:
            raise InvalidRequest(f"this is not the JSON of a recipe: {error}") from error

    @property
    def digest(self) -> str:
        """The SHA-256 of the settings without name and source: equal digests make equal pictures."""
        fields = self.as_dict()
        del fields["name"], fields["source"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def frozen(value: Any) -> Any:
    """Return nested lists as nested tuples."""
    return tuple(frozen(entry) for entry in value) if isinstance(value, list) else value


def growing(first: int, factor: float, count: int) -> tuple[int, ...]:
    """Return `count` sizes, each the previous one times `factor`, truncated to an integer."""
    sizes = [first]
    while len(sizes) < count:
        sizes.append(int(sizes[-1] * factor))
    return tuple(sizes)


SMALLEST = 64  # px, of a picture that is as wide as its receptive field asks
STRIDE = 8  # px, of which such a side is a multiple
AFFINE = choice("affine", pixels=3.0, degrees=8.0, scale=0.05, least=0.5)
SPECTRUM = {"decay": 1.3, "cutoff": 0.55}
WINDOWED = choice("fourier", **SPECTRUM, window=0.9, contrast=0.25)
ADAM = {"betas": (0.25, 0.9), "window": 3}
# for photos: momentum, unlike Adam, changes a photo only where the objective wants it
PHOTO_FOURIER = choice("fourier", decay=0.75, cutoff=0.4)
PHOTO_STEP = choice("momentum", rate=0.1, keep=0.7)
PHOTO_AFFINE = choice("affine", pixels=2.0, degrees=4.0, scale=0.03, least=0.5)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="max-step",
            source="R1: gradient-ascent filter visualizer (TensorFlow 1, VGG16)",
            sizes=(224,),
            steps=150,
            parameterization=choice("pixels"),
            step_rule=choice("max", rate=2.0),
            display="stretch",
        ),
        Recipe(
            name="std-step",
            source="R1, the variant that divides by the standard deviation",
            sizes=(224,),
            steps=150,
            parameterization=choice("pixels"),
            step_rule=choice("std", rate=2.0),
            display="stretch",
        ),
        Recipe(
            name="multi-scale",
            source="R3: multi-scale FilterVisualizer (PyTorch/fastai, VGG16)",
            sizes=growing(56, 1.2, 12),
            steps=20,
            parameterization=choice("pixels", low=150 / 255, high=180 / 255, unit="imagenet", whole=True),
            step_rule=choice("adam", rate=0.1),
            weight_decay=1e-6,
        ),
        Recipe(
            name="rms",
            source="R4.2: Visualizing what convnets learn (Keras, VGG16)",
            sizes=(150,),
            steps=40,
            parameterization=choice("pixels", low=128 / 255, high=148 / 255),
            step_rule=choice("rms", rate=1.0),
            display="standardise",
        ),
        Recipe(
            name="fourier",
            source="Olah et al. 2017; contrast, window, rate and steps chosen by bench/pictures.py",
            sizes=(128,),
            steps=32,
            parameterization=WINDOWED,
            step_rule=choice("normalised-adam", rate=0.06, **ADAM),
            transforms=(AFFINE,),
            cooldown=1.0,
            receptive_fields=3.5,
        ),
        Recipe(
            name="fast",
            source="fourier with half the steps",
            sizes=(128,),
            steps=16,
            parameterization=WINDOWED,
            step_rule=choice("normalised-adam", rate=0.09, **ADAM),
            transforms=(AFFINE,),
            cooldown=1.0,
            receptive_fields=3.5,
        ),
        Recipe(
            name="vivid",
            source="Olah et al. 2017; chosen for the strongest excitation, up to version 0.1 the recipe fourier",
            sizes=(128,),
            steps=144,
            parameterization=choice("fourier", **SPECTRUM),
            step_rule=choice("normalised-adam", rate=0.14, **ADAM),
            transforms=(AFFINE,),
            cooldown=1.0,
        ),
        Recipe(
            name="maco",
            source="Fel et al., MACO, NeurIPS 2023",
            sizes=(128,),
            steps=128,
            parameterization=choice("maco"),
            step_rule=choice("normalised-adam", rate=0.1),
            transforms=(choice("affine", pixels=4.0, degrees=8.0, scale=0.1),),
        ),
        Recipe(
            name="dream",
            source="DeepDream: Mordvintsev et al. 2015, octaves and shifts",
            sizes=(164, 230, 321, 450),
            steps=10,
            parameterization=choice("pixels", unit="byte"),
            step_rule=choice("rms", rate=1.5),
            transforms=(choice("jitter", pixels=16),),
        ),
        Recipe(
            name="accentuate",
            source="Hamblin et al., Feature Accentuation, 2024; for a filter and a photo",
            sizes=(224,),
            steps=12,
            parameterization=PHOTO_FOURIER,
            step_rule=PHOTO_STEP,
            transforms=(PHOTO_AFFINE,),
            cooldown=1.0,
        ),
        Recipe(
            name="caricature",
            source="Olah et al. 2017; for a layer and a photo",
            sizes=(224,),
            steps=24,
            parameterization=PHOTO_FOURIER,
            step_rule=PHOTO_STEP,
            transforms=(PHOTO_AFFINE,),
            cooldown=1.0,
        ),
    )
}
DEFAULT = "fourier"


def find_recipe(name: str | Recipe) -> Recipe:
    """Return the recipe of a name.

    Raises:
        RecipeNotFound: there is no such recipe.
    """
    if isinstance(name, Recipe):
        return name
    if name not in RECIPES:
        raise RecipeNotFound(
            f"there is no recipe {name!r}; did you mean one of: {nearest(name, RECIPES, len(RECIPES))}"
        )
    return RECIPES[name]
