"""The tools that `engine.py` times, each in a process of its own: `python bench/tools.py TOOL THREADS`.

A wish comes as a line of JSON on the standard input and is answered by a line on the standard output: `step`, seconds a
step (the median over the steps; for the loop that runs whole inside a graph, the mean), `seconds` of the whole call,
`memory`, MB by which the process grew at its peak, and `shortcuts`, those that phosphene took. A wish that fails is
answered by `error`. Nothing that only one tool needs is imported for the others, as they live in two environments.

Every tool climbs the same way unless its own recipe is asked for: pixels from noise, the mean of a channel, no random
transforms, no regulariser. Weights are random, or those of `builtin/vgg19`.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

TENSORFLOW = ("tf-keras-vis", "keras-tf")  # they live in an environment of their own
CONVOLUTIONS = (2, 2, 3, 3, 3)  # a block of VGG16 (Simonyan & Zisserman 2015, configuration D)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Wish:
    """What a tool is to do: climb for pictures of `channels` of a layer, `batch` at once.

    `network` is `vgg16`, with random weights, or `vgg19`, trained. `recipe` is the JSON of one of phosphene's, or
    `own` for what torch-lucent does by default; None for the common way. `objective` is phosphene's: `channel` or
    `neuron`. `device` is for phosphene and torch-lucent, which takes a GPU where there is one. The pictures,
    (n, c, h, w) uint8, go to the file `save`.
    """

    layer: str
    size: int = 224
    steps: int = 5
    network: str = "vgg16"
    channels: list[int] = field(default_factory=lambda: [0])
    batch: int | str = 1
    recipe: str | None = None
    precision: str = "fp32"
    objective: str = "channel"
    device: str = "cpu"
    save: str | None = None


@dataclass
class Done:
    """What came of a wish: the moments at which steps were made, or seconds a step where a loop shows none."""

    stamps: list[float] = field(default_factory=list)
    step: float = 0.0
    shortcuts: list[str] | None = None

    def stamp(self, *_: Any, **__: Any) -> None:
        """Note that a step was made."""
        self.stamps.append(time.perf_counter())

    def seconds(self) -> float:
        """Return seconds a step."""
        gaps = [after - before for before, after in zip(self.stamps, self.stamps[1:], strict=False)]
        return statistics.median(gaps) if gaps else self.step


def address(wish: Wish) -> str:
    """Return the path of a layer in PyTorch's module: torchvision's numbers its layers."""
    if wish.network == "vgg19":
        return wish.layer
    block, convolution = int(wish.layer[5]), int(wish.layer[-1])
    before = sum(2 * count + 1 for count in CONVOLUTIONS[: block - 1])
    return f"features.{before + 2 * (convolution - 1)}"


@cache
def model_of(network: str, device: str = "cpu") -> Any:
    """Return a network as phosphene holds it, in a process that keeps freed memory as the command line does."""
    import torch
    from torchvision import models

    import phosphene as ph
    from phosphene.network.memory import keep_freed_memory

    keep_freed_memory()
    if network == "vgg19":
        return ph.load("builtin/vgg19", device=device)
    torch.manual_seed(0)
    return ph.load(models.vgg16(weights=None).eval(), mean=MEAN, std=STD, device=device)


def phosphene(wish: Wish, done: Done) -> None:
    """Phosphene, by its public call."""
    import phosphene as ph

    excite = ph.neuron if wish.objective == "neuron" else ph.channel
    recipe = ph.Recipe.from_json(wish.recipe) if wish.recipe else ph.RECIPES["max-step"]
    rendered = ph.render(
        model_of(wish.network, wish.device),
        excite(address(wish), wish.channels),
        recipe,
        size=wish.size,
        steps=wish.steps,
        batch=wish.batch,
        precision=wish.precision,
        watch=done.stamp,
    )
    done.stamps.pop()  # after the last step comes the score of the finished picture
    done.shortcuts = rendered.spec.get("shortcuts")
    if wish.save:
        import numpy

        numpy.save(wish.save, rendered.displayed().numpy())


def plain(wish: Wish, done: Done) -> None:
    """R1's loop as it is usually written: the whole network runs, and weights get gradients too."""
    import torch

    model = model_of(wish.network)
    kept: list[torch.Tensor] = []
    hook = model.modules[address(wish)].register_forward_hook(lambda _module, _given, out: kept.append(out))
    image = (torch.rand(int(wish.batch), model.channels_in, wish.size, wish.size) + 128) / 255
    try:
        for _ in range(wish.steps):
            model.module.zero_grad()
            image.requires_grad_()
            model.module(model.preprocessing(image))
            kept.pop()[:, wish.channels[0]].mean().backward()  # type: ignore[no-untyped-call]
            assert image.grad is not None
            image = (image + 2 / 255 / (image.grad.max() + 1e-8) * image.grad).detach()
            done.stamp()
    finally:
        hook.remove()
        model.module.zero_grad()


