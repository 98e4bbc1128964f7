"""Where an atlas' jobs run: on this machine, or on a Ray cluster."""
