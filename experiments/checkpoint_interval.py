"""How often to save on many machines, and whether a save fits into the time that a platform gives before it stops one.

    python -m experiments.checkpoint_interval --model=llama2_70b --bandwidth=32 --hours_between_failures=24

Prints one line: every how many minutes (with --step_seconds: steps), and how much of the time then trains. With --grace
another: what the largest model is whose checkpoint is written in these seconds.
"""

from absl import flags

from experiments import launch
from llama_jax.checkpoint.interval import best_interval, state_bytes, training_share
from llama_jax.errors import InputError
from llama_jax.models.presets import PRESETS

_MODEL = flags.DEFINE_string('model', None, 'preset: its weights and two moments are saved', required=True)
_BANDWIDTH = flags.DEFINE_float('bandwidth', None, 'GB/s that all hosts together write', required=True)
_HOURS = flags.DEFINE_float(
    'hours_between_failures', None, 'mean time between failures of the whole job', required=True
)
_STEP_SECONDS = flags.DEFINE_float('step_seconds', 0.0, 'of one step; 0: not known')
_SAVE_SECONDS = flags.DEFINE_float(
    'save_seconds', 0.0, 'that a save holds training up; 0: until it is written'
)
_RESTART_SECONDS = flags.DEFINE_float('restart_seconds', 300.0, 'from a failure until training goes on')
_GRACE = flags.DEFINE_float('grace', 0.0, 'seconds from the signal to the end; 0: not asked')


def main() -> None:
    """Prints the lines."""
    with launch.flags_named('--model'):
        size = state_bytes(PRESETS[_MODEL.value])
    for flag in (_BANDWIDTH, _HOURS):
        if not flag.value > 0:
            raise InputError(f'--{flag.name}={flag.value}: it must be more than 0')
    for flag in (_STEP_SECONDS, _SAVE_SECONDS, _RESTART_SECONDS, _GRACE):
        if not flag.value >= 0:
            raise InputError(f'--{flag.name}={flag.value}: it must be 0 or more')
    written = size / (_BANDWIDTH.value * 1e9)
    save, failure, step = _SAVE_SECONDS.value or written, _HOURS.value * 3600, _STEP_SECONDS.value
    best = best_interval(save, failure)
    often = f'every {best / 60:.1f} minutes'
    if step:
        steps = max(1, round(best / step))
        often, best = f'--config.checkpoint.every={steps} ({steps * step / 60:.1f} minutes)', steps * step
    share = training_share(best, save, failure, _RESTART_SECONDS.value)
    print(f'{_MODEL.value}: {size / 1e9:,.1f} GB in {written:.1f} s; {often}; {share:.1%} of the time trains')
    if grace := _GRACE.value:
        print(what_fits(grace - step, grace, _BANDWIDTH.value))


def what_fits(seconds: float, grace: float, bandwidth: float) -> str:
    """The largest preset that is saved in `seconds`: the grace, less the step that is ended first."""
    sizes = {name: state_bytes(config) for name, config in PRESETS.items()}
    fitting = {name: size for name, size in sizes.items() if size <= seconds * bandwidth * 1e9}
    start = f'{grace:g} s at {bandwidth:g} GB/s'
    if not fitting:
        return f'{start}: no model is saved in it, so what was trained since the last save is trained again'
    largest = max(fitting, key=lambda name: fitting[name])
    return f'{start}: the largest that is saved in it is {largest}, {fitting[largest] / 1e9:,.1f} GB'


if __name__ == '__main__':
    launch.run(main)
