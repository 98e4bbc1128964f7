"""Which networks are opened for an atlas, and in which thread each is used."""

from __future__ import annotations

from typing import Any

import pytest
from test_render_queue import atlas_id, reader
from torch import nn

from phosphene.errors import (
    ModelNotFound,
    ModelRefused,
)
from phosphene.network.loading import load
from phosphene.network.model import Model
from phosphene.web.live import render_queue as render_queue
from phosphene.web.live.model_pool import MAX_MODELS, Identity, ModelThread, independent_copy, open_model, refusal
from phosphene.web.live.render_queue import RenderQueue
from phosphene.web.store_reader import StoreReader
from tiny_atlas import tiny_model

__all__ = ["atlas_id", "reader"]


def test_a_store_does_not_choose_what_code_is_run() -> None:
    here = {"model": "os:getcwd", "fingerprint": "0" * 16}
    for name in (
        "os:getcwd",
        "model.keras",
        "timm/hf-hub:somebody/else",
        "builtin/../vgg19",
        "torchvision/",
        "keras/a/b",
    ):
        with pytest.raises(ModelRefused, match="to render, start the server with: phosphene serve PLACE --model"):
            open_model({**here, "model": name}, "cpu", None)
    with pytest.raises(ModelRefused, match="was started with is not os:getcwd as this atlas was made with it"):
        open_model(here, "cpu", tiny_model())
    with pytest.raises(ModelRefused, match="--model builtin/vgg19 --weights /etc/passwd, where that file is"):
        open_model({**here, "model": "builtin/vgg19", "options": {"weights": "/etc/passwd"}}, "cpu", None)
    with pytest.raises(ModelNotFound):
        open_model({**here, "model": "builtin/vgg99"}, "cpu", None)


def test_other_weights_under_the_same_name_are_refused() -> None:
    here = {"model": "builtin/efficientnet-lite0", "fingerprint": load("builtin/efficientnet-lite0").fingerprint}
    assert open_model({**here, "input_size": [224, 224]}, "cpu", None).input_size == (224, 224)
    for changes in ({"fingerprint": "0" * 16}, {"input_size": [224, 96]}):
        with pytest.raises(ModelRefused, match="has other weights or another input size here than this atlas"):
            open_model({**here, **changes}, "cpu", None)


def test_the_given_network_is_taken_where_it_is_the_right_one() -> None:
    model = tiny_model()
    here = {"model": "anything", "fingerprint": model.fingerprint}
    for size in ({}, {"input_size": list(model.input_size)}):  # a store of before tells no size
        assert open_model({**here, **size}, "cpu", model) is model
    with pytest.raises(ModelRefused, match="is not anything as this atlas was made with it"):
        open_model({**here, "input_size": [9, 9]}, "cpu", model)


def test_a_bench_keeps_networks_of_different_input_sizes_apart() -> None:
    thread = ModelThread("test", lambda atlas: load(nn.Conv2d(3, 2, 3), input_size=tuple(atlas["input_size"])))
    here = {"model": "m", "fingerprint": "f"}
    sizes = [thread.model({**here, "input_size": [side, 9]}).input_size for side in (8, 9, 8)]
    assert (sizes, len(thread.models.entries)) == ([(8, 9), (9, 9), (8, 9)], 2)
    thread.close()


def test_what_cannot_be_opened_is_said_before_anything_is_loaded(reader: StoreReader, atlas_id: str) -> None:
    here = {"fingerprint": "0" * 16}
    lead = "To look at photos and to render, start the server with: phosphene serve PLACE --model "
    for name, more in {
        "tinynet:make": "tinynet:make, where that network can be imported.",
        "my nets/own.keras": "'my nets/own.keras', where that file is.",
        "Sequential": "MODEL, where MODEL is the network of this atlas.",
        "timm/hf-hub:somebody/else": "MODEL, where MODEL is the network of this atlas.",
    }.items():
        assert refusal({**here, "model": name}, None) == lead + more
        assert refusal({**here, "model": name}, Identity("0" * 16, (9, 9))) is None
        mismatch = f"The network that this server was started with is not {name} as this atlas was made with it. "
        assert refusal({**here, "model": name}, Identity("1" * 16, (9, 9))) == mismatch + lead + more
        assert (
            refusal({**here, "model": name, "input_size": [9, 8]}, Identity("0" * 16, (9, 9))) == mismatch + lead + more
        )
    assert refusal({**here, "model": "builtin/vgg99"}, None) is None  # which is found out when it is loaded
    for options, words in (
        ({"weights": "none", "input_size": [64, 64]}, "--weights none --input-size 64x64."),
        ({"weights": "my.pt", "std": [0.5]}, "--weights my.pt --std 0.5, where that file is."),
    ):
        reason = refusal({**here, "model": "torchvision/vgg11", "options": options}, None)
        assert reason == f"{lead}torchvision/vgg11 {words}"
    for model, refused in ((tiny_model(), False), (None, True)):
        queue = RenderQueue(reader, model=model)
        assert (queue.refusal(reader.atlas(atlas_id)) is not None) == refused
        queue.close()


def test_a_second_copy_is_the_same_network_on_its_own() -> None:
    model = tiny_model()
    model.layers()
    copied = independent_copy(model)
    assert copied is not None
    assert copied.fingerprint == model.fingerprint
    assert not {id(module) for module in copied.modules.values()} & {id(module) for module in model.module.modules()}
    assert [layer.path for layer in copied.layers()] == [layer.path for layer in model.layers()]


class Unique(nn.Conv2d):
    def __deepcopy__(self, memo: object) -> Unique:
        raise RuntimeError("there is only one of me")


def test_a_network_that_cannot_be_copied_is_used_by_one_thread_alone(reader: StoreReader) -> None:
    model = load(nn.Sequential(Unique(3, 4, 3)), input_size=8)
    assert independent_copy(model) is None
    queue = RenderQueue(reader, model=model)
    assert queue.renders is queue.photos
    queue.close()


def test_a_thread_keeps_the_networks_used_last() -> None:
    made: list[str] = []

    def open_model(atlas: Any) -> Model:
        made.append(atlas["model"])
        return tiny_model()

    thread = ModelThread("test", open_model)
    for name in "abcaded":
        thread.model({"model": name, "fingerprint": ""})
    thread.close()
    assert MAX_MODELS == 3
    assert made == ["a", "b", "c", "d", "e"]
    thread.model({"model": "b", "fingerprint": ""})  # which gave way to d
    assert made[-1] == "b"
