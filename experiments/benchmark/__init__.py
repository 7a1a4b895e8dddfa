"""Benchmarks of speed, a file a suite: `python -m experiments.benchmark --suite=NAME`."""
