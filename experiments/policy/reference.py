"""The reference of a policy: the weights that training starts from, held beside those that are trained.

Kept instead, its log-probabilities stand in reference.npz of the workdir, under a key of all that they depend on.
"""

import hashlib
import io
import json
import logging

import jax
import numpy as np
from etils import epath

from experiments.policy.objective import abstract_reference
from experiments.run.objective import loss_of, reading_model
from experiments.run.preferences import figures_of
from experiments.run.start import first_params
from experiments.training import Plan, Run
from llama_jax import runtime, storage
from llama_jax.data.preference_dataset import PreferenceData
from llama_jax.errors import InputError
from llama_jax.losses.dpo import answer_log_probabilities
from llama_jax.types import Params

REFERENCE_FILE = 'reference.npz'

logger = logging.getLogger('llama_jax.reference')


def frozen_reference(plan: Plan) -> Params:
    """The weights that training starts from, matrices in the type that they are computed with; placed as the policy's.

    Raises:
      InputError: the run starts from a step of another, whose own reference is elsewhere.
    """
    if plan.fork:
        raise InputError(
            '--fork: a reference is the policy that a run started from, which a step within another run is not; start '
            'from it by --checkpoint'
        )
    target = abstract_reference(plan.model, plan.partitioner)
    return first_params(plan.model, plan.base, plan.config.seed, target)


def keep_reference(run: Run, data: PreferenceData, name: str = REFERENCE_FILE) -> None:
    """Gives all rows the log-probabilities of their answers under the policy that training starts from.

    They are computed once, and read from the workdir when the run goes on.
    """
    plan, config = run.plan, run.plan.config
    assert plan.base is not None
    sources = [*data.train_rows, *([data.validation] if data.validation else [])]
    known = {
        'rows': [rows.fingerprint for rows in sources], 'checkpoint': plan.base.fingerprint,
        'model': config.model.dtype, 'mask_format': config.loss.mask_format,
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    file = plan.workdir / name
    found = _read(file, key, len(sources))
    if not found:
        logger.info('log-probabilities under the reference are computed, once: %s', plan.checkpoint)
        read = reading_model(config, plan.model).clone(remat='none')
        step = answer_log_probabilities(read, loss_of(config), num_chunks=config.train.loss_chunks)
        weights = frozen_reference(plan)
        with jax.set_mesh(plan.partitioner.mesh):
            found = [figures_of(plan, run.objective, step, (weights,), rows) for rows in sources]
        if runtime.is_main_process():
            buffer = io.BytesIO()
            np.savez(
                buffer, allow_pickle=False, key=np.array(key), **{str(i): x for i, x in enumerate(found)}
            )
            storage.write_atomically(file, buffer.getvalue())
    for rows, reference in zip(sources, found, strict=True):
        rows.reference = np.nan_to_num(reference).astype(np.float32)


def _read(file: epath.Path, key: str, number: int) -> list[np.ndarray]:
    """What was kept under this key; [] where there is nothing, or something else."""
    if not file.exists():
        return []
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as held:
            return [held[str(i)] for i in range(number)] if str(held['key']) == key else []
    except (ValueError, KeyError, OSError, EOFError) as error:  # damaged: it is made again
        logger.warning('%s is damaged (%s) and made again', file, type(error).__name__)
        return []
