"""What adapters, packing, kept references and shared prompts save, beside what Hugging Face's libraries take.

Each part has contenders that take turns, so that a machine whose speed drifts is equally unkind to all; figures are
medians, and ratios are made turn by turn. Where other work runs beside it, those of CPU seconds say more than the
clock's. `--finetune_parts` chooses among

    lora     an update of adapters beside one of all weights, of a row of whole documents, and of PEFT's
    packing  answer tokens a second of packed rows, beside rows padded to the longest of a batch
    dpo      pairs a second with a live reference and a kept one, beside TRL's
    shared   pairs whose prompts are four times as long as their answers: each prompt once, or before each answer
    nf4      an update of adapters beside a base in nf4, and in float32
    memory   what programs and processes hold: preferences beside likelihood; a base quantised while it is read
"""

import dataclasses
import functools
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import flags

from experiments import launch
from experiments.benchmark import finetune_peers as peers
from experiments.benchmark import finetune_steps as steps
from experiments.benchmark.convert import make_checkpoint
from experiments.benchmark.finetune_steps import RANK, Training, Turn
from experiments.benchmark.peak import run_measured
from experiments.benchmark.profile import show_kernels
from experiments.run.config_file import split_list
from experiments.run.settings import find_preset
from llama_jax.errors import InputError, error_line
from llama_jax.models.config import LlamaConfig
from llama_jax.models.llama import LlamaForCausalLM

