"""How often to save: often enough that failures cost little, seldom enough that saves do (Young 1974, Daly 2006)."""

import math

from llama_jax.errors import InputError
from llama_jax.models.config import LlamaConfig


def state_bytes(config: LlamaConfig, moments: int = 2) -> int:
    """Of a training checkpoint: float32 weights, and as many moments of each as the optimiser keeps (AdamW: 2)."""
    return 4 * (1 + moments) * config.num_params


def best_interval(save_seconds: float, failure_seconds: float) -> float:
    """Seconds of training between saves that lose least: Daly's refinement of Young's sqrt(2 x save x failure).

    Daly, 'A higher order estimate of the optimum checkpoint interval for restart dumps' (FGCS 22:3, 2006), equation 37.

    Args:
      save_seconds: that a save holds training up.
      failure_seconds: mean time between failures of the whole job.

    Raises:
      InputError: a time is not positive.
    """
    for name, seconds in (('save_seconds', save_seconds), ('failure_seconds', failure_seconds)):
        if not 0 < seconds < math.inf:
            raise InputError(f'{name} is {seconds}; it must be more than 0')
    ratio = save_seconds / (2 * failure_seconds)
    if ratio >= 1:
        return failure_seconds
    young = math.sqrt(2 * save_seconds * failure_seconds)
    return young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_seconds


def training_share(
    interval_seconds: float, save_seconds: float, failure_seconds: float, restart_seconds: float
) -> float:
    """Share of the time that trains, where failures come at random: saves, lost steps and restarts are the rest.

    Args:
      interval_seconds: of training between saves.
      save_seconds: see `best_interval`.
      failure_seconds: see `best_interval`.
      restart_seconds: from a failure until training goes on.
    """
    try:
        whole = math.expm1((interval_seconds + save_seconds) / failure_seconds)
        return interval_seconds / (failure_seconds * math.exp(restart_seconds / failure_seconds) * whole)
    except OverflowError:  # hardly an interval ends before a failure
        return 0.0
