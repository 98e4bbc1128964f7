"""The page: stores, training runs and photos in a browser. Needs the extra `web`."""
