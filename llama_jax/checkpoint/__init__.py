"""Orbax checkpoints: of training, and of weights alone."""
