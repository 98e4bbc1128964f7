"""The contexts of the templates, as plain values."""
