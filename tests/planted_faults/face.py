"""Of the face for notebooks."""

from tests.planted_faults.fault import Fault, faults_in

# fmt: off
FAULTS: tuple[Fault, ...] = (
    *faults_in('llama_jax/models/inspect.py',
        ('inspection: layers in their own order', 'models/inspect_test.py::test_layers_and_kinds_are_chosen',
         'for layer in layers]) for kind', 'for layer in sorted(layers)]) for kind'),
        ('inspection: an edit is shown and not gone on with',
         'models/inspect_test.py::test_ablating_a_head_is_zeroing_its_rows_of_o[heads]',
         'value = edited.astype(value.dtype)', 'found[kind, layer] = edited'),
        ('log-probabilities: across documents', 'models/inspect_test.py::test_log_probabilities_are_those_of_scoring',
         'return jnp.where(follows, found, 0.0)', 'return found')),
    *faults_in('llama_jax/train/trainer.py',
        ('trainer: the weights that it was given are gone', 'face_test.py::test_what_the_caller_holds_stays[None]',
         'if donate else ():', 'if True else ():')),
    *faults_in('llama_jax/convert/memory.py',
        ('save: one device has all there is',
         'face_test.py::test_a_block_is_put_together_out_of_what_devices_hold', 'if both == wanted:', 'if both:')),
    *faults_in('llama_jax/inference/prompts.py',
        ('prompts: a string is its letters', 'face_test.py::test_a_string_is_one_prompt',
         '[prompts] if isinstance(prompts, str) else prompts', 'prompts')),
)
