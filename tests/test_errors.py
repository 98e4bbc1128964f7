"""The error tree: each error is also the builtin that fits it, and prints as the sentence it was given."""

from __future__ import annotations

import inspect
import json.decoder
import pickle
import sys

import pytest

from phosphene import errors

BUILTINS = {
    errors.InvalidRequest: ValueError,
    errors.ModelNotFound: LookupError,
    errors.ModelRefused: ValueError,
    errors.LayerNotFound: KeyError,
    errors.LayerRefused: ValueError,
    errors.ChannelNotFound: IndexError,
    errors.RecipeNotFound: KeyError,
    errors.SizeRefused: ValueError,
    errors.WeightsRefused: ValueError,
    errors.PhotoRefused: ValueError,
    errors.OutputRefused: OSError,
    errors.ExtraMissing: ImportError,
    errors.StoreRefused: ValueError,
    errors.EntryNotFound: LookupError,
    errors.OutOfMemory: MemoryError,
    errors.Unfinished: RuntimeError,
    errors.Interrupted: KeyboardInterrupt,
}
SENTENCE = "there is no 'x'; the nearest are: y (1), \"z\""


def test_every_error_of_the_tree_is_listed_here() -> None:
    classes = (member for _, member in inspect.getmembers(errors, inspect.isclass))
    assert {kind for kind in classes if issubclass(kind, errors.PhospheneError)} == {*BUILTINS, errors.PhospheneError}


@pytest.mark.parametrize("error", BUILTINS)
def test_an_error_is_its_builtin_and_prints_as_its_sentence(error: type[errors.PhospheneError]) -> None:
    with pytest.raises(BUILTINS[error]) as caught:
        raise error(SENTENCE)
    assert isinstance(caught.value, errors.PhospheneError)
    assert str(caught.value) == SENTENCE


@pytest.mark.parametrize("error", BUILTINS)
def test_an_error_survives_the_way_between_processes(error: type[errors.PhospheneError]) -> None:
    copy = pickle.loads(pickle.dumps(error(SENTENCE)))
    assert type(copy) is error
    assert str(copy) == SENTENCE


def test_an_interruption_carries_what_was_finished() -> None:
    assert errors.Interrupted(SENTENCE).finished is None
    error = pickle.loads(pickle.dumps(errors.Interrupted(SENTENCE, [1, 2])))
    assert error.finished == [1, 2]


def test_an_error_without_a_sentence_prints_its_name() -> None:
    assert str(errors.LayerNotFound()) == "LayerNotFound"


def test_the_nearest_names_come_first_and_any_where_none_is_alike() -> None:
    names = ["block1_conv1", "block3_conv1", "block3_conv2", "fc", "pool"]
    assert errors.nearest("block3_conv9", names, 2) in ("block3_conv2, block3_conv1", "block3_conv1, block3_conv2")
    assert errors.nearest("zzzzzz", names, 3) == "block1_conv1, block3_conv1, block3_conv2"
    assert errors.nearest("x", iter(())) == ""


def test_the_first_line_of_an_error() -> None:
    assert errors.first_line(ValueError("\n the size.\nsecond line.")) == "the size"
    assert errors.first_line(MemoryError()) == "MemoryError"


def test_an_optional_package_is_imported_or_its_extra_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert errors.require_extra("json.decoder", "ray") is json.decoder
    advice = "install it with: pip install 'phosphene[ray]'"
    with pytest.raises(errors.ExtraMissing) as caught:
        errors.require_extra("no_such_package.part", "ray")
    assert str(caught.value) == f"no_such_package is not installed; {advice}"
    monkeypatch.setitem(sys.modules, "json.decoder", None)
    with pytest.raises(errors.ExtraMissing) as caught:
        errors.require_extra("json.decoder", "ray")
    assert str(caught.value).startswith("json cannot be imported (import of json.decoder halted")
    assert str(caught.value).endswith(f"; {advice}")
