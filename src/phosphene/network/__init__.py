"""The network: loading it, listing its layers, and reading what they compute."""
