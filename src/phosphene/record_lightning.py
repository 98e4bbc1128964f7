"""The callback for Lightning, under the path that users import it by."""

from phosphene.training.callbacks.lightning import LightningRecorder

__all__ = ["LightningRecorder"]
