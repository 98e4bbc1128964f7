"""Rendering: the picture that a filter responds to."""
