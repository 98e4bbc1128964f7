"""Phosphene shows what a convolutional network has learned. The public names are in `__init__.pyi`.

import phosphene as ph

model = ph.load("builtin/vgg19")
ph.render(model, ph.channel("block3_conv1", range(64))).grid(columns=8).save("filters.png")
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
