"""The Recorder as a callback of Keras, Lightning and Transformers."""
