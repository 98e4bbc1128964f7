"""The callback for Keras, under the path that users import it by."""

from phosphene.training.callbacks.keras import KerasRecorder

__all__ = ["KerasRecorder"]
