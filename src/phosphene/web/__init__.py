"""The page: a store, a training run and a photo, in a browser. Needs the extra `web`."""
