"""Watch a small network learn 17 kinds of flowers: its kernels, its gradients, and what its filters respond to.

    python examples/watch_training.py                       # PyTorch, on flowers that are drawn for it
    python examples/watch_training.py --framework keras     # the same in Keras, on its torch backend
    python examples/watch_training.py --data 17flowers      # on photos, such as the Oxford 17 flowers

What it takes to watch a training stands in `train_torch` and `train_keras`, what comes of it in `show`.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from flowers import CLASSES, SIDE, Flowers, batches, drawn, photos, split
from torch import nn

import phosphene as ph

RATE = 0.003  # of Adam
PARAMETERS, TRAINABLE = 20_842, 20_802
WATCHED = {"layers": "conv*", "filters": "conv3:0:5"}  # all kernels; five filters, rendered anew after every epoch

# --- the network, its training, and what it takes to watch it ---------------------------------------------------------


def network_torch() -> nn.Sequential:
    """Return the network, with random weights."""
    layers: list[tuple[str, nn.Module]] = []
    for number, (into, out) in enumerate(((3, 5), (5, 10), (10, 5)), 1):
        layers += [
            (f"conv{number}", nn.Conv2d(into, out, 3, padding=1)),
            (f"relu{number}", nn.ReLU()),
            (f"pool{number}", nn.MaxPool2d(2)),
            (f"norm{number}", nn.BatchNorm2d(out)),
        ]
    layers += [("flat", nn.Flatten()), ("hidden", nn.Linear((SIDE // 8) ** 2 * 5, 5)), ("relu4", nn.ReLU())]
    return nn.Sequential(OrderedDict([*layers, ("scores", nn.Linear(5, CLASSES))]))  # the loss has the softmax


def train_torch(train: Flowers, test: Flowers, folder: Path, epochs: int, gradients: str) -> ph.History:
    """Train in a plain PyTorch loop, and return the record."""
    net = network_torch()
    statistics = [buffer for name, buffer in net.named_buffers() if name.endswith(("mean", "var"))]
    trainable = sum(weight.numel() for weight in net.parameters())
    check_size(trainable + sum(buffer.numel() for buffer in statistics), trainable)
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    whole = {"data": batches(train), "loss": F.cross_entropy} if gradients == "epoch" else {}
    with ph.Recorder(net, folder, gradients=gradients, epochs=epochs, **WATCHED, **whole) as recorder:
        for epoch in range(epochs):
            total, right = 0.0, 0
            for images, classes in batches(train, shuffle=True):
                optimizer.zero_grad()
                scores = net(images)
                loss = F.cross_entropy(scores, classes)
                loss.backward()
                recorder.after_backward()  # after backward(), before step(): the gradients are there
                optimizer.step()
                total += loss.item() * len(images)
                right += int((scores.argmax(1) == classes).sum())
            metrics = {"loss": total / len(train), "accuracy": right / len(train), "val_accuracy": accuracy(net, test)}
            recorder.end_epoch(epoch, **metrics)
            print(f"epoch {epoch}:", ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()), flush=True)
    return recorder.history


def accuracy(net: nn.Module, flowers: Flowers) -> float:
    """Return the share of pictures that a network names rightly."""
    net.eval()
    with torch.inference_mode():
        right = sum(int((net(images).argmax(1) == classes).sum()) for images, classes in batches(flowers))
    net.train()
    return right / len(flowers)


def network_keras() -> Any:
    """Return the same network in Keras, with the weights that `network_torch` starts from."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    layers = []
    for number, filters in enumerate((5, 10, 5), 1):
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same", name=f"conv{number}"),
            keras.layers.ReLU(name=f"relu{number}"),
            keras.layers.MaxPooling2D(2, name=f"pool{number}"),
            keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"norm{number}"),
        ]
    layers += [keras.layers.Flatten(name="flat"), keras.layers.Dense(5, name="hidden"), keras.layers.ReLU(name="relu4")]
    layers += [keras.layers.Dense(CLASSES, "softmax", name="scores")]
    network = keras.Sequential([keras.Input((SIDE, SIDE, 3)), *layers], name="flowers")
    for name, module in network_torch().named_children():
        if hasattr(module, "weight") and not name.startswith("norm"):
            weight = module.weight.detach()
            if name == "hidden":  # Keras has the channels last, also where it flattens them
                weight = weight.view(5, 5, SIDE // 8, SIDE // 8).permute(0, 2, 3, 1).flatten(1)
            weight = weight.permute(2, 3, 1, 0) if weight.dim() == 4 else weight.T
            network.get_layer(name).set_weights([weight.numpy(), module.bias.detach().numpy()])
    network.compile(keras.optimizers.Adam(RATE, epsilon=1e-8), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return network


def train_keras(train: Flowers, test: Flowers, folder: Path, epochs: int, gradients: str) -> ph.History:
    """Train with Keras' `fit`, and return the record."""
    network = network_keras()
    check_size(network.count_params(), sum(math.prod(weight.shape) for weight in network.trainable_weights))
    from phosphene.record_keras import KerasRecorder

    train.channels_last = test.channels_last = True
    whole = {"data": batches(train)} if gradients == "epoch" else {}
    recorder = KerasRecorder(folder, gradients=gradients, **WATCHED, **whole)
    given = {"validation_data": batches(test), "shuffle": False, "verbose": 2}  # the loader shuffles
    network.fit(batches(train, shuffle=True), epochs=epochs, callbacks=[recorder], **given)
    return recorder.history


def check_size(parameters: int, trainable: int) -> None:
    """Stop where the network is not the one that is meant."""
    if (parameters, trainable) != (PARAMETERS, TRAINABLE):
        sys.exit(f"the network has {parameters:,} parameters, {trainable:,} of them trainable, and should have "
                 f"{PARAMETERS:,} and {TRAINABLE:,}: has a layer been changed?")  # fmt: skip
    print(f"a network of {parameters:,} parameters, {trainable:,} of them trainable")


# --- what comes of it -------------------------------------------------------------------------------------------------


def show(history: ph.History, folder: Path) -> list[Path]:
    """Draw what was recorded into a folder, and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {f"kernels_{n}.png": history.kernels("conv2", n).grid(style="grey") for n in history.epochs}
    pictures |= {"gradients.png": ph.curves(history), "filters.png": ph.strip(history, "conv3")}
    for name, picture in pictures.items():
        picture.save(folder / name)
    return [*(folder / name for name in pictures), ph.save_film(ph.film(history, "conv3"), folder / "filters.gif")]


# --- the command line -------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> list[Path]:
    """Train, draw what was recorded, say where it is, and return the paths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("torch", "keras"), default="torch")
    parser.add_argument("--data", type=Path, metavar="DIR", help="photos of 17 classes; by default flowers are drawn")
    parser.add_argument("--gradients", choices=("running", "epoch"), default="running",
                        help="the mean over the batches, or those of the loss over all pictures")  # fmt: skip
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--each", type=int, default=80, help="how many flowers of each kind to draw")
    parser.add_argument("--out", type=Path, default=Path("watch-training"))
    options = parser.parse_args(arguments)
    folder = options.out / f"{options.framework}-{options.gradients}"
    train, test = split(*(photos(options.data) if options.data else drawn(options.each)))
    print(f"{len(train):,} pictures to train with and {len(test):,} to test with")
    torch.manual_seed(0)
    run = train_torch if options.framework == "torch" else train_keras
    history = run(train, test, folder / "record", options.epochs, options.gradients)
    written = show(history, folder)
    print(*written, sep="\n")
    print(*ph.verdicts(history), sep="\n")
    print(GUIDE)
    return written


GUIDE = """
kernels_N.png  how the second convolution's kernels change from epoch to epoch: a row a filter, a column a channel
gradients.png  how large the gradient of each weight tensor is: a line that falls far below the others hardly learns
filters.png    what five filters of the third convolution respond to, a row an epoch, from the same start each time:
               a column that still changes is a filter that still learns; filters.gif shows the same as a film"""

if __name__ == "__main__":
    main()
