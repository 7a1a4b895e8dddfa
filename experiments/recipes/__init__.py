"""Several commands one after the other, and what small ones of them read."""
