"""What a model answers to held-out prompts, before it is fine-tuned and after."""

import json
import logging
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from experiments.training import Run
from llama_jax import runtime, storage
from llama_jax.data.examples import ExampleRows
from llama_jax.errors import InputError
from llama_jax.inference.generate import generate
from llama_jax.json_file import read_object
from llama_jax.tokenizer.chat_format import ChatFormat, Message
from llama_jax.train.loop import Measurement
from llama_jax.train.state import TrainState

logger = logging.getLogger('llama_jax.held_out_answers')

BASE_FILE = 'base.json'  # what the base answers, found before the first update
_MOST = 32  # prompts

Asked = list[tuple[Sequence[Message], list[int]]]  # messages up to the answer, and their ids


def held_out(run: Run, chat: ChatFormat, rows: ExampleRows | None) -> Asked:
    """Up to 32 prompts that are not trained on and leave room for an answer."""
    config, found = run.plan.config, []
    if not config.eval.sample_tokens or rows is None:
        return []
    for example in rows.examples[:_MOST]:
        record = example.record
        end = max(number for number, count in enumerate(record.counts) if count)
        ids = chat.encode_prompt(record.messages[:end])
        if len(ids) < run.plan.model.config.max_seq_len:
            found.append((record.messages[:end], ids))
    return found


def sample(run: Run, state: TrainState, asked: Asked) -> list[str]:
    """One answer each at temperature 0.8, by the whole weights of a state; the same draws for every state."""
    if not asked:
        return []
    config = run.plan.config
    return generate(
        run.plan.model, run.objective.weights(state), run.plan.tokenizer, [ids for _, ids in asked],
        max_new_tokens=config.eval.sample_tokens, temperature=0.8, top_p=0.95, seed=config.seed,
    )  # fmt: skip


def of_base(run: Run, asked: Asked, measurements: Sequence[Measurement]) -> dict[str, Any]:
    """{'base_loss', 'base_answers'} of the weights that the run began with, found once and kept in its workdir."""
    file = run.plan.workdir / BASE_FILE
    if run.start_step:
        return _kept(file, len(asked)) if runtime.is_main_process() and file.exists() else {}
    found: dict[str, Any] = {}
    with jax.set_mesh(run.plan.partitioner.mesh):
        for measurement in measurements:
            found['base_loss'] = measurement.measure(run.state, 0, lambda: None)['validation_loss']
    found['base_answers'] = sample(run, run.state, asked)
    if runtime.is_main_process():
        storage.write_atomically(file, json.dumps(found, indent=2) + '\n')
    return found


def _kept(file: epath.Path, number: int) -> dict[str, Any]:
    """What was found before the first update; {} where that is damaged, or of other prompts, which is said."""
    try:
        found = read_object(file)
        answers, loss = found.get('base_answers'), found.get('base_loss', 0.0)
        is_list = isinstance(answers, list) and len(answers) in (0, number) and isinstance(loss, float)
        if is_list and all(isinstance(answer, str) for answer in list(answers or ())):
            return found
        reason = f'it holds no {number} answers'
    except InputError as error:
        reason = str(error)
    logger.warning('%s is left out of the report: %s', file, reason)
    return {}


def beside(asked: Asked, said: Sequence[str], before: dict[str, Any]) -> list[dict[str, str]]:
    """Prompt, the base's answer and the new one, for each prompt."""
    base = before.pop('base_answers', None) or [''] * len(said)
    return [
        {'prompt': messages[-1].content, 'base': first, 'answer': last}
        for (messages, _), first, last in zip(asked, base, said, strict=True)
    ]


def describe(report: dict[str, Any], plot: str) -> str:
    """The report as people read it."""
    lines = [f'\ntrained {report["step"]} steps']
    if 'validation_loss' in report:
        lines.append(f'{"validation":14}{"nats/answer token":>18}')
        lines += [
            f'{label:14}{report[name]:18.4f}'
            for label, name in (('this model', 'validation_loss'), ('the base', 'base_loss'))
            if name in report
        ]
    for item in report['answers'][:3]:
        lines += [
            '',
            f'prompt: {item["prompt"]}',
            f'  base: {item["base"]}',
            f'  this model: {item["answer"]}',
        ]
    return '\n'.join([*lines, '', f'loss curve: {plot}'])
