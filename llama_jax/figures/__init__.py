"""Figures for a notebook: of a model, of a run, of what was measured; none touches what others have drawn.

Each returns a `matplotlib.figure.Figure` that a cell shows as it is, with a title, and units at its axes.
"""

from llama_jax.figures.chart import Chart as Chart
from llama_jax.figures.chart import Page as Page
from llama_jax.figures.chart import curves as curves
from llama_jax.figures.chart import heat_map as heat_map
from llama_jax.figures.devices import layouts as layouts
from llama_jax.figures.devices import memory_bars as memory_bars
from llama_jax.figures.devices import rooflines as rooflines
from llama_jax.figures.model import attention_maps as attention_maps
from llama_jax.figures.model import logit_lens as logit_lens
from llama_jax.figures.model import next_tokens as next_tokens
from llama_jax.figures.model import rope_wavelengths as rope_wavelengths
from llama_jax.figures.model import tokens_in_colours as tokens_in_colours
from llama_jax.figures.scores import bars as bars
from llama_jax.figures.scores import calibration as calibration
