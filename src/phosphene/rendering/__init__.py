"""Rendering: the picture that a filter answers to."""
