"""What the page computes while one looks: photos and renders."""
