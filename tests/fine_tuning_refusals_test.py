"""What bad input of fine-tuning gets: one line of what is wrong, what is allowed and what to do; nothing is written.

A row of the table is a case or some; what each part refuses besides stands in that part's own tests.
"""

import dataclasses
import json
import re

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from configs import dpo, sft
from experiments.run import config_file, workdir
from experiments.run.start import starting_architecture
from llama_jax import export, pretrained
from llama_jax.convert import gguf_file, huggingface, peft
from llama_jax.convert.bitsandbytes import with_whole_weights
from llama_jax.convert.safetensors_file import open_safetensors
from llama_jax.data.examples import Encoder, example_dataset
from llama_jax.data.preference_dataset import Reading, preference_dataset
from llama_jax.data.record_kinds import Conversation, Preference
from llama_jax.data.records import read_records
from llama_jax.errors import InputError
from llama_jax.lora import LoraConfig, abstract_adapters, merged_leaves
from llama_jax.models.llama import LlamaForCausalLM, abstract_params_and_axes
from llama_jax.models.reward import LlamaForRewardModel, model_of
from llama_jax.tokenizer.chat_format import chat_format_for
from llama_jax.tokenizer.tokenizer import load_tokenizer
from tests import toy
from tests.convert.bitsandbytes_test import STATE, stored, text
from tests.convert.in_memory import InMemory, random_source
from tests.convert.peft_test import CONFIG, TIED, ours

USER, ANSWER = {'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Yes'}


@pytest.fixture(scope='module')
def tokenizer(shared_data):
    return load_tokenizer(shared_data / 'weights/stories260K/tok512.model')


def file_of(folder, *records):
    path = folder / 'data.jsonl'
    path.write_text('\n'.join(map(json.dumps, records)))
    return str(path)


