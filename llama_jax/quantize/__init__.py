"""Weights in integers: which, of params in memory, and of files block by block."""
