"""The photos that excite each filter most."""
