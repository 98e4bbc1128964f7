"""The callback for Transformers, under the path that users import it by."""

from phosphene.training.callbacks.transformers import TransformersRecorder

__all__ = ["TransformersRecorder"]
