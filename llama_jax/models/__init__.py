"""The architecture: the only place that imports flax.linen."""