_MODEL = flags.DEFINE_string('finetune_model', 'stories_15m', 'a preset')
_PARTS = flags.DEFINE_string(
    'finetune_parts', 'lora,packing,dpo,shared,nf4,memory', 'what is measured, in order'
)
_ROUNDS = flags.DEFINE_integer('finetune_rounds', 5, 'turns that each contender takes', lower_bound=1)
_STEPS = flags.DEFINE_integer('finetune_steps', 2, 'updates in a turn', lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer('finetune_batch_size', 8, 'rows in an update', lower_bound=1)
_PACKED = flags.DEFINE_integer(
    'finetune_packed', 1024, 'tokens of a row of examples or pairs', lower_bound=64
)
_REMAT = flags.DEFINE_string('finetune_remat', 'attention', 'see models.llama.REMAT_POLICIES')
_PROFILE = flags.DEFINE_boolean('finetune_profile', False, 'show the kernels of the last contender of ours')
_READ = flags.DEFINE_string(
    'finetune_read', 'llama3_2_1b', 'a preset, whose weights in bfloat16 are quantised'
)
_SCRATCH = launch.define_path('finetune_scratch', '', "folder for its files; '': the system's")


@dataclasses.dataclass(frozen=True)
class Contender:
    """Who takes turns.

    Attributes:
      make: its turn.
      amount: of what is counted in a turn.
      is_peer: it is left out, and said so, where it cannot run.
    """

    make: Callable[[], Turn]
    amount: float
    is_peer: bool = False


@dataclasses.dataclass(frozen=True)
class Rate:
    """What was done in a second: of the clock, and of this process's CPU time."""

    clock: float
    cpu: float


@dataclasses.dataclass(frozen=True)
class Size:
    """What all parts are of."""

    config: LlamaConfig
    remat: str
    batch_size: int
    packed: int
    steps: int

    @property
    def model(self) -> LlamaForCausalLM:
        """As it is trained."""
        return LlamaForCausalLM(self.config, dtype=jnp.float32, remat=self.remat)

    def ours(self, batches: Sequence[Any], amount: float, **training: Any) -> Contender:
        """An update of ours on each batch."""
        return Contender(functools.partial(steps.our_turn, self.model, Training(**training), batches), amount)


def main() -> Iterator[dict[str, Any]]:
    """The figures, more with each part."""
    chosen = split_list(_PARTS.value)
    if unknown := [part for part in chosen if part not in (*PARTS, 'memory')]:
        raise InputError(f'--finetune_parts has {unknown[0]!r}; there are {", ".join((*PARTS, "memory"))}')
    preset = find_preset(_MODEL.value)
    config = dataclasses.replace(preset, max_seq_len=max(preset.max_seq_len, _PACKED.value))
    size = Size(config, _REMAT.value, _BATCH_SIZE.value, _PACKED.value, _STEPS.value)
    figures: dict[str, Any] = {
        'model': _MODEL.value, 'remat': size.remat, 'batch_size': size.batch_size, 'packed': size.packed, 'rank': RANK,
    }  # fmt: skip
    for part in chosen:
        if part == 'memory':
            figures |= measure_memory(_MODEL.value, size, _READ.value, _SCRATCH.value)
        else:
            figures |= PARTS[part](size, preset.max_seq_len, _ROUNDS.value, _PROFILE.value)
        yield figures


def adapters(size: Size, seq_len: int, rounds: int, profile: bool) -> dict[str, Any]:
    """Tokens a second: all weights, adapters, PEFT's."""
    rows = steps.random_rows(size.config.vocab_size, size.batch_size, seq_len)
    examples = steps.draw_examples(16 * size.batch_size, size.config.vocab_size, seq_len + 1)
    tokens = size.steps * size.batch_size * seq_len
    likelihood, answers = (
        [steps.of_rows(rows)] * size.steps,
        steps.packed(examples, seq_len, size.batch_size, 1),
    )
    contenders = {
        'full': size.ours(likelihood, tokens),
        'sft': size.ours(answers * size.steps, tokens),
        'lora': size.ours(likelihood, tokens, rank=RANK),
    }
    if importlib.util.find_spec('torch') and importlib.util.find_spec('peft'):
        for name, compiled in (('peft_eager', False), ('peft_compiled', True)):
            make = functools.partial(peers.peft_turn, size.config, rows, size.steps, compiled=compiled)
            contenders[name] = Contender(make, tokens, is_peer=True)
    rates = compare('lora', 'tokens/s', contenders, rounds, profile)
    figures = of('lora', rates) | ratio('lora_time_to_full', rates, 'full', 'lora')
    figures |= ratio('lora_sft_to_full', rates, 'sft', 'full')
    theirs = {name: found for name, found in rates.items() if name.startswith('peft')}
    if theirs:
        best = max(theirs, key=lambda name: _median(theirs[name]))
        figures |= ratio('lora_ratio_to_peft', rates, 'lora', best)
    return figures


def packing(size: Size, seq_len: int, rounds: int, profile: bool) -> dict[str, Any]:
    """Answer tokens a second."""
    del seq_len
    examples = steps.draw_examples(960, size.config.vocab_size, size.packed + 1)
    rows = steps.packed(examples, size.packed, size.batch_size, size.steps)
    batches, padded_fill = steps.padded(examples, 2 * size.batch_size, size.steps, Training().loss_chunks)
    fill = steps.ExampleRows(examples, size.packed).fill
    print(f'packed rows are {fill:.1%} full, padded ones {padded_fill:.1%}')
    contenders = {
        'padded': size.ours(batches, steps.num_answers(batches)),
        'packed': size.ours(rows, steps.num_answers(rows)),
    }
    rates = compare('packing', 'answer tokens/s', contenders, rounds, profile)
    figures = of('packing', rates) | ratio('packing_ratio', rates, 'packed', 'padded')
    return figures | {'packing_fill': fill, 'packing_padded_fill': padded_fill}


def preferences(size: Size, seq_len: int, rounds: int, profile: bool) -> dict[str, Any]:
    """Pairs a second: a live reference, a kept one, TRL's."""
    del seq_len
    pairs = steps.draw_pairs(2 * size.batch_size, size.config.vocab_size, size.packed)
    rows = [steps.paired(pairs, size.packed)]
    print(f'rows of pairs are {rows[0].segment_ids.astype(bool).mean():.1%} full')
    contenders = {
        'live': size.ours(rows, len(pairs), loss='preferences'),
        'kept': size.ours(rows, len(pairs), loss='preferences', kept=True),
    }
    if importlib.util.find_spec('torch') and importlib.util.find_spec('trl'):

        def theirs() -> Turn:
            turn, fill = peers.trl_turn(size.config, pairs, size.batch_size)
            print(f'batches of TRL are {fill:.1%} full')
            return turn

        contenders['trl'] = Contender(theirs, len(pairs), is_peer=True)
    rates = compare('dpo', 'pairs/s', contenders, rounds, profile)
    figures = of('dpo', rates) | ratio('dpo_kept_to_live', rates, 'kept', 'live')
    return figures | (ratio('dpo_ratio_to_trl', rates, 'live', 'trl') if 'trl' in rates else {})


def shared_prompts(size: Size, seq_len: int, rounds: int, profile: bool) -> dict[str, Any]:
    """Pairs a second, with a live reference."""
    del seq_len
    # Apart three pairs of ten answers' lengths fill a row, shared five of six.
    answer = size.packed // 32
    pairs = list(steps.random_pairs([(4 * answer, answer, answer)] * 15, size.config.vocab_size))
    apart, shared = (
        [steps.paired(pairs, size.packed, share_prompt=is_shared)] for is_shared in (False, True)
    )
    model = size.model.clone(attention_implementation='shared_prefix')
    contenders = {
        'apart': size.ours(apart, len(pairs), loss='preferences'),
        'shared': Contender(
            functools.partial(steps.our_turn, model, Training('preferences'), shared), len(pairs)
        ),
    }
    rates = compare('shared', 'pairs/s', contenders, rounds, profile)
    return of('shared', rates) | ratio('shared_ratio', rates, 'shared', 'apart')


def bases(size: Size, seq_len: int, rounds: int, profile: bool) -> dict[str, Any]:
    """Tokens a second, by what adapters stand beside."""
    rows = steps.of_rows(steps.random_rows(size.config.vocab_size, size.batch_size, seq_len))
    tokens = size.steps * size.batch_size * seq_len
    contenders = {
        dtype: size.ours([rows] * size.steps, tokens, rank=RANK, weights=dtype)
        for dtype in ('float32', 'nf4')
    }
    rates = compare('base', 'tokens/s', contenders, rounds, profile)
    return of('base', rates) | ratio('base_nf4_time_to_float32', rates, 'float32', 'nf4')


# What is measured is the process.
_TRAIN = """
import dataclasses, sys
from experiments.benchmark import finetune_steps as steps
steps.train_alone(*sys.argv[1:4], *map(int, sys.argv[4:]))
"""
_READ_BASE = """
import sys
from experiments.benchmark import finetune_steps as steps
steps.read_base(sys.argv[1])
"""


def measure_memory(preset: str, size: Size, read: str, scratch: str) -> dict[str, Any]:
    """What updates hold, peaks of processes that make some, or read a base in nf4, beside the size of what is read."""
    peaks, held = {}, {}
    for loss in ('likelihood', 'preferences'):
        rows = steps.rows_of(loss, size.config.vocab_size, size.batch_size, size.packed)
        held[loss] = steps.held_bytes(size.model, Training(loss, rank=RANK), rows)
        arguments = (preset, loss, size.remat, size.batch_size, size.packed)
        _, peaks[loss] = run_measured([sys.executable, '-c', _TRAIN, *map(str, arguments)])
        print(
            f'{loss}, adapters: the program holds {held[loss] / 1e6:,.0f} MB, peak memory {peaks[loss] / 1e6:,.0f} MB',
            flush=True,
        )
    figures: dict[str, Any] = {}
    for name, found in (('peak', peaks), ('held', held)):
        figures |= {f'memory_{loss}_{name}_mb': round(number / 1e6) for loss, number in found.items()}
        figures[f'memory_{name}_of_preferences_to_likelihood'] = found['preferences'] / found['likelihood']
    with tempfile.TemporaryDirectory(dir=scratch or None) as folder:
        make_checkpoint(read, Path(folder) / 'meta')
        num_bytes = sum(file.stat().st_size for file in (Path(folder) / 'meta').rglob('*.pth'))
        seconds, peak = run_measured([sys.executable, '-c', _READ_BASE, f'{folder}/meta'])
    print(
        f'{read}, {num_bytes / 1e6:,.0f} MB, read as nf4: {seconds:.0f} s, peak memory {peak / 1e6:,.0f} MB, '
        f'{(peak - 300e6) / num_bytes:.2f} of the checkpoint and 300 MB',
        flush=True,
    )
    return figures | {
        'memory_read': read, 'memory_read_mb': round(num_bytes / 1e6), 'memory_read_seconds': seconds,
        'memory_read_peak_mb': round(peak / 1e6), 'memory_read_share_above_300_mb': (peak - 300e6) / num_bytes,
    }  # fmt: skip


PARTS = {
    'lora': adapters, 'packing': packing, 'dpo': preferences, 'shared': shared_prompts, 'nf4': bases,
}  # fmt: skip


def compare(
    part: str, unit: str, contenders: Mapping[str, Contender], rounds: int, profile: bool = False
) -> dict[str, list[Rate]]:
    """What each does in a second, by turn, in a table; a peer that cannot run here is left out and said so."""
    turns: dict[str, Turn] = {}
    for name, contender in contenders.items():
        start = time.perf_counter()
        try:
            turns[name] = contender.make()
            turns[name]()
            print(f'{name}: first turn after {time.perf_counter() - start:.1f} s', flush=True)
        except Exception as error:  # it must not hide our own figures
            if not contender.is_peer:
                raise
            turns.pop(name, None)
            print(f'{name}: left out, {type(error).__name__}: {error_line(error)}')
    rates: dict[str, list[Rate]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            turn()
            seconds = time.perf_counter() - start, time.process_time() - cpu_start
            rates[name].append(Rate(*(contenders[name].amount / each for each in seconds)))
    print(f'{part:16}{unit:>16}{"min":>10}{"max":>10}{"per CPU second":>16}')
    for name, found in rates.items():
        clock = [rate.clock for rate in found]
        print(
            f'{name:16}{statistics.median(clock):16,.2f}{min(clock):10,.2f}{max(clock):10,.2f}'
            f'{statistics.median(rate.cpu for rate in found):16,.2f}',
            flush=True,
        )
    if profile:
        last = [name for name in turns if not contenders[name].is_peer][-1]
        show_kernels(turns[last], contenders[last].amount / _median(rates[last]))
    return rates


def of(part: str, rates: Mapping[str, Sequence[Rate]]) -> dict[str, float]:
    """The medians as figures."""
    return {f'{part}_{name}_per_second': _median(found) for name, found in rates.items()}


def _median(rates: Sequence[Rate]) -> float:
    return statistics.median(rate.clock for rate in rates)


def ratio(name: str, rates: Mapping[str, Sequence[Rate]], first: str, second: str) -> dict[str, float]:
    """The median of the ratios of turns, their spread, and the median of those of CPU seconds."""
    pairs = list(zip(rates[first], rates[second], strict=True))
    ratios = [a.clock / b.clock for a, b in pairs]
    middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
    cpu = statistics.median(a.cpu / b.cpu for a, b in pairs)
    print(f'{name}: {middle:.2f} ({least:.2f} to {most:.2f}), of CPU seconds {cpu:.2f}\n', flush=True)
    return {name: middle, f'{name}_min': least, f'{name}_max': most, f'{name}_of_cpu': cpu}
