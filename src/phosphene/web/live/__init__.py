"""What the page computes while a visitor waits: explanations of photos, and renders."""
