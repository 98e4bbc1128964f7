"""`python -m phosphene` is the same as `phosphene`."""

from phosphene.cli import main

main()
