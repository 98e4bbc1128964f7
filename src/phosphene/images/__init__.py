"""Pictures as files and tensors: reading photos, and turning tensors into pictures."""
