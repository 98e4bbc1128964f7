"""The fast engine: less work for the same pictures."""
