"""What a network makes of one photo: activations, kernels and heat maps."""
