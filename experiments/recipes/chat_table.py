"""What became of a model stage by stage: one table and its plot, of the files that `llama2_chat.sh` has made.

    python -m experiments.recipes.chat_table --folder=DIR --data=FOLDER --stages='sft=held-out loss,v1=R_c,v2=R_c'

Of each stage: loss on held-out answers, and divergence from the first stage, both by its weights; the rewards and
lengths of judged/STAGE.jsonl, the obeying answers of probed/STAGE.jsonl, the scores of exams/STAGE/results.json. R_c is
what both judges say together. A second table sets each stage beside the one that it started from, by its own judge.
"""

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath

from experiments import launch
from experiments.run.settings import partitioner_of_flags
from experiments.run.trained_format import chat_format_of
from llama_jax import pretrained
from llama_jax.data.messages import prompt_messages
from llama_jax.data.preferences import encode_answer
from llama_jax.data.record_kinds import Conversation, Prompted
from llama_jax.data.records import read_records
from llama_jax.errors import InputError
from llama_jax.inference.scoring import Pair, score
from llama_jax.json_file import parse_json, read_bytes
from llama_jax.models.llama import LlamaForCausalLM, compute_dtype
from llama_jax.rl.rewards import combine_scores
from llama_jax.storage import write_atomically
from llama_jax.tokenizer.chat_format import FORMATS, ChatFormat, Message
from llama_jax.tokenizer.protocol import required

_FOLDER = launch.define_path(
    'folder', None, 'of the stages; table.md, .json and .png go there', required=True
)
_STAGES = flags.DEFINE_list(
    'stages', None, 'WORKDIR=COLUMN, its own judge, by commas; the first is the reference', required=True
)
_DATA = launch.define_path(
    'data', None, 'with held_out.jsonl, as sft reads it, and judged.jsonl, the prompts', required=True
)
_CHAT_FORMAT = flags.DEFINE_enum(
    'chat_format', '', ['', *FORMATS], "how a conversation is spelled; '': as in training"
)
_MESH = flags.DEFINE_list(
    'mesh', ['fsdp=-1'], 'sizes of the axes data, fsdp, context, tensor; -1: the others'
)

Row = dict[str, float]


def main() -> None:
    """Reads what there is of each stage, scores with its weights, writes."""
    folder, partitioner = epath.Path(_FOLDER.value), partitioner_of_flags(_MESH.value, '')
    data = epath.Path(_DATA.value)
    records = list(read_records([str(data / 'held_out.jsonl')], kind=Conversation))
    asked = list(read_records([str(data / 'judged.jsonl')], kind=Prompted))
    judges = dict(_judged_by(text) for text in _STAGES.value)
    first, *_ = stages = list(judges)
    rows = {stage: row_of(folder, stage, asked) for stage in stages}
    scores: dict[str, dict[str, np.ndarray]] = {}
    opened = pretrained.open(str(folder / first))
    chat_format = chat_format_of(opened, required(opened.tokenizer), _CHAT_FORMAT.value)
    held_out = list(answers_of(records, chat_format))

    def measure(checkpoint: str, *of_pairs: Sequence[Pair]) -> Iterator[np.ndarray]:
        opened = pretrained.open(checkpoint)
        model = LlamaForCausalLM(opened.config, dtype=compute_dtype(), partitioner=partitioner)
        _, params, _ = pretrained.load(opened, partitioner=partitioner, dtype=jnp.dtype(compute_dtype()))
        with jax.set_mesh(partitioner.mesh):
            for pairs in of_pairs:
                yield _log_probabilities(model, params, pairs)

    def loss(of_answers: np.ndarray) -> float:
        return float(-of_answers.sum() / sum(len(answer) for _, answer in held_out))

    for stage in stages:
        others = stages if stage == first else [stage]
        own = [list(drawn(folder, other, chat_format)) for other in others]
        of_held_out, *found = measure(str(folder / stage), held_out, *own)
        rows[stage]['held-out loss'] = loss(of_held_out)
        scores[stage] = dict(zip(others, found, strict=True))
    for stage in stages:
        rows[stage]['KL'] = float(np.mean(scores[stage][stage] - scores[first][stage]))
    base = origin_of(folder, first)
    (of_base,) = measure(base, held_out)
    steps = steps_of(folder, rows | {epath.Path(base).name: {'held-out loss': loss(of_base)}}, judges)
    write_atomically(folder / 'table.json', json.dumps({'stages': rows, 'steps': steps}, indent=2) + '\n')
    plot(folder / 'table.png', rows)
    text = f'{to_table(rows)}\n{steps_table(steps)}\n![each figure over the stages](table.png)\n'
    write_atomically(folder / 'table.md', text)


def _judged_by(text: str) -> tuple[str, str]:
    stage, equals, column = text.partition('=')
    if not (stage and equals and column):
        raise InputError(f'--stages has {text!r}; write WORKDIR=COLUMN, as in v1=R_c')
    return stage, column


def origin_of(folder: epath.Path, stage: str) -> str:
    """The checkpoint that it was trained from."""
    file = folder / stage / 'config.json'
    return parse_json(read_bytes(file), str(file))['base_checkpoint']


def answers_of(records: Sequence[Conversation], chat_format: ChatFormat) -> Iterator[Pair]:
    """(what comes before, tokens) of each answer that counts."""
    for record in records:
        for place, (message, counts) in enumerate(zip(record.messages, record.counts, strict=True)):
            if counts:
                prompt, answer = encode_answer(chat_format, record.messages[:place], [message])
                yield tuple(prompt.tolist()), tuple(answer.tokens.tolist())


