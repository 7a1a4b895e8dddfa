"""Measuring a model: perplexity, and beside it what the simplest models reach."""
