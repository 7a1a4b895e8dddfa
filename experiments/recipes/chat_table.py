"""What became of a model stage by stage: one table and its plot, of the files that `llama2_chat.sh` has made.

    python -m experiments.recipes.chat_table --folder=DIR --held_out=FILE --stages=sft,v1,v2

Of each stage: loss on held-out answers, and divergence from the first stage, both by its weights; the rewards and
lengths of judged/STAGE.jsonl, the obeying answers of probed/STAGE.jsonl, the scores of exams/STAGE/results.json.
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
from experiments.config_file import split_list
from experiments.settings import partitioner_of_flags
from llama_jax import pretrained
from llama_jax.data.messages import prompt_messages
from llama_jax.data.preferences import encode_answer
from llama_jax.data.records import Conversation, Prompted, read_records
from llama_jax.inference.scoring import Pair, score
from llama_jax.json_file import parse_json, read_bytes
from llama_jax.models.llama import LlamaForCausalLM, compute_dtype
from llama_jax.storage import write_atomically
from llama_jax.tokenizer.chat_format import FORMATS, ChatFormat, Message, chat_format_for
from llama_jax.tokenizer.protocol import required
from llama_jax.types import InputError

_FOLDER = launch.define_path(
    'folder', None, 'of the stages; table.md, .json and .png go there', required=True
)
_STAGES = flags.DEFINE_list(
    'stages', None, 'workdirs in it, by commas; the first is the reference', required=True
)
_HELD_OUT = launch.define_path('held_out', None, 'conversations, as sft reads them', required=True)
_CHAT_FORMAT = flags.DEFINE_enum(
    'chat_format', '', ['', *FORMATS], "how a conversation is spelled; '': the family's"
)
_MESH = flags.DEFINE_list(
    'mesh', ['fsdp=-1'], 'sizes of the axes data, fsdp, context, tensor; -1: the others'
)

Row = dict[str, float]


def main() -> None:
    """Reads what there is of each stage, scores with its weights, writes."""
    folder, partitioner = epath.Path(_FOLDER.value), partitioner_of_flags(_MESH.value, '')
    records = list(read_records(split_list(_HELD_OUT.value), kind=Conversation))
    first, *_ = stages = _STAGES.value
    scores: dict[str, dict[str, np.ndarray]] = {}
    rows: dict[str, Row] = {}
    for stage in stages:
        rows[stage] = row_of(folder, stage)
    for stage in stages:
        opened = pretrained.open(str(folder / stage))
        model = LlamaForCausalLM(opened.config, dtype=compute_dtype(), partitioner=partitioner)
        chat_format = chat_format_for(required(opened.tokenizer), _CHAT_FORMAT.value)
        _, params, _ = pretrained.load(opened, partitioner=partitioner, dtype=jnp.dtype(compute_dtype()))
        with jax.set_mesh(partitioner.mesh):
            pairs = list(answers_of(records, chat_format))
            by_answer = _log_probabilities(model, params, pairs)
            rows[stage]['held-out loss'] = -by_answer.sum() / sum(len(answer) for _, answer in pairs)
            own = {stage: list(drawn(folder, stage, chat_format))} if stage != first else {
                other: list(drawn(folder, other, chat_format)) for other in stages
            }  # fmt: skip
            scores[stage] = {name: _log_probabilities(model, params, some) for name, some in own.items()}
    for stage in stages:
        rows[stage]['KL'] = float(np.mean(scores[stage][stage] - scores[first][stage]))
    table = to_table(rows)
    write_atomically(folder / 'table.json', json.dumps(rows, indent=2) + '\n')
    plot(folder / 'table.png', rows)
    write_atomically(folder / 'table.md', table)


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
                    [Message('assistant', one['completion'])],
                )  # fmt: skip
                tokens = answer.tokens.tolist()
                tokens = tokens if one['stopped'] else [id for id in tokens if id not in chat_format.stop_ids]
                yield tuple(prompt.tolist()), tuple(tokens)


def _log_probabilities(model: LlamaForCausalLM, params: Any, pairs: Sequence[Pair]) -> np.ndarray:
    """Nats of each answer."""
    found = np.zeros(len(pairs))
    for index, one in score(model, params, pairs):
        found[index] = one.log_probability
    return found


def row_of(folder: epath.Path, stage: str) -> Row:
    """What files say of a stage.

    Raises:
      InputError: its answers were not judged.
    """
    judged = folder / 'judged' / f'{stage}.jsonl'
    if not judged.exists():
        raise InputError(f'{judged} is not there; judge the answers of {stage} by rejection_sampling first')
    candidates = [one for line in _lines(judged) for one in line.get('candidates', [])]
    row = {
        name.rpartition('/')[2].rpartition(':')[2]: float(
            np.mean([one['scores'][name] for one in candidates])
        )
        for name in candidates[0]['scores']
    }
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
