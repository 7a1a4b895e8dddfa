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

and, of a GPU or TPU at full widths (`--finetune_model=llama2_7b --finetune_layers=N --finetune_dtype=bfloat16`),

    qlora      packed conversations: all weights by Adafactor, adapters beside a base in the computation's type, and
               beside one in nf4
    dpo_lora   preferences of adapters: pairs a second, and what the device held at most, where it is the only part
    gradients  of adapters beside nf4, and beside the weights that it stands for: how far apart
"""

import functools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from experiments import launch
from experiments.benchmark import finetune_device as on_device
from experiments.benchmark import finetune_peers as peers
from experiments.benchmark import finetune_steps as steps
from experiments.benchmark.convert import make_checkpoint
from experiments.benchmark.finetune_steps import RANK, Size, Training
from experiments.benchmark.peak import run_measured
from experiments.benchmark.turns import Contender, Turn, compare, has_peer, median, of, ratio
from experiments.run.config_file import split_list
from experiments.run.settings import find_preset
from llama_jax.errors import InputError

_MODEL = flags.DEFINE_string('finetune_model', 'stories_15m', 'a preset')
_LAYERS = flags.DEFINE_integer('finetune_layers', 0, "of the model; 0: the preset's", lower_bound=0)
_DTYPE = flags.DEFINE_enum(
    'finetune_dtype', 'float32', ['float32', 'bfloat16'], 'of our computation; peers have float32'
)
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


def main() -> Iterator[dict[str, Any]]:
    """The figures, more with each part."""
    chosen = split_list(_PARTS.value)
    if unknown := [part for part in chosen if part not in (*PARTS, 'memory')]:
        raise InputError(f'--finetune_parts has {unknown[0]!r}; there are {", ".join((*PARTS, "memory"))}')
    preset = find_preset(_MODEL.value)
    sizes: dict[str, Any] = dict(
        preset=_MODEL.value, layers=_LAYERS.value, remat=_REMAT.value, dtype=_DTYPE.value,
        batch_size=_BATCH_SIZE.value, packed=_PACKED.value, steps=_STEPS.value,
    )  # fmt: skip
    size = steps.size_of(**sizes)
    figures: dict[str, Any] = {
        'model': _MODEL.value, 'layers': size.config.num_layers, 'dtype': size.dtype, 'remat': size.remat,
        'batch_size': size.batch_size, 'packed': size.packed, 'rank': RANK,
    }  # fmt: skip
    for part in chosen:
        if part == 'memory':
            figures |= measure_memory(sizes, _READ.value, _SCRATCH.value)
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
    if can_compare(size, 'peft'):
        for name, compiled in (('peft_eager', False), ('peft_compiled', True)):
            make = functools.partial(peers.peft_turn, size.config, rows, size.steps, compiled=compiled)
            contenders[name] = Contender(make, tokens, is_peer=True)
    rates = compare('lora', 'tokens/s', contenders, rounds, profile)
    figures = of('lora', rates) | ratio('lora_time_to_full', rates, 'full', 'lora')
    figures |= ratio('lora_sft_to_full', rates, 'sft', 'full')
    theirs = {name: found for name, found in rates.items() if name.startswith('peft')}
    if theirs:
        best = max(theirs, key=lambda name: median(theirs[name]))
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
    if can_compare(size, 'trl'):

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


def can_compare(size: Size, name: str) -> bool:
    """Whether a library of Hugging Face's is installed, and computes as we do; it says where it does not."""
    if not has_peer(name, 'torch', name):
        return False
    if size.dtype != 'float32':
        print(f'{name}: left out, it is measured in float32 alone')
    return size.dtype == 'float32'


# What is measured is the process.
_TRAIN = """
import json, sys
from experiments.benchmark import finetune_steps as steps
steps.train_alone(**json.loads(sys.argv[1]))
"""
_READ_BASE = """
import sys
from experiments.benchmark import finetune_steps as steps
steps.read_base(sys.argv[1])
"""


def measure_memory(sizes: dict[str, Any], read: str, scratch: str) -> dict[str, Any]:
    """What updates hold, peaks of processes that make some, or read a base in nf4, beside the size of what is read."""
    size, peaks, held = steps.size_of(**sizes), {}, {}
    for loss in ('likelihood', 'preferences'):
        rows = steps.rows_of(loss, size.config.vocab_size, size.batch_size, size.packed)
        held[loss] = steps.held_bytes(size.model, Training(loss, rank=RANK), rows)
        _, peaks[loss] = run_measured([sys.executable, '-c', _TRAIN, json.dumps(sizes | {'loss': loss})])
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
    'qlora': on_device.representations, 'dpo_lora': on_device.adapted_preferences, 'gradients': on_device.gradients,
}  # fmt: skip
