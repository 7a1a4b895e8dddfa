"""State, step, optimiser, loop, metrics."""