def drawn(folder: epath.Path, stage: str, chat_format: ChatFormat) -> Iterator[Pair]:
    """(prompt, tokens) of all answers that a stage was judged by, but those without a word."""
    for record in read_records([str(folder / 'judged' / f'{stage}.jsonl')], kind=Prompted):
        for one in record.fields.get('candidates', []):
            if one['completion'].strip():
                prompt, answer = encode_answer(
                    chat_format, prompt_messages({'prompt': record.fields['prompt']}),
                    [Message('assistant', one['completion'], is_cut=not one['stopped'])],
                )  # fmt: skip
                yield tuple(prompt.tolist()), tuple(answer.tokens.tolist())


def _log_probabilities(model: LlamaForCausalLM, params: Any, pairs: Sequence[Pair]) -> np.ndarray:
    """Nats of each answer."""
    found = np.zeros(len(pairs))
    for index, one in score(model, params, pairs):
        found[index] = one.log_probability
    return found


def row_of(folder: epath.Path, stage: str, asked: Sequence[Prompted]) -> Row:
    """What files say of a stage.

    Args:
      folder: of all stages.
      stage: its name.
      asked: the prompts that it was judged by.

    Raises:
      InputError: its answers were not judged.
    """
    judged = folder / 'judged' / f'{stage}.jsonl'
    if not judged.exists():
        raise InputError(f'{judged} is not there; judge the answers of {stage} by rejection_sampling first')
    fields = {one.fields['prompt']: one.fields for one in asked if 'prompt' in one.fields}
    lines = [line for line in _lines(judged) if line.get('candidates')]
    candidates = [one for line in lines for one in line['candidates']]
    row = {
        name.rpartition('/')[2].rpartition(':')[2]: float(
            np.mean([one['scores'][name] for one in candidates])
        )
        for name in candidates[0]['scores']
    }
    if {'helpful', 'safety'} <= row.keys():
        scores = [
            {name.rpartition('/')[2]: score for name, score in one['scores'].items()} for one in candidates
        ]
        helpful, safe = (np.array([one[name] for one in scores]) for name in ('helpful', 'safety'))
        records = [fields.get(line['prompt'], {}) for line in lines for _ in line['candidates']]
        row['R_c'] = float(np.mean(combine_scores(helpful, safe, records)))
    row['length'] = float(np.mean([one['num_tokens'] for one in candidates]))
    row['stopped'] = float(np.mean([one['stopped'] for one in candidates]))
    if (probed := folder / 'probed' / f'{stage}.jsonl').exists():
        lines = _lines(probed)
        for turn in sorted({line['turn'] for line in lines}):
            obeying = [line['score'] >= 0.5 for line in lines if line['turn'] == turn]
            row[f'obeys at {turn}'] = float(np.mean(obeying))
    if (exams := folder / 'exams' / stage / 'results.json').exists():
        for task, metrics in parse_json(read_bytes(exams), str(exams)).items():
            metric = next(iter(metrics))
            row[f'{task.rpartition("/")[2]} {metric}'] = float(metrics[metric])
    return row


def _lines(file: epath.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def to_table(rows: dict[str, Row]) -> str:
    """In Markdown."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [f'| stage | {" | ".join(columns)} |', f'|---|{"---|" * len(columns)}']
    for stage, row in rows.items():
        cells = (f'{row[name]:.3f}' if name in row else '' for name in columns)
        lines.append(f'| {stage} | {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def steps_of(folder: epath.Path, rows: dict[str, Row], judges: dict[str, str]) -> list[dict[str, Any]]:
    """Each stage's own measure before it and behind it, judges and distilled answers first.

    Args:
      folder: of all stages.
      rows: of each, and of what the first started from.
      judges: the column of each.
    """
    steps: list[dict[str, Any]] = []

    def add(stage: str, judge: str, before: float, behind: float) -> None:
        better = behind < before if 'loss' in judge else behind > before
        steps.append({'stage': stage, 'judge': judge, 'before': before, 'behind': behind, 'better': better})

    for stage in ('helpful', 'safety'):
        if (file := folder / stage / 'report.json').exists():
            report = parse_json(read_bytes(file), str(file))
            if 'accuracy' in report:
                add(stage, 'held-out pairs in order', 0.5, report['accuracy'])
    if (file := folder / 'distilled.jsonl').exists() and (lines := _lines(file)):
        of_both = (float(np.mean([line[key] for line in lines])) for key in ('score_original', 'score'))
        add('distilled', 'safety of the answers', *of_both)
    for stage, judge in judges.items():
        before = rows.get(epath.Path(origin_of(folder, stage)).name, {})
        if judge not in rows[stage] or judge not in before:
            raise InputError(
                f'{stage} and what it started from have no {judge}; they have {", ".join(rows[stage])}'
            )
        add(stage, judge, before[judge], rows[stage][judge])
    return steps


def steps_table(steps: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ['| stage | its own judge | before | behind | better |', '|---|---|---|---|---|']
    for one in steps:
        figures = f'{one["before"]:.3f} | {one["behind"]:.3f} | {"yes" if one["better"] else "no"}'
        lines.append(f'| {one["stage"]} | {one["judge"]} | {figures} |')
    return '\n'.join(lines) + '\n'


def plot(path: epath.Path, rows: dict[str, Row]) -> None:
    """Each figure over the stages."""
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    figure = Figure(figsize=(12, 3 * -(-len(columns) // 4)), layout='constrained')
    axes = figure.subplots(-(-len(columns) // 4), 4, squeeze=False).ravel()
    for place, name in zip(axes, columns, strict=False):
        place.plot(list(rows), [row.get(name, np.nan) for row in rows.values()], marker='o')
        place.set_title(name)
    for place in axes[len(columns) :]:
        place.axis('off')
    data = io.BytesIO()
    figure.savefig(data, format='png', dpi=80)
    write_atomically(path, data.getvalue())


if __name__ == '__main__':
    launch.run(main)