def lucent(wish: Wish, done: Done) -> None:
    """torch-lucent: in the common way, or by its default recipe (Fourier, decorrelated colours, transforms, Adam).

    The network is given pictures of the size asked for, where by itself it enlarges them to 224 px.
    """
    import numpy
    import torch

    render, objectives, param = (import_module(f"lucent.optvis.{name}") for name in ("render", "objectives", "param"))
    model, pictures = model_of(wish.network, wish.device), []
    own_recipe = wish.recipe == "own"

    class Whole(torch.nn.Module):
        """The network with its preprocessing before it."""

        def __init__(self) -> None:
            super().__init__()
            self.net = model.module

        def forward(self, image: torch.Tensor) -> Any:
            return self.net(model.preprocessing(image))

    for channel in wish.channels:
        torch.manual_seed(channel)
        numpy.random.seed(channel)
        wanted = objectives.channel("_".join(["net", *address(wish).split(".")]), channel)

        def score(layers: Any, wanted: Any = wanted) -> Any:
            done.stamp()
            return wanted(layers)

        images = render.render_vis(
            Whole().eval(),
            objectives.Objective(score),
            lambda: param.image(wish.size, batch=wish.batch, fft=own_recipe, decorrelate=own_recipe),
            transforms=None if own_recipe else [],
            thresholds=(wish.steps,),
            preprocess=False,
            progress=False,
            show_image=False,
            fixed_image_size=wish.size,
        )
        pictures.append(images[-1])
    if wish.save:
        whole = numpy.concatenate(pictures).transpose(0, 3, 1, 2)
        numpy.save(wish.save, (whole.clip(0, 1) * 255).round().astype("uint8"))


@cache
def keras_model(layer: str, size: int) -> Any:
    """Return VGG16 up to a layer, as Keras has it, with random weights."""
    import tensorflow as tf

    whole = tf.keras.applications.VGG16(weights=None, include_top=False, input_shape=(size, size, 3))
    return tf.keras.Model(whole.inputs[0], whole.get_layer(layer).output)


def keras_vis(wish: Wish, done: Done) -> None:
    """tf-keras-vis, without its modifiers of the input and its regularisers."""
    import tensorflow as tf

    package = import_module("tf_keras_vis.activation_maximization")
    callbacks = import_module("tf_keras_vis.activation_maximization.callbacks")
    stamping = type("Stamping", (callbacks.Callback,), {"__call__": lambda _, *given, **more: done.stamp()})
    package.ActivationMaximization(keras_model(wish.layer, wish.size))(
        lambda maps: maps[..., wish.channels[0]],
        seed_input=tf.random.uniform((wish.batch, wish.size, wish.size, 3), 128, 129),
        input_modifiers=[],
        regularizers=[],
        steps=wish.steps,
        callbacks=[stamping()],
    )


@cache
def keras_climb(layer: str, size: int) -> Any:
    """Return R1's loop as one function that TensorFlow compiles: the network up to the layer, no weight gradients."""
    import tensorflow as tf

    model = keras_model(layer, size)

    @tf.function(reduce_retracing=True)  # type: ignore[untyped-decorator,unused-ignore]
    def climb(image: Any, steps: Any, channel: Any) -> Any:
        for _ in tf.range(steps):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(image)
                score = tf.reduce_mean(tf.gather(model(image, training=False), channel, axis=-1))
            gradient = tape.gradient(score, image)
            image += 2.0 * gradient / (tf.reduce_max(gradient) + 1e-8)
        return image

    return climb


def keras_loop(wish: Wish, done: Done) -> None:
    """Keras on TensorFlow, the whole loop inside one `tf.function`."""
    import tensorflow as tf

    climb, channel = keras_climb(wish.layer, wish.size), tf.constant(wish.channels[0])
    image = tf.random.uniform((wish.batch, wish.size, wish.size, 3), 128, 129)
    climb(image, tf.constant(1), channel).numpy()  # traces it where this was not done
    began = time.perf_counter()
    climb(image, tf.constant(wish.steps), channel).numpy()
    done.step = (time.perf_counter() - began) / wish.steps


TOOLS: dict[str, Callable[[Wish, Done], None]] = {
    "plain": plain,
    "lucent": lucent,
    "tf-keras-vis": keras_vis,
    "keras-tf": keras_loop,
    "phosphene": phosphene,
}


def set_threads(tool: str, threads: int) -> None:
    """Have a tool's framework use so many threads."""
    if tool in TENSORFLOW:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    else:
        import torch

        torch.set_num_threads(threads)


def kilobytes(name: str) -> int:
    """Return a figure of this process that Linux keeps: `VmRSS` now, `VmHWM` at its peak."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), peak)


def answer(tool: str, text: str) -> dict[str, Any]:
    """Return what became of a wish."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # forgets the peak so far
    held, began, done = kilobytes("VmRSS"), time.perf_counter(), Done()
    TOOLS[tool](Wish(**json.loads(text)), done)
    seconds, memory = time.perf_counter() - began, (kilobytes("VmHWM") - held) / 1024
    return {"step": done.seconds(), "seconds": seconds, "memory": memory, "shortcuts": done.shortcuts}


def serve(tool: str, threads: int) -> None:
    """Answer wishes until the standard input ends; what the tools print goes to the standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    set_threads(tool, threads)
    for text in sys.stdin:
        try:
            reply = answer(tool, text)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
