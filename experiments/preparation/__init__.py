"""Prepared rows as people read them."""
