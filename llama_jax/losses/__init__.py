"""Objectives: (params, frozen, batch, rng) -> sums."""