RECORDS = {
    'unknown keys': (Conversation, {'txt': 'a'}, 'its keys are txt; it needs messages, conversations'),
    'ends with the user': (
        Conversation, {'messages': [USER]}, 'the conversation ends with the user; it must end with an answer'
    ),
    'begins with the assistant': (
        Conversation, {'messages': [ANSWER]}, 'begins with the assistant; a message by the user must come first'
    ),
    'no answer': (
        Conversation, {'messages': [USER, ANSWER | {'weight': 0}]}, 'no answer of it is to be learnt'
    ),
    'no loser': (Preference, {'prompt': 'a', 'chosen': 'b'}, 'rejected is missing among the keys'),
    'equal answers': (
        Preference, {'prompt': 'a', 'chosen': 'b', 'rejected': 'b'}, "are the same answer, 'b'"
    ),
    'other prompts': (
        Preference, {'chosen': [USER, ANSWER], 'rejected': [USER | {'content': 'Ho'}, ANSWER]},
        "message 0, letter 1: 'i' in chosen, 'o' in rejected",
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', RECORDS)
def test_a_record_is_named_with_its_file_what_was_found_and_on_error(name, tmp_path):
    kind, record, says = RECORDS[name]
    with pytest.raises(InputError) as refusal:
        list(read_records([file_of(tmp_path, record)], kind=kind))
    line = str(refusal.value)
    assert f'{tmp_path}/data.jsonl line 1: ' in line and says in line and 'on_error skip' in line
    assert '\n' not in line


def nothing_left_of_examples(folder, tokenizer):
    path = file_of(folder, {'prompt': 'a question', 'completion': 'an answer'})
    example_dataset([path], tokenizer, Encoder(chat_format_for(tokenizer, 'plain'), 4))


def nothing_left_after_a_cut(folder, tokenizer):
    path = file_of(folder, {'prompt': 'a question', 'completion': 'an answer'})
    example_dataset([path], tokenizer, Encoder(chat_format_for(tokenizer, 'plain'), 4, too_long='cut'))


def nothing_left_of_pairs(folder, tokenizer):
    path = file_of(folder, {'prompt': 'a question', 'chosen': 'one', 'rejected': 'two'})
    preference_dataset(Reading(tokenizer, chat_format_for(tokenizer, 'plain'), 4), [path])


def a_format_without_its_tokens(folder, tokenizer):
    chat_format_for(tokenizer, 'llama3')


class Whole(InMemory):
    """An array that is read in one block."""

    rows_axis = None

    def blocks(self):
        return [tuple(slice(0, size) for size in self.shape)]


def adapters_of(**changed):
    """Those of q as zeros, but for what is changed, put beside the weights of a toy model."""
    base, axes = abstract_params_and_axes(LlamaForCausalLM(CONFIG))
    shapes, _ = abstract_adapters(LoraConfig(rank=3, targets=('q',)), base, axes)
    parts = {f'blocks/attention/q/{n}': x.shape for n, x in shapes['blocks']['attention']['q'].items()}
    sizes = {name: changed.get(name.rpartition('/')[2], shape) for name, shape in parts.items()}
    sizes |= {name: shape for name, shape in changed.items() if '/' in name}
    found = {name: Whole(np.zeros(size, np.float32)) for name, size in sizes.items()}
    shape = base['blocks']['attention']['q'].shape
    whole = {'blocks/attention/q': Whole(np.zeros(shape, np.float32))}
    merged_leaves(whole, found, {'blocks/attention/q': shape}, 1.0)


def another_shape(folder, tokenizer):
    adapters_of(a=(3, 99, 3))


def another_rank(folder, tokenizer):
    adapters_of(b=(3, 5, 4, 8))


def a_weight_that_is_not_there(folder, tokenizer):
    adapters_of(**{'blocks/attention/qq/a': (1,)})


def an_unknown_target(folder, tokenizer):
    LoraConfig(targets=('gates',))


def an_adapter_of_another_base(folder, tokenizer):
    ours(folder / 'a', {})
    wide = dataclasses.replace(CONFIG, embed_dim=64)
    peft.open_merged(epath.Path(folder / 'a'), random_source(wide)).tensors['blocks/attention/q'][0].read()


def dora_is_merged_and_not_written(folder, tokenizer):
    tensors = ours(folder / 'a', {'use_dora': True})
    for module in {name.rpartition('.lora')[0] for name in tensors}:
        tensors[f'{module}.lora_magnitude_vector'] = np.ones(32, np.float32)
    save_file(tensors, folder / 'a/adapter_model.safetensors')
    adapter = peft.open_adapter(epath.Path(folder / 'a'), CONFIG)
    export.save_adapter(folder / 'x', adapter, CONFIG, to='peft', base='')


def one_side_of_a_tie(folder, tokenizer):
    ours(folder / 'a', {'target_modules': ['lm_head']}, places=['lm_head.weight'])
    adapter = peft.open_adapter(epath.Path(folder / 'a'), TIED)
    export.save_adapter(folder / 'x', adapter, TIED, to='gguf_adapter', base='')


SCORED = dataclasses.replace(toy.CONFIG, scalar_head=True)


def reward_model_in(folder):
    folder.mkdir()
    huggingface.write(random_source(SCORED), epath.Path(folder), bos_id=1, eos_ids=[2])


def a_reward_model_where_a_policy_is_asked_for(folder, tokenizer):
    reward_model_in(folder / 'm')
    config = dpo.get_config('tiny')
    config.model.preset = 'checkpoint'
    starting_architecture(config, pretrained.open(folder / 'm'))


def a_policy_where_a_reward_model_is_asked_for(folder, tokenizer):
    assert isinstance(model_of(SCORED), LlamaForRewardModel)
    toy.make_params(LlamaForRewardModel(toy.CONFIG))


def a_score_of_two_labels(folder, tokenizer):
    reward_model_in(folder / 'm')
    file = folder / 'm/config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | {'id2label': {'0': 'bad', '1': 'good'}}))
    pretrained.load(folder / 'm')


def a_folder_of_peft_cut_short(folder, tokenizer):
    ours(folder / 'a', {})
    file = folder / 'a/adapter_model.safetensors'
    file.write_bytes(file.read_bytes()[:-100])
    peft.open_adapter(epath.Path(folder / 'a'), CONFIG)


def a_misnamed_tensor_of_peft(folder, tokenizer):
    tensors = ours(folder / 'a', {})
    name = 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'
    tensors[name.replace('q_proj', 'q_porj')] = tensors.pop(name)
    save_file(tensors, folder / 'a/adapter_model.safetensors')
    peft.open_adapter(epath.Path(folder / 'a'), CONFIG)


def a_gguf_cut_short(folder, tokenizer):
    (folder / 'm.gguf').write_bytes(b'GGUF\x03\x00\x00\x00')
    gguf_file.read_header(epath.Path(folder / 'm.gguf'))


def four_bits(folder, **state):
    tensors, _ = stored('w', (64, 32))
    changed = state.pop('tensors', {})
    if state:
        tensors[STATE] = text(json.loads(tensors[STATE].tobytes()) | state)
    save_file(tensors | changed, folder / 'x.safetensors')
    with_whole_weights(open_safetensors(epath.Path(folder / 'x.safetensors')), 'x.safetensors')


def a_state_that_is_no_json(folder, tokenizer):
    four_bits(folder, tensors={STATE: np.frombuffer(b'{"shape": [1', np.uint8)})


def a_block_of_0(folder, tokenizer):
    four_bits(folder, blocksize=0)


def a_surplus_tensor(folder, tokenizer):
    four_bits(folder, tensors={'v.absmax': np.ones(3, np.float32)})


TABLE = {
    nothing_left_of_examples: r'1 conversations are too long for seq_len 4 \(the longest has \d+ .*raise seq_len',
    nothing_left_after_a_cut: r'nothing to learn is left .*1 conversations .*seq_len 4.*raise seq_len',
    nothing_left_of_pairs: r'of 1 pairs none fits into a row of 4 tokens: the longest takes \d+; take longer rows',
    a_format_without_its_tokens: r'llama3 needs <\|start_header_id\|>, which \S+tok512\S+ lacks; llama2 fits it',
    another_shape: r'adapter blocks/attention/q/a has shape \(3, 99, 3\), for its weight it must be \(3, 32, 3\)',
    another_rank: r'adapter blocks/attention/q/b has shape \(3, 5, 4, 8\), for its weight it must be \(3, 3, 4, 8\)',
    a_weight_that_is_not_there: 'blocks/attention/qq/a is no weight or adapter of this model',
    an_unknown_target: "targets has 'gates', which is no such weight; did you mean gate",
    an_adapter_of_another_base: r"has shape \(3, 32\), for \[32, 64\] .*must be \(3, 64\); .* another model's",
    dora_is_merged_and_not_written: 'has DoRA, which is not written as peft; write the merged model',
    one_side_of_a_tie: 'head was trained, which is tied .*gguf_adapter cannot say .*write the merged model',
    a_reward_model_where_a_policy_is_asked_for: 'is a reward model, which gives scores and no text; give the language',
    a_policy_where_a_reward_model_is_asked_for: 'a language model, which gives no scores; train a reward model from it',
    a_score_of_two_labels: 'num_labels is 2: a classifier',
    a_folder_of_peft_cut_short: r'adapter_model\.safetensors.*truncated',
    a_misnamed_tensor_of_peft: r'q_porj\.lora_A\.weight has no place in this model: did you mean .*q_proj',
    a_gguf_cut_short: r'm\.gguf: the header needs 16 bytes, but 0 are left of 8',
    a_state_that_is_no_json: r'x\.safetensors: tensor w\.quant_state.*is not JSON',
    a_block_of_0: r'x\.safetensors: tensor w\.quant_state.* has blocksize 0, it must be one of 32',
    a_surplus_tensor: r'x\.safetensors: tensor v\.absmax belongs to no matrix of 4 bits',
}


@pytest.mark.parametrize('row', TABLE, ids=lambda row: row.__name__)
def test_a_row_of_the_table(row, tmp_path, tokenizer):
    with pytest.raises(InputError, match=TABLE[row]) as refusal:
        row(tmp_path, tokenizer)
    assert '\n' not in str(refusal.value)
    assert not (tmp_path / 'x').exists()


def test_dora_is_no_setting_of_adapters_that_are_trained():
    arguments = ['--config=configs/sft.py:tiny,alpaca_lora', '--config.lora.use_dora=True']
    line = config_file.describe_error(AttributeError('use_dora'), arguments)
    assert re.fullmatch(
        r'unknown config key --config\.lora\.use_dora; did you mean (lora\.\w+( or )?)+\?', line
    )


@pytest.mark.parametrize(
    ('config', 'key', 'value'),
    [
        (sft.get_config('tiny'), 'lora.rank', 2),
        (sft.get_config('tiny'), 'lora.targets', 'q'),
        (sft.get_config('tiny'), 'model.weights', 'nf4'),
        (sft.get_config('tiny'), 'data.format', 'tulu'),
        (dpo.get_config('tiny'), 'loss.kind', 'ipo'),
    ],
)
def test_going_on_with_what_is_another_run_names_the_key(config, key, value, tmp_path):
    folder = epath.Path(tmp_path)
    workdir.record_run(folder, config, '', 'abc')
    before = (folder / workdir.CONFIG_FILE).read_bytes()
    changed = config.copy_and_resolve_references()
    section, name = key.split('.')
    changed[section][name] = value
    with pytest.raises(InputError, match=rf'belongs to another run: --config\.{key} was .* and is {value!r}'):
        workdir.check_workdir(folder, changed, '')
    assert (folder / workdir.CONFIG_FILE).read_bytes() == before
