"""The page: stores, training runs and photos in a browser. Its server needs the extra `web`."""
