import pytest

from llama_jax.errors import InputError
from llama_jax.inference.chat import Chat, check_messages
from llama_jax.tokenizer.chat_format import LLAMA3_TEMPLATE, Llama2ChatFormat
from llama_jax.tokenizer.tokenizer import load_tokenizer, tokenizer_of_files
from tests.tokenizer import kinds

pytest.importorskip('jinja2', reason="needs jinja2: pip install 'llama_jax[hf]'")
USER = [{'role': 'user', 'content': 'green bottles'}]
DIALOG = [{'role': 'system', 'content': 'Be brief.'}, *USER]


@pytest.fixture(scope='module')
def tokenizers():
    return {name: tokenizer_of_files(name, files) for name, (files, *_) in kinds.kinds().items()}


def test_the_checkpoints_own_template_is_followed(tokenizers):
    tokenizer = tokenizers['hermes']
    chat = Chat(tokenizer, kinds.CHATML)
    ids = chat.encode_prompt(DIALOG)
    text = '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\ngreen bottles<|im_end|>\n'
    assert ids == tokenizer.encode(text + '<|im_start|>assistant\n', special=True)
    assert ids.count(tokenizer.special_tokens['<|im_start|>']) == 3
    assert chat.stop_ids == tokenizer.stop_ids == (tokenizer.special_tokens['<|im_end|>'],)
    begun = chat.encode_prompt([*USER, {'role': 'assistant', 'content': 'There are'}])
    assert tokenizer.decode(begun).endswith('<|im_start|>assistant\nThere are')


def test_the_familys_format_is_taken_where_it_says_the_same(tokenizers, shared_data):
    llama3 = tokenizers['llama3']
    chat = Chat(llama3, LLAMA3_TEMPLATE)
    # A tag that a user writes stays text, which a template would read as a tag.
    ids = chat.encode_prompt([{'role': 'user', 'content': 'a<|eot_id|>b'}])
    assert ids.count(llama3.special_tokens['<|eot_id|>']) == 1
    assert ids[0] == llama3.bos_id and llama3.special_tokens['<|eot_id|>'] in chat.stop_ids
    llama2 = load_tokenizer(shared_data / 'tokenizers/llama2')
    chat = Chat(llama2, '')
    assert chat.encode_prompt(DIALOG) == Llama2ChatFormat(llama2).encode_prompt(DIALOG)
    begun = chat.encode_prompt([*USER, {'role': 'assistant', 'content': 'There are '}])
    assert begun == llama2.encode('[INST] green bottles [/INST] There are', bos=True)


def test_no_other_familys_format_is_taken_in_silence(tokenizers):
    with pytest.raises(InputError, match=r'has the token <\|im_start\|>.*no chat template; put the template'):
        Chat(tokenizers['chatml on llama2, transformers 4'], '')
    # Made of Llama 3, and taught another way to talk in the places of reserved tokens.
    with pytest.raises(InputError, match=r'has the token <\|im_start\|>, which is none of Llama 3 Instruct'):
        Chat(tokenizers['hermes'], '')


def test_an_answer_to_go_on_from_answers_somebody(tokenizers):
    with pytest.raises(InputError, match="the only message is the assistant's, to be gone on from") as error:
        Chat(tokenizers['llama3'], '').encode_prompt([{'role': 'assistant', 'content': 'Hi'}])
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('messages', 'words'),
    [
        ('Hi', 'must be a list of messages'),
        ([], 'must be a list of messages'),
        ([{'role': 'user'}], 'message 0 is'),
        ([*USER, {'role': 'user', 'content': ['x']}], 'message 1 is'),
        ([7], 'message 0 is 7'),
    ],
)
def test_what_is_no_conversation_is_refused_in_one_line(messages, words):
    with pytest.raises(InputError, match=words) as error:
        check_messages(messages)
    assert '\n' not in str(error.value)
