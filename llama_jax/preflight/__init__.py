"""Knowing before a launch: whether a step fits on a TPU topology, what it communicates, how fast it can be at most.

`hlo` reads a compiled program, `costs` counts what it does, `chips` and `roofline` turn that into seconds, `compile`
compiles for chips that are not there, `decode` and `report` say what for and what came of it, `advice` finds what fits.
"""

from llama_jax.preflight.process import Report as Report
from llama_jax.preflight.process import run as run
