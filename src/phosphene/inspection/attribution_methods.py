"""Class activation maps: pure functions of what a layer computed and of the gradient that a class score has there.

Those of `CAMS` take a layer's activations and gradients (b, c, h, w) and return raw maps (b, h, w): signed, before any
ReLU, and summed over channels (Selvaraju's equation 2; R4.3 averages, which differs by the factor c). A ReLU inside a
definition stays. ReLU and scaling of the result are for the eye alone and happen in `Heatmap`.

Those of `INPUT_METHODS` take a function from images to the gradients of their class scores, and the images; their maps
are as large as the images. Guided backpropagation is not among them: its pictures stay the same when the network's
weights are randomised, so they show edges of the photo, not the network (Adebayo et al. 2018, arXiv:1810.03292).
"""

from collections.abc import Callable

import torch
from torch import Tensor

Cam = Callable[[Tensor, Tensor], Tensor]
InputGradient = Callable[[Tensor], Tensor]
SAMPLES, STEPS = 24, 32  # of `smoothgrad`, of `integrated_gradients`


def weighted(acts: Tensor, weights: Tensor) -> Tensor:
    """Return the channels (b, c, h, w), each times its weight (b, c), summed: (b, h, w)."""
    return torch.einsum("bchw,bc->bhw", acts, weights)


def safe_divide(above: Tensor, below: Tensor) -> Tensor:
    """Return above / below, and 0 where `below` is 0."""
    is_zero = below == 0
    return torch.where(is_zero, 0, above / below.masked_fill(is_zero, 1))


def gradcam(acts: Tensor, grads: Tensor) -> Tensor:
    """Return each channel times the mean of its gradient (Selvaraju 2017, arXiv:1610.02391, equations 1 and 2)."""
    return weighted(acts, grads.mean((2, 3)))


def gradcam_plus_plus(acts: Tensor, grads: Tensor) -> Tensor:
    """Return each channel times a weighted sum of its positive gradients (Chattopadhay 2018, arXiv:1710.11063).

    Equation 19 with the exponential of the class score: alpha = g² / (2 g² + g³ · sum(A)), which is
    1 / (2 + g · sum(A)) where there is a gradient; the exponential itself only scales the map and is left out. It is
    made for activations that are not negative; before a ReLU its denominator may come near 0.
    """
    sums = acts.sum((2, 3), keepdim=True)
    positive = grads.relu()
    return weighted(acts, safe_divide(positive, 2 + positive * sums).sum((2, 3)))


def hirescam(acts: Tensor, grads: Tensor) -> Tensor:
    """Return each activation times its own gradient (Draelos 2020, arXiv:2011.08891)."""
    return (acts * grads).sum(1)


def layercam(acts: Tensor, grads: Tensor) -> Tensor:
    """Return each activation times its own gradient where that is positive (Jiang 2021, IEEE TIP 30, equation 6)."""
    return (acts * grads.relu()).sum(1)


def xgradcam(acts: Tensor, grads: Tensor) -> Tensor:
    """Return each channel times the mean of its gradient weighted by its activations (Fu 2020, arXiv:2008.02312).

    A channel whose activations sum to 0 has no weight. Before a ReLU that sum may come near 0 by cancellation.
    """
    return weighted(acts, safe_divide((acts * grads).sum((2, 3)), acts.sum((2, 3))))


def eigencam(acts: Tensor, grads: Tensor) -> Tensor:
    """Return the activations' projection on their first principal component (Muhammad 2020, arXiv:2008.00299).

    Not centred, as in the paper. A principal component has no sign of its own: here it agrees with the activations,
    in that the map and the activations' sum over channels have a product of at least 0. The gradients are NOT used:
    the map is the same for every class, and for a network whose classifier is randomised. It shows what the layer
    responds to most, and explains no decision.
    """
    flat = acts.flatten(2)
    _, strengths, patterns = torch.linalg.svd(flat, full_matrices=False)
    maps = strengths[:, :1] * patterns[:, 0]
    agrees = (maps * flat.sum(1)).sum(1, keepdim=True) >= 0
    return torch.where(agrees, maps, -maps).reshape(len(acts), *acts.shape[2:])


CAMS: dict[str, Cam] = {
    "gradcam": gradcam,
    "gradcam++": gradcam_plus_plus,
    "hirescam": hirescam,
    "layercam": layercam,
    "xgradcam": xgradcam,
    "eigencam": eigencam,
}
# Where a map says less about the class than it seems; measured on EfficientNet-lite0 with the classifier's weights
# shuffled (Adebayo 2018), as the rank correlation of a photo's map before and after. All others: below 0.1.
CAUTIONS = {
    "gradcam++": "leaves out what speaks against a class, and hardly changes (0.97) when the classifier is randomised",
    "layercam": "leaves out what speaks against a class, and hardly changes (0.96) when the classifier is randomised",
    "eigencam": "looks at no class: it is the same for every class, and when the classifier is randomised",
}
CLASS_FREE = ("eigencam",)


def gradient(input_gradient: InputGradient, images: Tensor) -> Tensor:
    """Return the gradient's sum over channels (after Simonyan 2013, arXiv:1312.6034): signed; its size is shown."""
    return input_gradient(images).sum(1)


def smoothgrad(input_gradient: InputGradient, images: Tensor, samples: int = SAMPLES, noise: float = 0.15) -> Tensor:
    """Return the gradient's sum over channels, its mean over noisy copies (Smilkov 2017, arXiv:1706.03825).

    Signed; its size is shown. (The mean of ABSOLUTE gradients would show the photo's edges: with the classifier's
    weights shuffled it keeps a rank correlation of 0.84.) The noise is normal, its deviation `noise` times the range
    of each image, from a generator of its own and the same for every image, so that a map does not depend on which
    others are in the batch.
    """
    generator = torch.Generator().manual_seed(0)
    span = images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True)
    total = torch.zeros_like(images)
    for _ in range(samples):
        draw = torch.randn(images.shape[1:], generator=generator, dtype=torch.float64).to(images)
        total += input_gradient(images + noise * span * draw)
    return (total / samples).sum(1)


def integrated_gradients(input_gradient: InputGradient, images: Tensor, steps: int = STEPS) -> Tensor:
    """Return the image times its gradient, the mean along the way from black (Sundararajan 2017, arXiv:1703.01365).

    Signed, summed over channels: the map's sum tends to the class score of the image minus that of black. Black parts
    of an image can have no share in it. The mean is taken at the middles of `steps` equal stretches.
    """
    total = torch.zeros_like(images)
    for step in range(steps):
        total += input_gradient(images * ((step + 0.5) / steps))
    return (images * total / steps).sum(1)


INPUT_METHODS: dict[str, Callable[[InputGradient, Tensor], Tensor]] = {
    "gradient": gradient,
    "smoothgrad": smoothgrad,
    "integrated-gradients": integrated_gradients,
}
PASSES = {"smoothgrad": SAMPLES, "integrated-gradients": STEPS}  # through the network and back; else one
SHOWN_BY_SIZE = ("gradient", "smoothgrad")  # whether a pixel should be lighter or darker is no evidence
